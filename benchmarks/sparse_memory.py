"""Memory of a training step: sparse storage and the plan against dense torch.

    python -m benchmarks.sparse_memory [--quick] [--json] [--plot FILE.png] [--threads N]

Every variant trains resnet18 on batches of 16 random 3×32×32 images in a fresh process: SGD
with momentum, and for ours one choice of growth candidates (the top-K of a quarter of FedTiny's
largest step). State is the storage of the tensors that are there after the steps. The peak is
the process's high-water mark of resident memory over the steps (reset before them), above the
mark left by the interpreter with torch, after a training step of a tiny network. Dense is the
lower peak of NCHW and channels_last. Works on Linux alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.process_memory import reset_high_water, resident
from benchmarks.rows import Row, add_arguments, show
from benchmarks.sparse_step import INPUT_SHAPE, LEARNING_RATE, MOMENTUM, batch_of, random_mask
from benchmarks.timing import use_threads
from prunelab.networks import build_model
from sparsemodel.layers.growth import topk_pruned_gradients
from sparsemodel.layers.sparsify import sparsify
from sparsemodel.masks.adjust import TensorEntries
from sparsemodel.optim import SparseSGD
from sparsemodel.plans.plan import TrainingPlan
from sparsemodel.storage.meter import state_bytes, storage_bytes

BENCH = "sparse_memory"
MODEL, BATCH = "resnet18", 16
STEPS = 3
DENSITIES = (0.01, 0.05)
DENSE = ("dense", "dense channels_last")
# Ways to train, with what TrainingPlan takes for those that have a plan.
PLANS: dict[str, dict[str, Any]] = {
    "plan": {},
    "recompute": {"recompute": True},
    "recompute bfloat16": {"recompute": True, "activation_dtype": torch.bfloat16},
}
OURS = (*PLANS, "modules")
SHARE_MOVED = 0.15  # of a layer's active weights: the mean of FedTiny's adjustments
MIB = 2**20

Growth = Callable[[Mapping[str, int]], Mapping[str, TensorEntries]]


@dataclass(frozen=True)
class Prepared:
    """One variant, ready to train; `activations` tells their bytes, `growth` chooses candidates."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[], object]
    activations: Callable[[], int]
    growth: Growth | None = None


def rows(
    model: str,
    batch: int,
    densities: Sequence[float],
    *,
    threads: int | None,
    ways: Sequence[str] = OURS,
) -> Iterator[Row]:
    """Rows of state and peak of dense torch and some ways of ours, in MiB."""
    peers = {way: measured(way, model, batch, 1.0, threads=threads) for way in DENSE}
    name = min(peers, key=lambda way: peers[way]["peak"])
    peer = peers[name]
    for density in densities:
        for way in ways:
            ours = measured(way, model, batch, density, threads=threads)
            for what in ("state", "activations", "peak", "peak with top-K"):
                if what in ours:
                    theirs = peer[what.partition(" ")[0]]
                    case = f"{model} b{batch} {what}, {way}"
                    yield Row(BENCH, case, density, ours[what] / MIB, theirs / MIB, name, "MiB")
            print(f"# {way} d={density:g}: {_breakdown(ours)}", file=sys.stderr)
    print(f"# {name}: {_breakdown(peer)}", file=sys.stderr)


def _breakdown(numbers: dict[str, int]) -> str:
    return ", ".join(f"{what} {size / MIB:.2f}" for what, size in numbers.items()) + " MiB"


