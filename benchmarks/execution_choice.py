"""What execution="auto" chooses, against the plain dense layer and both forced ways.

    python -m benchmarks.execution_choice [--quick] [--json] [--threads N]
        [--processor-time]

Each row is a layer as a user meets it, on plain torch tensors, training (forward and backward)
or inference: "auto" beside the plain dense torch layer (the goal is a ratio of 0.95 or more at
every density), then the sparse and the dense kernels by themselves. `benchmarks.choice_fit`
fits the constants that decide.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.rows import Row, add_arguments, add_timing_arguments, show
from benchmarks.timing import Clock, clock, interleaved, use_threads
from sparsemodel.layers.linear_and_conv import EXECUTIONS, Execution, SparseConv2d, SparseLinear

BENCH = "execution_choice"
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0)
QUICK_DENSITIES = (0.1, 0.5)


def layers(*, quick: bool) -> Iterator[tuple[str, nn.Conv2d | nn.Linear, torch.Tensor]]:
    """Name, dense layer and input of each case."""
    generator = torch.Generator().manual_seed(0)
    for batch in (16,) if quick else (1, 4, 16, 64):
        for channels, size in ((16, 16), (64, 16), (256, 8)):
            x = torch.randn(batch, channels, size, size, generator=generator)
            name = f"conv 3x3 {channels}x{size}x{size} b{batch}"
            yield name, nn.Conv2d(channels, channels, 3, padding=1, bias=False), x
    for batch in (128,) if quick else (1, 16, 128, 512):
        x = torch.randn(batch, 512, generator=generator)
        yield f"linear 512->512 b{batch}", nn.Linear(512, 512), x


def rows(*, quick: bool, clock: Clock) -> Iterator[Row]:
    """Rows of every case, density and way."""
    rounds = 5 if quick else 15
    for name, plain, x in layers(quick=quick):
        for density in QUICK_DENSITIES if quick else DENSITIES:
            mask = torch.rand(plain.weight.shape) < density
            sparse = {execution: _sparse(plain, mask, execution) for execution in EXECUTIONS}
            for kind, call in (("train", _train), ("infer", _infer)):
                calls = {"torch": call(plain, x)} | {k: call(v, x) for k, v in sparse.items()}
                seconds = interleaved(calls, rounds=rounds, clock=clock)
                peer = 1e3 * seconds.pop("torch")
                for execution, ours in seconds.items():
                    case = f"{name} {kind}, {execution}"
                    yield Row(BENCH, case, density, 1e3 * ours, peer, "dense", "ms")


def _sparse(
    plain: nn.Conv2d | nn.Linear, mask: torch.Tensor, execution: Execution
) -> SparseConv2d | SparseLinear:
    if isinstance(plain, nn.Linear):
        return SparseLinear.from_dense(plain, mask, execution=execution)
    return SparseConv2d.from_dense(plain, mask, execution=execution)


def _train(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Forward and backward with an output gradient in torch's layout."""
    x = x.clone().requires_grad_()
    dy = torch.randn(layer(x).shape)

    def step() -> None:
        layer(x).backward(dy)
        layer.zero_grad()
        x.grad = None

    return step


def _infer(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, quick="two densities and one batch size")
    add_timing_arguments(parser)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    chosen = clock(processor_time=arguments.processor_time)
    show(rows(quick=arguments.quick, clock=chosen), arguments)


if __name__ == "__main__":
    main()
