"""Train a model on samples or on some of their rows; the same seed gives the same bits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from prunelab.data.batches import num_batches
from prunelab.data.objects import as_samples
from prunelab.data.samples import Augmentable, Samples, check_targets, shuffled
from prunelab.errors import RunError, check_settings
from prunelab.runs.seeds import rng, seeded, stream_seed
from prunelab.training import checkpoint as checkpoints
from prunelab.training.precision import FLOAT32, PRECISIONS
from prunelab.training.steps import OPTIMIZERS, Objective, Stepper, is_planned, make_optimizer
from prunelab.training.task import (
    Classification,
    Task,
    check_fits,
    make_task,
    task_of,
    to_device,
)
from sparsemodel.masks.schedule import cosine
from sparsemodel.plans import stepper as planned_steps

__all__ = [
    "Callback",
    "Evaluation",
    "Objective",
    "Rows",
    "TrainingConfig",
    "TrainingResult",
    "evaluate",
    "predict",
    "train",
]

Rows = Tensor | Callable[[int], Tensor]
"""Row numbers, int64; or a function that gives each epoch its own."""

EVALUATION_BATCH = 256
PLANNED_BATCH = 64  # enough for the native kernels, in less memory
_ORDER, _DROPOUT = 0, 1  # streams of an epoch's seed


class Callback(Protocol):
    """Looks on while a model trains.

    One with `state_dict` and `load_state_dict` (tensors and plain values) is kept in
    checkpoints; one without has to stand missing the epochs before a resume.
    """

    def on_epoch(self, epoch: int, model: nn.Module) -> None:
        """After each epoch; may change the model's mode, but not its parameters."""
        ...


@runtime_checkable
class BatchCallback(Callback, Protocol):
    """Sees every batch, too. While there is one, no native plan trains: it has no logits."""

    def on_batch(self, epoch: int, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        """After each forward pass of a Classification task, before the step.

        Args:
            rows: int64 [B], on the CPU.
            logits: [B, C], detached, on the model's device, of the batch as it was trained on
                (train mode, augmented if so configured).
            labels: int64 [B], on the model's device.
        """
        ...


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes:
        epochs: passes over the rows; without effect where `steps` is given.
        batch_size: samples of an optimiser step.
        lr: of the first step; it falls along half a cosine towards 0 after the last.
        momentum: of SGD; Adam and AdamW have their usual moments (0.9, 0.999).
        weight_decay: L2 penalty of SGD and Adam, decoupled decay of AdamW; on all parameters.
        augment: random crops and flips, of image samples alone.
        steps: optimiser steps, in as many epochs as that takes; the last may be cut short.
        optimizer: "sgd", "adam" or "adamw".
        precision: "float32", or "bfloat16": forward and backward passes of a dense network under
            torch's autocast, images channels last; weights, optimiser and losses stay float32.

    Raises:
        RunError: values out of range, all of them named.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = False
    steps: int | None = None
    optimizer: str = "sgd"
    precision: str = FLOAT32

    def __post_init__(self) -> None:
        checks = {
            f"epochs must be at least 1, got {self.epochs}": self.epochs >= 1,
            f"batch_size must be at least 1, got {self.batch_size}": self.batch_size >= 1,
            f"lr must be positive and finite, got {self.lr}": 0 < self.lr < math.inf,
            f"momentum must be in [0, 1), got {self.momentum}": 0 <= self.momentum < 1,
            f"weight_decay must be at least 0, got {self.weight_decay}": self.weight_decay >= 0,
            f"steps must be at least 1, got {self.steps}": self.steps is None or self.steps >= 1,
            f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}": (
                self.optimizer in OPTIMIZERS
            ),
            f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}": (
                self.precision in PRECISIONS
            ),
        }
        check_settings("training", checks)

    def signature(self) -> dict[str, Any]:
        """What decides the bits, by name, to tell runs apart.

        The precision is left out where it is float32, so that files from before there was a
        choice are still of the same run.
        """
        values = asdict(self)
        if self.precision == FLOAT32:
            del values["precision"]
        return values


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did.

    Attributes:
        steps: optimiser steps.
        samples_seen: samples of all steps, those seen again counted again.
        losses: mean objective of each epoch, as it was before each step.
    """

    steps: int
    samples_seen: int
    losses: tuple[float, ...]

    @property
    def epochs(self) -> int:
        """Epochs begun; with `steps` the last may be a part of one."""
        return len(self.losses)


@dataclass(frozen=True)
class Evaluation:
    """Sums over samples, so that results of several parts can be added.

    Attributes:
        num_correct: samples whose largest logit is at the label; None for a task without classes,
            or with another metric.
        metric_sum: of the task's metric; None where it has none.
    """

    loss_sum: float
    num_correct: int | None
    num_samples: int
    metric_sum: float | None = None

    @property
    def accuracy(self) -> float:
        """Share of samples classified right, in [0, 1]; NaN for a task without classes."""
        return math.nan if self.num_correct is None else self.num_correct / self.num_samples

    @property
    def loss(self) -> float:
        """Mean loss."""
        return self.loss_sum / self.num_samples

    @property
    def metric(self) -> float:
        """Mean of the task's metric; NaN where it has none."""
        return math.nan if self.metric_sum is None else self.metric_sum / self.num_samples


