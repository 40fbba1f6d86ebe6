"""The constants of kernels/choice.py from measurements, and where their choice is wrong.

    python -m benchmarks.choice_fit [--quick]

Training (forward and backward) and the forward pass alone of some seventy layers at six densities,
in both layouts, by sparse and by dense execution, on one thread, in processor time (other
processes disturb it less). The constants are a robust least-squares fit of the logarithms, by the
scipy that scikit-learn brings.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import nn

from benchmarks.timing import interleaved, machine, use_threads
from sparsemodel.kernels.choice import (
    FORWARD,
    FORWARD_DOUBT,
    TRAINING,
    TRAINING_DOUBT,
    Costs,
    Work,
    dense_cost,
    sparse_cost,
    work_of,
)
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.kernels.layout import batch_innermost, features_first
from sparsemodel.layers.linear_and_conv import Execution, SparseConv2d, SparseLinear

WAYS: tuple[Execution, ...] = ("sparse", "dense")
BOTH = (False, True)
SHOWN = 25
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)


class Case(NamedTuple):
    """One layer at one density in one layout; nanoseconds of a pass.

    In training that is a third of forward, gradient for the input and gradient for the weights.
    """

    name: str
    work: Work
    sparse: float
    dense: float
    training: bool

    def predicted(self, costs: Costs) -> tuple[float, float]:
        """Nanoseconds of the sparse and of the dense way."""
        return sparse_cost(self.work, costs), dense_cost(self.work, costs)


def layers(*, quick: bool) -> Iterator[tuple[str, nn.Conv2d | nn.Linear, torch.Tensor]]:
    """Name, dense layer and input."""
    for batch in (4,) if quick else (1, 2, 4, 16, 64):
        for channels, size in ((16, 16), (64, 16), (256, 8), (512, 4)):
            x = torch.randn(batch, channels, size, size)
            name = f"conv 3x3 {channels}x{size}x{size} b{batch}"
            yield name, nn.Conv2d(channels, channels, 3, padding=1, bias=False), x
    for batch in (4,) if quick else (1, 4, 16, 64):
        yield from _narrow_layers(batch)
    for wide, out in ((128, 128),) if quick else ((128, 128), (512, 512), (784, 300), (1024, 1024)):
        for batch in (1, 16, 128) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 512):
            yield f"linear {wide}->{out} b{batch}", nn.Linear(wide, out), torch.randn(batch, wide)


def _narrow_layers(batch: int) -> Iterator[tuple[str, nn.Conv2d, torch.Tensor]]:
    """Convolutions with few products for each activation."""
    for channels, size in ((64, 32), (256, 16)):
        name = f"depthwise 3x3 {channels}x{size}x{size} b{batch}"
        plain = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        yield name, plain, torch.randn(batch, channels, size, size)
    x = torch.randn(batch, 64, 16, 16)
    yield f"conv 1x1 64->128 b{batch}", nn.Conv2d(64, 128, 1, bias=False), x
    x = torch.randn(batch, 3, 32, 32)
    yield f"stem 3->32 b{batch}", nn.Conv2d(3, 32, 3, padding=1, bias=False), x


def cases(*, quick: bool) -> Iterator[Case]:
    """All measurements."""
    for name, plain, x in layers(quick=quick):
        for density in DENSITIES:
            mask = torch.rand(plain.weight.shape) < density
            layouts = {
                (e, i): _layer_and_input(plain, mask, e, x, in_layout=i) for e in WAYS for i in BOTH
            }
            for training in BOTH:
                call = _training if training else _forward
                calls = {f"{key}": call(*pair) for key, pair in layouts.items()}
                seconds = interleaved(calls, rounds=3, clock=time.process_time)
                for in_layout in BOTH:
                    passes = [seconds[f"{(e, in_layout)}"] * 1e9 for e in WAYS]
                    sparse, dense = (p / 3 if training else p for p in passes)
                    work = _work(plain, mask, x, in_layout=in_layout)
                    label = f"{name} d={density:g}{', in layout' if in_layout else ''}"
                    yield Case(label, work, sparse, dense, training)


def _layer_and_input(
    plain: nn.Conv2d | nn.Linear,
    mask: torch.Tensor,
    execution: Execution,
    x: torch.Tensor,
    *,
    in_layout: bool,
) -> tuple[SparseConv2d | SparseLinear, torch.Tensor, torch.Tensor]:
    """The layer, its input and an output gradient."""
    layer: SparseConv2d | SparseLinear
    if isinstance(plain, nn.Linear):
        layer = SparseLinear.from_dense(plain, mask, execution=execution)
    else:
        layer = SparseConv2d.from_dense(plain, mask, execution=execution)
    x, dy = (_laid_out(t, in_layout).detach() for t in (x, torch.randn(plain(x).shape)))
    return layer, x.requires_grad_(), dy


def _training(
    layer: SparseConv2d | SparseLinear, x: torch.Tensor, dy: torch.Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(layer(x), (x, layer.values), dy)


def _forward(
    layer: SparseConv2d | SparseLinear, x: torch.Tensor, dy: torch.Tensor
) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def _laid_out(x: torch.Tensor, in_layout: bool) -> torch.Tensor:
    """Batch innermost (or features first) or in torch's layout."""
    if not in_layout:
        return x.contiguous()
    return batch_innermost(x) if x.dim() == 4 else features_first(x)


