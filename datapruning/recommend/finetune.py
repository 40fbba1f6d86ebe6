"""Fine-tune a causal language model on some samples: all its weights, or its adapters."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datapruning.recommend.effort import batches_of_tokens
from prunelab.data.samples import TokenSamples, check_targets
from prunelab.errors import RunError, check_settings
from prunelab.runs.seeds import generator, seeded, stream_seed
from prunelab.training import checkpoint as checkpoints
from prunelab.training.task import CausalLM, to_device
from sparsemodel.masks.schedule import cosine

START_VALUES = 1024  # of a parameter, that tell one model from another


@dataclass(frozen=True)
class FinetuneConfig:
    """How a language model is fine-tuned: AdamW, a linear warm-up, then half a cosine to 0.

    Attributes:
        epochs: passes over the rows; without effect where `steps` is given.
        steps: optimiser steps, in as many epochs as that takes.
        batch_size: samples of an optimiser step.
        tokens: of a forward pass, padding included; a step's gradient is gathered over as many
            passes as its samples need. Bounds the memory.
        lr: the highest.
        warmup: share of the steps in which it rises.
        weight_decay, max_norm: of AdamW; of the gradient, longer ones are shortened.
        save_every: steps between checkpoints.

    Raises:
        RunError: values out of range, all of them named.
    """

    epochs: int = 3
    steps: int | None = None
    batch_size: int = 32
    tokens: int = 4096
    lr: float = 3e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_norm: float = 1.0
    save_every: int = 200

    def __post_init__(self) -> None:
        counts = ("epochs", "steps", "batch_size", "tokens", "save_every")
        checks = {
            f"{name} must be at least 1, got {value}": value is None or value >= 1
            for name, value in asdict(self).items()
            if name in counts
        }
        checks |= {
            f"lr must be positive and finite, got {self.lr}": 0 < self.lr < math.inf,
            f"warmup must be in [0, 1], got {self.warmup}": 0 <= self.warmup <= 1,
            f"weight_decay must be at least 0, got {self.weight_decay}": self.weight_decay >= 0,
            f"max_norm must be positive, got {self.max_norm}": self.max_norm > 0,
        }
        check_settings("fine-tuning", checks)

    def num_steps(self, num_samples: int) -> int:
        """Optimiser steps on so many samples; each epoch ends with a step of what is left."""
        return self.steps or self.epochs * math.ceil(num_samples / self.batch_size)


@dataclass
class FinetuneResult:
    """What fine-tuning did: steps, samples (those seen again counted again), loss of each step."""

    steps: int = 0
    samples_seen: int = 0
    losses: list[float] = field(default_factory=list)


def finetune(
    model: nn.Module,
    samples: TokenSamples,
    *,
    config: FinetuneConfig,
    seed: int,
    rows: Tensor | None = None,
    checkpoint: Path | None = None,
    on_step: Callable[[FinetuneResult], None] | None = None,
) -> FinetuneResult:
    """Train the trainable parameters in place, where the model is, and leave it in eval mode.

    The loss is the mean over samples of `CausalLM.loss`, whatever the split into passes; on a
    GPU it is computed under bfloat16 autocast. Batches and dropout of step s follow from
    (seed, s); a checkpoint holds the trainable parameters alone and continues to the same bits
    on the CPU.

    Args:
        rows: which samples; None: all.

    Raises:
        DataError: a text without targets, from which nothing can be learned.
        RunError: no rows, nothing to train, a loss that is not finite, or a checkpoint of
            another run.
    """
    rows = torch.arange(len(samples)) if rows is None else rows
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained or len(rows) == 0:
        raise RunError("fine-tuning: no sample, or no parameter that requires a gradient")
    check_targets(samples, rows)
    device = next(iter(trained.values())).device
    optimizer = torch.optim.AdamW(trained.values(), lr=config.lr, weight_decay=config.weight_decay)
    total, result = config.num_steps(len(rows)), FinetuneResult()
    signature = _signature(model, trained, samples, rows, config=config, seed=seed)
    state = None if checkpoint is None else checkpoints.load(checkpoint, signature=signature)
    if state is not None:
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
        result = FinetuneResult(**state["result"])
    model.train()
    while result.steps < total:
        step = result.steps
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _factor(step, total, config.warmup)
        chosen = rows[_batch(step, len(rows), config.batch_size, seed)]
        with seeded(stream_seed(seed, 1, step), device):
            loss = _gather(model, samples, chosen, tokens=config.tokens, device=device)
        torch.nn.utils.clip_grad_norm_(trained.values(), config.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        result.losses.append(loss)
        result.steps, result.samples_seen = step + 1, result.samples_seen + len(chosen)
        if not math.isfinite(loss):
            raise RunError(f"fine-tuning: the loss became {loss} in step {step}; lower the lr")
        if checkpoint is not None and (result.steps % config.save_every == 0 or step + 1 == total):
            state = {
                "parameters": {name: p.detach() for name, p in trained.items()},
                "optimizer": optimizer.state_dict(),
                "result": asdict(result),
            }
            checkpoints.save(checkpoint, state, signature=signature)
        if on_step is not None:
            on_step(result)
    model.eval()
    return result


def _gather(
    model: nn.Module, samples: TokenSamples, rows: Tensor, *, tokens: int, device: torch.device
) -> float:
    """Add the gradient of the mean loss over the rows, pass by pass; returns that loss."""
    task, total = CausalLM(), torch.zeros((), dtype=torch.float64, device=device)
    half: Any = contextlib.nullcontext()
    if device.type == "cuda":
        half = torch.autocast("cuda", dtype=torch.bfloat16)
    for part in batches_of_tokens(samples.attention_mask[rows].sum(1), tokens=tokens):
        batch = to_device(samples.batch(rows[part]), device)
        with half:
            loss = task.loss(model, batch).sum() / len(rows)
        loss.backward()
        total += loss.detach()
    return float(total)


def _batch(step: int, num_samples: int, batch_size: int, seed: int) -> Tensor:
    """The samples of a step: each epoch is a new shuffle, cut into batches."""
    epoch, place = divmod(step, math.ceil(num_samples / batch_size))
    order = torch.randperm(num_samples, generator=generator(seed, 0, epoch))
    return order[place * batch_size : (place + 1) * batch_size]


def _factor(step: int, total: int, warmup: float) -> float:
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return cosine(step - rising, value=1.0, end=max(1, total - rising))


def _start(model: nn.Module) -> str:
    """16 hexadecimal digits of the weights to start from, of a few of each: there may be many."""
    sha = hashlib.sha256()
    for p in model.parameters():
        sha.update(p.detach().flatten()[:START_VALUES].double().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def _signature(
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    samples: TokenSamples,
    rows: Tensor,
    *,
    config: FinetuneConfig,
    seed: int,
) -> dict[str, Any]:
    shapes = str([(name, tuple(p.shape)) for name, p in trained.items()])
    return {
        "parameters": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "start": _start(model),
        "data": samples.fingerprint,
        "rows": hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16],
        "seed": seed,
        **asdict(config),
    }
