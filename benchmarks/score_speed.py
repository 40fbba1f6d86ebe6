"""Scores of one batch of samples: time and memory beside the ways that others compute them.

    python -m benchmarks.score_speed [--quick] [--json] [--plot FILE.png] [--threads N]
        [--processor-time] [--models NAME,...] [--batch N]

EL2N stands beside a bare forward pass. GraNd stands beside torch.func.vmap over per-sample
gradients (in the fastest of several chunks) and beside a backward pass a sample in batches of one,
as DeepCore computes it. Products with one direction, which influence needs, stand beside that
same loop. Where kronfluence is installed, its pairwise scores with one query stand beside ours:
both without what is done once (the inverse-Hessian product; EK-FAC's factors). Every side's
results are compared before anything is timed (but kronfluence's, which is another estimate).
Memory is the rise of the resident set's peak, each case in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.process_memory import reset_high_water, resident
from benchmarks.rows import Row, add_arguments, add_timing_arguments, show
from benchmarks.timing import Clock, clock, interleaved, use_threads
from datapruning.scores.error import el2n
from datapruning.scores.gradient import grand
from datapruning.scores.influence import influence_of
from prunelab.networks import build_model
from prunelab.training.task import CausalLM, ImageClassification, Task

BENCH = "score_speed"
MODELS = ("resnet8", "resnet18", "llama")
CHUNKS = (4, 16, 64)  # of vmap; the fastest counts
TOLERANCE = 1e-3
PEER_MODELS = ("resnet8",)  # kronfluence's factors of the larger ones take many minutes
MEMORY_BATCHES = (8, 32)


@dataclass(frozen=True)
class Subject:
    """A model with a batch of samples."""

    name: str
    task: Task
    model: nn.Module
    batch: Any
    size: int

    def rows(self, start: int, stop: int) -> Any:
        """A part of the batch."""
        if isinstance(self.batch, dict):
            return {name: part[start:stop] for name, part in self.batch.items()}
        return tuple(part[start:stop] for part in self.batch)


def subject(name: str, size: int) -> Subject:
    """A model by name with random weights, and random images of 32×32 or texts of 64 tokens."""
    torch.manual_seed(0)
    if name != "llama":
        model = build_model(name, num_classes=10, input_shape=(3, 32, 32), seed=0).eval()
        images = torch.randn(size, 3, 32, 32), torch.arange(size) % 10
        return Subject(name, ImageClassification(), model, images, size)
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=128, attn_implementation="eager",
    )  # fmt: skip
    ids = torch.randint(0, 2048, (size, 64))
    language_model: nn.Module = LlamaForCausalLM(config).eval()
    return Subject("llama", _Unmasked(), language_model, {"input_ids": ids, "labels": ids}, size)


class _Unmasked(CausalLM):
    """Texts of one length: vmap cannot follow how transformers looks into a mask."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        return functional.cross_entropy(logits.mT, targets, reduction="none").mean(1)


def rows(
    models: Sequence[str], size: int, *, rounds: int, clock: Clock, quick: bool = False
) -> Iterator[Row]:
    """Times of every model, a sample each."""
    for name in models:
        of = subject(name, size)
        if isinstance(of.task, ImageClassification):
            yield from _compared(
                of, "EL2N",
                {"ours": lambda s=of: _el2n(s), "forward pass": lambda s=of: _forward(s)},
                rounds=rounds, clock=clock, check=False,
            )  # fmt: skip
        sides = {"ours": lambda s=of: grand(s.task, s.model, s.batch)}
        for chunk in CHUNKS[1:2] if quick else CHUNKS:
            if chunk <= size:
                sides[f"vmap, chunks of {chunk}"] = lambda s=of, c=chunk: vmapped(s, c)
        sides["batches of one"] = lambda s=of: looped(s)
        sides["one training step"] = lambda s=of: _step(s)
        yield from _compared(of, "GraNd", sides, rounds=rounds, clock=clock)
        q = {n: torch.randn_like(p) for n, p in of.model.named_parameters()}
        yield from _compared(
            of, "products",
            {
                "ours": lambda s=of, q=q: influence_of(s.task, s.model, s.batch, q),
                "batches of one": lambda s=of, q=q: looped(s, q),
            },
            rounds=rounds, clock=clock,
        )  # fmt: skip


def _compared(
    of: Subject,
    what: str,
    sides: dict[str, Callable[[], Tensor]],
    *,
    rounds: int,
    clock: Clock,
    check: bool = True,
) -> Iterator[Row]:
    """Ours beside each of the others, of vmap's chunks beside the fastest; ms a sample."""
    if check:
        ours = sides["ours"]()
        for name, side in sides.items():
            if name != "one training step":
                compare(f"{of.name}, {what}, {name}", side(), ours)
    seconds = interleaved(sides, rounds=rounds, clock=clock)
    times = {name: 1e3 * value / of.size for name, value in seconds.items()}
    fastest = min((n for n in times if n.startswith("vmap")), key=lambda n: times[n], default=None)
    for name, value in times.items():
        if name != "ours" and (not name.startswith("vmap") or name == fastest):
            yield Row(BENCH, f"{what}, {of.name} b{of.size}", 1.0, times["ours"], value, name, "ms")


def compare(case: str, found: Tensor, ours: Tensor) -> float:
    """The largest difference in the largest of ours; raise RuntimeError above TOLERANCE."""
    error = float((found.double() - ours).abs().max() / ours.abs().max())
    if not error < TOLERANCE:
        raise RuntimeError(f"{case}: off by {error:.1e}")
    return error


def _forward(of: Subject) -> Tensor:
    with torch.no_grad():
        logits: Tensor = of.model(of.batch[0])
        return logits