def measured(
    way: str, model: str, batch: int, density: float, *, threads: int | None
) -> dict[str, int]:
    """Bytes by kind, from a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{BENCH}", "--variant", way]
    command += ["--model", model, "--batch", str(batch), "--density", str(density)]
    command += [] if threads is None else ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    numbers: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def measure(way: str, model_name: str, batch: int, density: float) -> dict[str, int]:
    """Bytes by kind of one variant, in this process, which should be fresh."""
    _warm_up(way, model_name)
    base = resident("VmRSS")
    prepared = _prepared(way, model_name, batch, density)
    _trim()
    reset_high_water()
    at_rest = resident("VmRSS") - base
    for _ in range(STEPS):
        prepared.step()
    numbers = {"peak": resident("VmHWM") - base, "at rest before": at_rest}
    numbers |= state_bytes(prepared.model, prepared.optimizer)
    numbers["activations"] = prepared.activations()
    topk = 0
    if prepared.growth is not None:
        topk = _topk_bytes(prepared.model, prepared.growth)
        numbers["top-K"] = topk
        numbers["peak with top-K"] = resident("VmHWM") - base
    kinds = ("weights", "gradients", "optimizer", "indices")
    numbers["state"] = sum(numbers[kind] for kind in kinds) + topk
    return numbers


def _prepared(way: str, model_name: str, batch: int, density: float) -> Prepared:
    model = build_model(model_name, num_classes=10, input_shape=INPUT_SHAPE, seed=0).train()
    images, labels = batch_of(batch)
    if way == "dense channels_last":
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if way in DENSE:
        dense_sgd = torch.optim.SGD(
            model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=True
        )
        return Prepared(model, dense_sgd, *_autograd_step(model, dense_sgd, images, labels))
    model = sparsify(model, random_mask(model, density))
    sgd = SparseSGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    if way not in PLANS:
        return Prepared(
            model,
            sgd,
            *_autograd_step(model, sgd, images, labels),
            lambda counts: topk_pruned_gradients(
                model, counts, lambda net: functional.cross_entropy(net(images), labels)
            ),
        )
    plan = TrainingPlan(model, INPUT_SHAPE, batch_size=batch, **PLANS[way])
    return Prepared(
        model,
        sgd,
        lambda: plan.step(images, labels, optimizer=sgd),
        lambda: plan.arena_bytes,
        lambda counts: plan.topk_pruned_gradients(counts, images, labels),
    )


def _autograd_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[Callable[[], object], Callable[[], int]]:
    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step, lambda: _saved_bytes(model, images, labels)


def _saved_bytes(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> int:
    """Bytes of what autograd keeps between the passes, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = functional.cross_entropy(model(images), labels)
    size = storage_bytes(kept)
    del loss
    return size


def _topk_bytes(model: nn.Module, growth: Growth) -> int:
    """Choose growth candidates as an adjustment does; bytes of what it returns."""
    counts = {
        name.removesuffix("values") + "weight": math.ceil(SHARE_MOVED * len(values))
        for name, values in model.named_parameters()
        if name.endswith("values")
    }
    found = growth(counts)
    return storage_bytes(tensor for entries in found.values() for tensor in entries)


def _warm_up(way: str, model_name: str) -> None:
    """Make what torch and the kernels make once in a process: thread pools, code, tables."""
    with torch.device("meta"):  # imports what the model is built from, and takes no memory
        build_model(model_name, num_classes=10, input_shape=INPUT_SHAPE, seed=0)
    _prepared(way, "resnet8", 2, 0.5).step()
    _trim()


def _trim() -> None:
    """Give free memory back to the system, so that what is used next is seen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    """Run the command, or one variant of it."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCH}", description=__doc__)
    add_arguments(parser, quick="density 0.01 alone")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--variant", choices=(*DENSE, *OURS), help="measure this one here")
    parser.add_argument("--density", type=float, default=DENSITIES[0], help="of the variant")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    if arguments.variant:
        numbers: dict[str, Any] = measure(
            arguments.variant, arguments.model, arguments.batch, arguments.density
        )
        print(json.dumps(numbers))
        return
    densities = DENSITIES[:1] if arguments.quick else DENSITIES
    table = rows(arguments.model, arguments.batch, densities, threads=arguments.threads)
    show(table, arguments)


if __name__ == "__main__":
    main()