def _work(
    plain: nn.Conv2d | nn.Linear, mask: torch.Tensor, x: torch.Tensor, *, in_layout: bool
) -> Work:
    nnz, batch = int(mask.sum()), len(x)
    if isinstance(plain, nn.Linear):
        geometry = ConvGeometry(plain.out_features, plain.in_features, 1, 1)
        return work_of(geometry, nnz, batch, (1, 1), in_layout=in_layout)
    geometry = SparseConv2d.from_dense(plain, mask).geometry
    return work_of(geometry, nnz, batch, (x.shape[2], x.shape[3]), in_layout=in_layout)


def fit(measured: list[Case], start: Costs) -> Costs:
    """The constants that predict the measurements best."""

    def errors(logarithms: np.ndarray) -> list[float]:
        # Constants that the measurements do not tell stay where they were.
        moved = list(0.03 * (logarithms - np.log(start)))
        costs = Costs(*np.exp(logarithms))
        pairs = [(case.predicted(costs), (case.sparse, case.dense)) for case in measured]
        return moved + list(np.log([p / m for both in pairs for p, m in zip(*both, strict=True)]))

    found = least_squares(errors, np.log(start), loss="soft_l1", f_scale=0.2)
    return Costs(*(float(f"{cost:.2g}") for cost in np.exp(found.x)))


def show(kind: str, measured: list[Case], now: Costs, doubt: float) -> None:
    """Print fitted constants beside those in force, and where either chooses the slower way."""
    fitted = fit(measured, now)
    print(f"# {kind}")
    for name, cost in fitted._asdict().items():
        print(f"{name:<22} {cost:>9g}   now {getattr(now, name):g}")
    for name, costs in (("fitted", fitted), ("now", now)):
        wrong = []
        for case in measured:
            sparse, dense = case.predicted(costs)
            way, taken, other = "sparse", case.sparse, case.dense
            if doubt * dense < sparse:
                way, taken, other = "dense", other, taken
            if taken > other / 0.95:
                wrong.append((taken / other, case.name, way))
        print(
            f"# {name}: the other way takes under 0.95 of the time in {len(wrong)} of "
            f"{len(measured)} cases:"
        )
        for loss, case_name, way in sorted(wrong, reverse=True)[:SHOWN]:
            print(f"{case_name:<48} {way:<6} {loss:.2f} x")


def main() -> None:
    """Measure, fit, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choice_fit", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few layers: whether it runs")
    arguments = parser.parse_args()
    use_threads(1)
    torch.manual_seed(0)
    print(f"# {machine()}, processor time", flush=True)
    measured = list(cases(quick=arguments.quick))
    show("training", [case for case in measured if case.training], TRAINING, TRAINING_DOUBT)
    show("forward", [case for case in measured if not case.training], FORWARD, FORWARD_DOUBT)


if __name__ == "__main__":
    main()