@dataclass
class _Progress:
    steps: int = 0
    samples_seen: int = 0
    losses: list[float] = field(default_factory=list)


def train(
    model: nn.Module,
    samples: Samples,
    task: Task,
    *,
    config: TrainingConfig,
    seed: int,
    rows: Rows | None = None,
    objective: Objective | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: Path | None = None,
    run: str = "",
    device: str | torch.device = "cpu",
) -> TrainingResult:
    """Train `model` in place, dense or sparsified, and leave it in train mode.

    The order of samples, augmentation and dropout of epoch e follow from (seed, e) alone, and
    the global random state is left as it was: a run that was cut off and resumed ends with the
    same bits as one that was not, on the CPU with one number of threads. A sparsified model
    takes its steps by a `TrainingPlan`, where the network has one and no callback sees batches:
    the same updates up to rounding, in less time.

    Args:
        model: moved to `device`; only parameters with requires_grad are trained.
        rows: which samples; None: all. A function gives each epoch its own rows.
        objective: None: the mean of `task.loss`. Another needs a Classification task.
        checkpoint: written after each epoch; if the file is there, the run goes on from it.
        run: what else the checkpoint belongs to, such as a teacher.

    Raises:
        DataError: a text without targets, from which nothing can be learned.
        RunError: rows that are not in the data, a loss that is not finite, settings that the
            task, the model or the samples cannot follow, or a checkpoint of another run.
    """
    device = torch.device(device)
    model.to(device)
    optimizer = make_optimizer(
        model, config.optimizer, momentum=config.momentum, weight_decay=config.weight_decay
    )
    watching = [one for one in callbacks if isinstance(one, BatchCallback)]
    stepper = Stepper(
        model, task, optimizer, objective=objective, batch_size=config.batch_size,
        planned=not watching, precision=config.precision,
    )  # fmt: skip
    signature = _signature(model, samples, config=config, seed=seed, rows=rows, run=run)
    progress = _Progress()
    if checkpoint is not None:
        state = checkpoints.load(Path(checkpoint), signature=signature)
        if state is not None:
            progress = _restore(state, model, optimizer, callbacks)
    while not _finished(progress, config):
        epoch = len(progress.losses)
        chosen = _epoch_rows(rows, epoch, len(samples))
        check_targets(samples, chosen)
        with seeded(stream_seed(seed, _DROPOUT, epoch), device):
            _train_epoch(
                model, samples, stepper, optimizer, progress,
                config=config, seed=seed, rows=chosen, watching=watching, device=device,
            )  # fmt: skip
        for callback in callbacks:
            callback.on_epoch(epoch, model)
        if checkpoint is not None:
            state = _state(model, optimizer, progress, callbacks)
            checkpoints.save(Path(checkpoint), state, signature=signature)
    model.train()
    return TrainingResult(progress.steps, progress.samples_seen, tuple(progress.losses))


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Any, task: str | Task | None = None, *, rows: Tensor | None = None
) -> Evaluation:
    """Loss and accuracy of a model in eval mode, on the device where it is.

    The model's modes are restored. Sums are float64.

    Args:
        data: samples, or anything that `as_samples` takes.
        task: None: what the samples are for.

    Raises:
        ModelError: the model does not take such images, or has no logit for one of the labels.
        RunError: no rows, or rows that are not in the data.
    """
    samples = as_samples(data)
    task = make_task(task or task_of(samples))
    chosen = _epoch_rows(rows, 0, len(samples))
    check_fits(task, model, samples, num_classes=None)
    add = _evaluator(model, task)
    loss_sum = metric_sum = 0.0
    device = next(model.parameters()).device
    with evaluating(model):
        for part in chosen.split(EVALUATION_BATCH):
            loss, metric = add(to_device(samples.batch(part), device))
            loss_sum, metric_sum = loss_sum + loss, metric_sum + metric
    is_hits = isinstance(task, Classification) and task.metric_name == Classification.metric_name
    num_correct = int(metric_sum) if is_hits else None
    measured = metric_sum if task.metric_name else None
    return Evaluation(loss_sum, num_correct, len(chosen), measured)