def _el2n(of: Subject) -> Tensor:
    with torch.no_grad():
        return el2n(of.model(of.batch[0]), of.batch[1])


def _step(of: Subject) -> Tensor:
    """Forward and backward for the batch's gradient: what no score can be expected to beat."""
    parameters = list(of.model.parameters())
    loss = of.task.loss(of.model, of.batch).sum()
    return torch.autograd.grad(loss, parameters)[0]


def looped(of: Subject, direction: dict[str, Tensor] | None = None) -> Tensor:
    """A forward and a backward pass a sample, and its norm, or product with a direction."""
    names, parameters = zip(*of.model.named_parameters(), strict=True)
    found = []
    for row in range(of.size):
        loss = of.task.loss(of.model, of.rows(row, row + 1)).sum()
        gradients = torch.autograd.grad(loss, parameters)
        if direction is None:
            found.append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
        else:
            pairs = zip(names, gradients, strict=True)
            found.append(torch.stack([(g * direction[n]).sum() for n, g in pairs]).sum())
    return torch.stack(found)


def vmapped(of: Subject, chunk: int, direction: dict[str, Tensor] | None = None) -> Tensor:
    """torch.func: the gradients of so many samples at once, then norms, or products with one."""
    parameters = {name: p.detach() for name, p in of.model.named_parameters()}
    adapter = _Losses(of.model, of.task)

    def loss(parameters: dict[str, Tensor], part: Any) -> Tensor:
        one = _each(part, lambda x: x.unsqueeze(0))
        named = {f"model.{name}": p for name, p in parameters.items()}
        losses: Tensor = torch.func.functional_call(adapter, named, (one,))
        return losses.sum()

    found = []
    for start in range(0, of.size, chunk):
        part = of.rows(start, min(start + chunk, of.size))
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, part)
        if direction is None:
            squares = [g.flatten(1).square().sum(1) for g in gradients.values()]
            found.append(torch.stack(squares).sum(0).sqrt())
        else:
            parts = [g.flatten(1) @ direction[n].flatten() for n, g in gradients.items()]
            found.append(torch.stack(parts).sum(0))
    return torch.cat(found)


class _Losses(nn.Module):
    """A task's losses as a module, which functional_call needs."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Any) -> Tensor:
        return self.task.loss(self.model, batch)


def _each(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, dict):
        return {name: change(part) for name, part in batch.items()}
    return tuple(change(part) for part in batch)


def kronfluence_rows(
    models: Sequence[str], size: int, *, rounds: int, clock: Clock
) -> Iterator[Row]:
    """Scores of a batch for one query: its factors and our q are made before."""
    if importlib.util.find_spec("kronfluence") is None:
        return
    from benchmarks.kronfluence_peer import Peer  # noqa: PLC0415

    for name in set(models).intersection(PEER_MODELS):
        of = subject(name, size)
        q = {n: torch.randn_like(p) for n, p in of.model.named_parameters()}
        with Peer(of.task, of.model, of.batch) as peer:
            sides = {
                "ours": lambda s=of, q=q: influence_of(s.task, s.model, s.batch, q),
                "kronfluence, pairwise": peer.pairwise,
            }
            yield from _compared(of, "products", sides, rounds=rounds, clock=clock, check=False)


def memory_rows(name: str) -> Iterator[Row]:
    """Peaks in MiB above model and batch: GraNd's beside vmap's and beside a training step's.

    Of both batches: per-sample gradients would grow by the parameters for each sample more.
    """
    for size in MEMORY_BATCHES:
        ours = _peak("ours", name, size)
        for way, peer in (("vmap", f"vmap, chunks of {size}"), ("step", "one training step")):
            yield Row(
                BENCH, f"peak memory, GraNd, {name} b{size}", 1.0, ours, _peak(way, name, size),
                peer, "MiB",
            )  # fmt: skip


def _peak(way: str, name: str, size: int) -> float:
    """MiB that one way adds to the peak of a process that has model and batch."""
    command = [sys.executable, "-m", "benchmarks.score_speed", "--peak", f"{way},{name},{size}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{way}, {name}, batch {size}: {done.stderr[-500:]}")
    return float(done.stdout.splitlines()[-1])


def _print_peak(way: str, name: str, size: int) -> None:
    torch.set_num_threads(1)
    calls = {
        "ours": lambda s: grand(s.task, s.model, s.batch),
        "vmap": lambda s: vmapped(s, s.size),
        "step": _step,
    }
    calls[way](subject(name, 2))  # what the libraries load when they first run
    of = subject(name, size)
    reset_high_water()
    before = resident("VmRSS")
    calls[way](of)
    print((resident("VmHWM") - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser, quick="resnet8 alone, three rounds, one chunk of vmap")
    add_timing_arguments(parser)
    parser.add_argument("--models", default=",".join(MODELS), help="of resnet8, resnet18, llama, …")
    parser.add_argument("--batch", type=int, default=32, help="samples")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        way, name, size = arguments.peak.split(",")
        _print_peak(way, name, int(size))
        return
    use_threads(arguments.threads)
    models = ["resnet8"] if arguments.quick else arguments.models.split(",")
    size, rounds = arguments.batch, 3 if arguments.quick else 5
    time = clock(processor_time=arguments.processor_time)
    parts = [
        rows(models, size, rounds=rounds, clock=time, quick=arguments.quick),
        kronfluence_rows(models, size, rounds=1 if arguments.quick else rounds, clock=time),
    ]
    if sys.platform == "linux":
        parts += [memory_rows(name) for name in models]
    show(itertools.chain.from_iterable(parts), arguments)


if __name__ == "__main__":
    main()
