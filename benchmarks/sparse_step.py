"""Whole training steps of sparse networks against dense torch.

    python -m benchmarks.sparse_step [--quick] [--json] [--plot FILE.png] [--threads N]
        [--processor-time] [--models NAMES] [--batches SIZES]

A step is forward pass, cross-entropy, backward pass and SGD with momentum on one mini-batch of
3×32×32 images. Dense is the plain network, in the faster of NCHW and channels_last, with
torch.optim.SGD in its fused form. Ours is the sparsified network under a uniform random mask,
the stem dense, with SparseSGD: "plan" through TrainingPlan, "recompute" the same in less memory,
"modules" through autograd. All densities are timed in the same rounds, and the first loss of
each is compared with the masked dense network's.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional

from benchmarks.rows import Row, add_arguments, add_timing_arguments, show
from benchmarks.timing import Clock, clock, interleaved, use_threads
from prunelab.networks import build_model
from sparsemodel.layers.sparsify import sparsify
from sparsemodel.masks.distribution import uniform
from sparsemodel.masks.mask import Mask, mask_from_scores, prunable_parameters
from sparsemodel.optim import SparseSGD
from sparsemodel.plans.plan import TrainingPlan

BENCH = "sparse_step"
MODELS = ("resnet18", "resnet20", "vgg11_bn")
BATCHES = (1, 16, 64)
DENSITIES = (0.01, 0.05, 0.1)
INPUT_SHAPE = (3, 32, 32)
LEARNING_RATE, MOMENTUM = 0.001, 0.9
TOLERANCE = 1e-3

Step = Callable[[], float]


def rows(
    models: Sequence[str],
    batches: Sequence[int],
    densities: Sequence[float],
    *,
    rounds: Callable[[int], int],
    clock: Clock,
) -> Iterator[Row]:
    """Rows of every model and batch size; `rounds` says how many for a batch size."""
    for name in models:
        for batch in batches:
            yield from _case_rows(name, batch, densities, rounds=rounds(batch), clock=clock)


def random_mask(model: nn.Module, density: float, *, seed: int = 0) -> Mask:
    """The same density in every layer but the stem, active weights at random places."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(p.shape) for name, p in prunable_parameters(model).items()}
    scores = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return mask_from_scores(scores, uniform(shapes, density))


def batch_of(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images [size, 3, 32, 32] and labels [size] of ten classes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, *INPUT_SHAPE, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


def _case_rows(
    name: str, batch: int, densities: Sequence[float], *, rounds: int, clock: Clock
) -> Iterator[Row]:
    model = build_model(name, num_classes=10, input_shape=INPUT_SHAPE, seed=0)
    images, labels = batch_of(batch)
    steps: dict[tuple[str, float], Step] = {
        ("dense", 0.0): _dense_step(copy.deepcopy(model), images, labels),
        ("dense channels_last", 0.0): _dense_step(
            copy.deepcopy(model).to(memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
            labels,
        ),
    }
    for density in densities:
        mask = random_mask(model, density)
        masked = copy.deepcopy(model)
        mask.apply(masked)
        expected = _dense_step(masked, images, labels)()
        ways = {
            "plan": _plan_step(sparsify(model, mask), images, labels, recompute=False),
            "recompute": _plan_step(sparsify(model, mask), images, labels, recompute=True),
            "modules": _module_step(sparsify(model, mask), images, labels),
        }
        for way, step in ways.items():
            if not abs(step() - expected) < TOLERANCE * expected:
                raise RuntimeError(f"{name}, {way}, d={density}: another loss than dense torch's")
            steps[way, density] = step
    calls = {f"{way}@{density}": step for (way, density), step in steps.items()}
    seconds = interleaved(calls, rounds=rounds, clock=clock)
    times = {key: 1e3 * seconds[f"{key[0]}@{key[1]}"] for key in steps}
    peer, peer_name = min((times[key], key[0]) for key in times if key[1] == 0)
    for (way, density), ours in times.items():
        if density:
            yield Row(BENCH, f"{name} b{batch}, {way}", density, ours, peer, peer_name, "ms")


def _dense_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)
    return _training_step(model, optimizer, images, labels)


def _module_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Step:
    optimizer = SparseSGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    return _training_step(model, optimizer, images, labels)


def _plan_step(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, recompute: bool
) -> Step:
    plan = TrainingPlan(model, INPUT_SHAPE, batch_size=len(images), recompute=recompute)
    optimizer = SparseSGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def step() -> float:
        return plan.step(images, labels, optimizer=optimizer)[0]

    return step


def _training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> Step:
    model.train()

    def step() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCH}", description=__doc__)
    add_arguments(parser, quick="resnet18 alone, fewer rounds")
    add_timing_arguments(parser)
    parser.add_argument("--models", default="", help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--batches", default="", help="comma-separated sizes; default: 1,16,64")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    models = MODELS[:1] if arguments.quick else MODELS
    if arguments.models:
        models = tuple(arguments.models.split(","))
    batches = [int(size) for size in arguments.batches.split(",") if size] or BATCHES

    def rounds(batch: int) -> int:
        few, many = (3, 7) if arguments.quick else (7, 31)
        return many if batch == 1 else 11 if batch <= 16 and not arguments.quick else few

    chosen = clock(processor_time=arguments.processor_time)
    show(rows(models, batches, DENSITIES, rounds=rounds, clock=chosen), arguments)


if __name__ == "__main__":
    main()