def _evaluator(model: nn.Module, task: Task) -> Callable[[Any], tuple[float, float]]:
    """batch -> sums of losses and of the metric, by a native plan where there is one."""
    if is_planned(model, task):
        stepper = planned_steps.Stepper(model, batch_size=PLANNED_BATCH)
        return lambda batch: stepper.evaluate(*batch)

    def by_task(batch: Any) -> tuple[float, float]:
        losses, metrics = task.measure(model, batch)
        metric_sum = 0.0 if metrics is None else float(metrics.double().sum())
        return float(losses.double().sum()), metric_sum

    return by_task


@torch.no_grad()
def predict(
    model: nn.Module, samples: Samples, task: Classification, *, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [B, C] of a model in eval mode, as it gives them, and labels int64 [B], on the CPU.

    Samples come in the order of `rows` (all of them by default); the model's modes are restored.

    Raises:
        RunError: no rows, or rows that are not in the data.
    """
    logits, labels = [], []
    device = next(model.parameters()).device
    with evaluating(model):
        for part in _epoch_rows(rows, 0, len(samples)).split(EVALUATION_BATCH):
            batch = to_device(samples.batch(part), device)
            logits.append(task.logits(model, batch).cpu())
            labels.append(task.labels(batch).cpu())
    return torch.cat(logits), torch.cat(labels)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode inside, and as they were after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _train_epoch(
    model: nn.Module,
    samples: Samples,
    stepper: Stepper,
    optimizer: torch.optim.Optimizer,
    progress: _Progress,
    *,
    config: TrainingConfig,
    seed: int,
    rows: Tensor,
    watching: Sequence[BatchCallback],
    device: torch.device,
) -> None:
    epoch = len(progress.losses)
    order = rng(seed, _ORDER, epoch)
    parts = shuffled(samples, rows, batch_size=config.batch_size, rng=order)
    if config.steps is not None:
        parts = parts[: config.steps - progress.steps]
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    seen = 0
    model.train()
    for index, chosen in enumerate(parts):
        _set_lr(optimizer, config, progress.steps, epoch + index / len(parts))
        batch = to_device(_batch(samples, chosen, config, order), device)

        def look(logits: Tensor, labels: Tensor, rows: Tensor = chosen) -> None:
            for callback in watching:
                callback.on_batch(epoch, rows, logits, labels)

        loss = stepper.step(batch, chosen, look)
        # Summed where it is: reading it after each step would make a GPU wait.
        loss_sum += loss * len(chosen)
        progress.steps += 1
        seen += len(chosen)
    progress.samples_seen += seen
    progress.losses.append(float(loss_sum) / seen)
    if not math.isfinite(progress.losses[-1]):
        raise RunError(
            f"the loss became {progress.losses[-1]} in epoch {epoch}; lower the learning rate "
            f"({config.lr:g}), or check the data for values that are not finite"
        )


def _batch(
    samples: Samples, rows: Tensor, config: TrainingConfig, order: np.random.Generator
) -> Any:
    if not config.augment:
        return samples.batch(rows)
    if not isinstance(samples, Augmentable):
        raise RunError(
            f"training.augment is on, but {type(samples).__name__} has no augmented_batch; turn "
            "it off (crops and flips are for images)"
        )
    return samples.augmented_batch(rows, rng=order)


def _set_lr(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int, epochs: float
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = _rate(config, steps, epochs)


def _rate(config: TrainingConfig, steps: int, epochs: float) -> float:
    """Half a cosine over the run. Epochs may differ in length, so each counts as a whole."""
    done, end = (epochs, config.epochs) if config.steps is None else (steps, config.steps)
    return cosine(done, value=config.lr, end=end)


def epoch_rates(config: TrainingConfig, num_samples: int) -> list[float]:
    """Mean learning rate of the steps of each epoch that `train` takes on so many rows."""
    steps = num_batches(num_samples, batch_size=config.batch_size)
    total = config.epochs * steps if config.steps is None else config.steps
    means = []
    for first in range(0, total, steps):
        taken = range(first, min(first + steps, total))
        rates = [_rate(config, step, step / steps) for step in taken]
        means.append(sum(rates) / len(rates))
    return means


def _finished(progress: _Progress, config: TrainingConfig) -> bool:
    if config.steps is not None:
        return progress.steps >= config.steps
    return len(progress.losses) >= config.epochs


def _epoch_rows(rows: Rows | None, epoch: int, num_samples: int) -> Tensor:
    """The rows of an epoch, int64 on the CPU, checked."""
    if rows is None:
        chosen = torch.arange(num_samples)
    else:
        chosen = (rows if isinstance(rows, Tensor) else rows(epoch)).cpu()
    if chosen.dtype != torch.int64 or chosen.dim() != 1 or len(chosen) == 0:
        raise RunError(
            f"rows must be one or more int64 numbers of one dimension, got {chosen.dtype} "
            f"{tuple(chosen.shape)}"
        )
    if int(chosen.min()) < 0 or int(chosen.max()) >= num_samples:
        raise RunError(
            f"rows run from {int(chosen.min())} to {int(chosen.max())}; the data have "
            f"{num_samples} samples"
        )
    return chosen


def _signature(
    model: nn.Module,
    samples: Samples,
    *,
    config: TrainingConfig,
    seed: int,
    rows: Rows | None,
    run: str,
) -> dict[str, Any]:
    """What has to be the same for a checkpoint to be this run's."""
    chosen = "all"
    if isinstance(rows, Tensor):
        chosen = hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()[:16]
    elif rows is not None:
        chosen = "by epoch"
    shapes = str([(name, tuple(p.shape)) for name, p in model.named_parameters()])
    return {
        "parameters": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "data": samples.fingerprint,
        "rows": chosen,
        "seed": seed,
        "run": run,
        **{f"training.{name}": value for name, value in config.signature().items()},
    }


def _state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: _Progress,
    callbacks: Sequence[Callback],
) -> dict[str, Any]:
    return {
        "progress": asdict(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "callbacks": [c.state_dict() if hasattr(c, "state_dict") else None for c in callbacks],
    }


def _restore(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    callbacks: Sequence[Callback],
) -> _Progress:
    if len(state["callbacks"]) != len(callbacks):
        raise RunError(
            f"the checkpoint was written with {len(state['callbacks'])} callbacks, this run has "
            f"{len(callbacks)}; delete it, or train with the same ones"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for callback, saved in zip(callbacks, state["callbacks"], strict=True):
        if saved is not None and hasattr(callback, "load_state_dict"):
            callback.load_state_dict(saved)
    return _Progress(**state["progress"])
