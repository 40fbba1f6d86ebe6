"""A client's training step under a mask: captured, eager, and a plain loop in torch.

    python -m benchmarks.gpu_step [--device cuda] [--quick] [--json] [--autotune]

All train the same network on the same images of CIFAR's shape, drawn, without augmentation: whole
local trainings, loading the client and reading the loss among them, over their number of steps.
The plain loop has its images on the device, torch.optim.SGD (fused) and a product with the masks
after each step; it is in float32, as torch is set: convolutions in TF32. "captured" is what
training.execution = auto does on a GPU; on a CPU its steps are called plainly, which checks this
program and says nothing of speed. The number printed is milliseconds a step, the median of turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.rows import Row, add_arguments
from benchmarks.timing import interleaved, use_threads
from fedprune.local.captured import CapturedTraining, CudaGraphs, Job, Plainly
from fedprune.local.model import Array, Sgd
from fedprune.local.torch_models import MaskedModel
from fedprune.local.training import Plan, train_epochs, training_plan
from fedprune.settings import PRECISIONS, TrainingConfig
from prunelab.data.tensors import prepare
from prunelab.networks import build_model, float_state
from prunelab.training.task import ImageClassification
from sparsemodel.masks.mask import Mask, prunable_parameters
from sparsemodel.runtime.adjust import carry
from sparsemodel.runtime.state import SparseState

BENCH = "gpu_step"
SHAPE, CLASSES, DENSITY, EPOCHS = (3, 32, 32), 10, 0.05, 2
SGD = Sgd(0.01, 0.9, 5e-4)
PEER = "plain torch loop"


def rows(name: str, *, batch: int, samples: int, device: str, rounds: int) -> Iterator[Row]:
    """One row for each way of ours; the peer is the plain loop."""
    calls, steps = trainings(name, batch=batch, samples=samples, device=device)
    seconds = interleaved(calls, rounds=rounds)
    case = f"{name} b{batch} on {device}"
    each = {way: 1e3 * value / steps for way, value in seconds.items()}
    for way in calls:
        if way != PEER:
            yield Row(BENCH, f"{case}, {way}", DENSITY, each[way], each[PEER], PEER, "ms")


def trainings(
    name: str, *, batch: int, samples: int, device: str
) -> tuple[dict[str, Callable[[], object]], int]:
    """Local trainings by name, each over when its call is, and how many steps each makes."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (samples, *SHAPE), dtype=np.uint8)
    labels = np.arange(samples) % CLASSES
    plan = training_plan(images, epochs=EPOCHS, batch_size=batch, seed=0, augmented=False)

    def build() -> nn.Module:
        return build_model(name, num_classes=CLASSES, input_shape=SHAPE, seed=0, width=None)

    mask = _random_mask(build())
    job = Job(images, labels, plan, mask.csr(), SGD)
    calls: dict[str, Callable[[], object]] = {}
    for precision in PRECISIONS:
        training = CapturedTraining(
            build().to(device),
            ImageClassification(),
            precision=precision,
            replays=CudaGraphs if device == "cuda" else Plainly,
        )
        calls[f"captured {precision}"] = partial(training.train, build().to(device), job)
    dense = {key: value.numpy() for key, value in float_state(build()).items()}
    config = TrainingConfig(device=device, threads=torch.get_num_threads())
    eager = MaskedModel(build, carry(SparseState(dense), mask.csr()), config)
    calls["eager masked"] = partial(
        train_epochs, eager, images, labels, sgd=SGD, epochs=EPOCHS, batch_size=batch, seed=0
    )
    calls[PEER] = plain_loop(build().to(device), mask, images, labels, plan)
    return calls, len(plan.sizes)


def plain_loop(
    model: nn.Module, mask: Mask, images: Array, labels: Array, plan: Plan
) -> Callable[[], float]:
    """The same training as one would write it in torch."""
    device = next(model.parameters()).device
    mask.apply(model)
    weights = [model.get_parameter(name) for name in mask]
    masks = [mask[name].to(device).float() for name in mask]
    optimizer = torch.optim.SGD(
        model.parameters(), SGD.lr, SGD.momentum, weight_decay=SGD.weight_decay, fused=True
    )
    inputs, targets = (torch.from_numpy(part).to(device) for part in (images, labels))
    order = torch.from_numpy(plan.rows[0]).to(device)

    def run() -> float:
        model.train()
        loss = torch.zeros((), device=device)
        for index in order.split(plan.sizes):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(prepare(inputs[index])), targets[index])
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_mul_(weights, masks)
        return loss.item()

    return run


def _random_mask(model: nn.Module) -> Mask:
    generator = torch.Generator().manual_seed(0)
    return Mask(
        {
            name: torch.rand(weight.shape, generator=generator) < DENSITY
            for name, weight in prunable_parameters(model).items()
        }
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{BENCH}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser, quick="resnet8, batches of 16, 64 images, one turn")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--autotune", action="store_true", help="cuDNN tries its algorithms first")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    torch.backends.cudnn.benchmark = arguments.autotune
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else "no GPU"
    print(f"# {card}, torch {torch.__version__}", file=sys.stderr)
    size = (
        {"name": "resnet8", "batch": 16, "samples": 64, "rounds": 1}
        if arguments.quick
        else {"name": "resnet18", "batch": 64, "samples": 1024, "rounds": 9}
    )
    for row in rows(device=arguments.device, **size):
        print(row.as_json() if arguments.json else row.as_line(), flush=True)


if __name__ == "__main__":
    main()
