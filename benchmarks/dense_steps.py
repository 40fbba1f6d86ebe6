"""Training steps of dense narrow networks: the runtime with whole layers against dense torch.

    python -m benchmarks.dense_steps [--quick] [--json] [--threads N] [--processor-time]

A step is forward pass, cross-entropy, backward pass and SGD with momentum on one mini-batch of 64
3×32×32 images, by the models that clients train: `RuntimeModel`, which needs no torch, and
`DenseModel`. Widths are channels of the first stage.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from benchmarks.rows import Row, add_arguments, add_timing_arguments, show
from benchmarks.timing import Clock, clock, interleaved, use_threads
from fedprune.local.model import LocalModel, RuntimeModel, Sgd
from fedprune.local.torch_models import DenseModel
from fedprune.settings import TrainingConfig
from prunelab.networks import build_model, float_state
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.state import SparseState

BENCH = "dense_steps"
CASES = (("resnet8", 8), ("resnet8", 16), ("resnet18", 8), ("resnet18", 16), ("resnet18", 32))
INPUT_SHAPE, BATCH = (3, 32, 32), 64
SGD = Sgd(0.001, 0.9, 0.0)


def rows(
    cases: Sequence[tuple[str, int]],
    *,
    rounds: int,
    clock: Clock,
    threads: int,
    input_shape: tuple[int, int, int] = INPUT_SHAPE,
) -> Iterator[Row]:
    """A row for each (network, width)."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (BATCH, *input_shape), dtype=np.uint8)
    labels = draw.integers(0, 10, BATCH)
    training = TrainingConfig(batch_size=BATCH, threads=threads)
    for name, width in cases:
        build = partial(
            build_model, name, num_classes=10, input_shape=input_shape, seed=0, width=width
        )
        model = build()
        state = SparseState({key: value.numpy() for key, value in float_state(model).items()})
        program = program_of(model, input_shape)
        models: dict[str, LocalModel] = {
            "ours": RuntimeModel(program, state, training),
            "torch": DenseModel(build, state, training),
        }
        losses = [each.step(images, labels, sgd=SGD) for each in models.values()]
        if not abs(losses[0] - losses[1]) < 1e-3 * losses[1]:
            raise RuntimeError(f"{name} of width {width}: losses {losses}")
        steps = {key: partial(each.step, images, labels, sgd=SGD) for key, each in models.items()}
        seconds = interleaved(steps, rounds=rounds, clock=clock)
        ours, peer = 1e3 * seconds["ours"], 1e3 * seconds["torch"]
        yield Row(BENCH, f"{name}, width {width}", 1.0, ours, peer, "dense torch", "ms")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCH}", description=__doc__)
    add_arguments(parser, quick="resnet8 alone, fewer rounds")
    add_timing_arguments(parser)
    arguments = parser.parse_args()
    threads = use_threads(arguments.threads)
    show(
        rows(
            CASES[:2] if arguments.quick else CASES,
            rounds=3 if arguments.quick else 9,
            clock=clock(processor_time=arguments.processor_time),
            threads=threads,
        ),
        arguments,
    )


if __name__ == "__main__":
    main()
