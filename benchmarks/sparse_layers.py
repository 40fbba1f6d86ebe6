"""Sparse layers against dense torch, sparseprop and torch's CSR: forward and backward.

    python -m benchmarks.sparse_layers [--quick] [--json] [--plot FILE.png] [--threads N]
        [--processor-time]

A call is a layer's forward pass and the gradients for input and weights, through autograd. Each
side gets input and output gradient in the layout that suits it best, as inside a network of its
layers; "torch's layout" is ours on plain tensors, both conversions included. Ours is the layer
as it comes (execution="auto"); from density 0.2 on its sparse kernels are shown apart. Dense is
the faster of NCHW and channels_last. sparseprop 0.1.14 is an optional peer (`pip install
--no-build-isolation sparseprop scipy`), in the faster of its two modes; torch's CSR is its
`torch.sparse.mm`, in the faster of two layouts. Every side's gradients
are compared with dense torch's before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.rows import Row, add_arguments, add_timing_arguments, show
from benchmarks.timing import Clock, clock, interleaved, use_threads
from sparsemodel.kernels.layout import batch_innermost, features_first
from sparsemodel.layers.linear_and_conv import Execution, SparseConv2d, SparseLinear

BENCH = "sparse_layers"
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
QUICK_DENSITIES = (0.01, 0.05, 0.1, 1.0)
MAX_PEER_DENSITY = 0.2  # beyond, other sparse kernels only take long
MIN_CHOICE_DENSITY = 0.2  # from here on dense kernels may be the better choice
NETWORK_LAYOUT, TORCH_LAYOUT, SPARSE_KERNELS = "", ", torch's layout", ", sparse kernels"
TOLERANCE = 1e-4  # of the largest entry: sums of float32 in another order
RESNET = "conv 3x3"

Tensor = torch.Tensor
Dense = nn.Conv2d | nn.Linear
Layout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A layer to measure: its dense form, and the shape of its input."""

    name: str
    layer: Callable[[], Dense]
    input_shape: tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """One way to compute a layer; `grad` returns the gradients for input and weights."""

    grad: Callable[[], tuple[Tensor, Tensor]]
    at_mask: bool  # whether the weight gradient has the active weights alone


def conv(channels: int, size: int, *, batch: int = 64, groups: int = 1) -> Shape:
    return Shape(
        f"{'depthwise 3x3' if groups > 1 else RESNET} {channels}x{size}x{size} b{batch}",
        lambda: nn.Conv2d(channels, channels, 3, 1, 1, groups=groups, bias=False),
        (batch, channels, size, size),
    )


def linear(width: int, out: int, rows: int) -> Shape:
    return Shape(
        f"linear {width}->{out} b{rows}", lambda: nn.Linear(width, out, bias=False), (rows, width)
    )


SHAPES = (
    conv(64, 32),
    conv(128, 16),
    conv(256, 8),
    conv(512, 4),
    conv(256, 16, groups=256),
    linear(1024, 1024, 128),
    linear(768, 3072, 512),
    linear(3072, 768, 512),
)


def rows(
    shapes: Sequence[Shape], densities: Sequence[float], *, rounds: int, clock: Clock
) -> Iterator[Row]:
    """The rows of every shape, then their summary."""
    all_rows: list[Row] = []
    for shape in shapes:
        for row in _shape_rows(shape, densities, rounds=rounds, clock=clock):
            all_rows.append(row)
            yield row
    yield from _summary(all_rows, densities)


def _shape_rows(
    shape: Shape, densities: Sequence[float], *, rounds: int, clock: Clock
) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    dense = shape.layer()
    with torch.no_grad():
        dense.weight.copy_(torch.randn(dense.weight.shape, generator=generator) / 16)
    x = torch.randn(shape.input_shape, generator=generator)
    dy = torch.randn(dense(x).shape, generator=generator)
    sides = {("dense", 0.0): _dense(dense, x, dy)}
    if x.dim() == 4:
        sides["dense channels_last", 0.0] = _dense(_copy(dense), x, dy, layout=_channels_last)
    for density in densities:
        mask = _random_mask(dense.weight.shape, density, generator)
        masked = _copy(dense, mask)
        found = _sides(masked, mask, x, dy, density)
        check(shape.name, _dense(masked, x, dy).grad(), found, mask)
        sides |= {(name, density): side for name, side in found.items()}
    calls = {f"{name}@{density}": side.grad for (name, density), side in sides.items()}
    seconds = interleaved(calls, rounds=rounds, clock=clock)
    times = {key: 1e3 * seconds[f"{key[0]}@{key[1]}"] for key in sides}
    best = min((times[key], key[0]) for key in times if key[0].startswith("dense"))
    for (name, density), ours in times.items():
        if not name.startswith("ours"):
            continue
        case = shape.name + name.removeprefix("ours")
        yield Row(BENCH, case, density, ours, best[0], best[1], "ms")
        for peer in ("sparseprop", "torch CSR"):
            if name == "ours" and (peer, density) in times:
                yield Row(BENCH, case, density, ours, times[peer, density], peer, "ms")


def _sides(masked: Dense, mask: Tensor, x: Tensor, dy: Tensor, density: float) -> dict[str, Side]:
    """Every sparse way to compute a layer whose pruned weights are zero."""
    sides = {
        "ours": _ours(masked, mask, x, dy, layout=_innermost),
        f"ours{TORCH_LAYOUT}": _ours(masked, mask, x, dy, layout=_plain),
    }
    if density >= MIN_CHOICE_DENSITY:
        sides[f"ours{SPARSE_KERNELS}"] = _ours(
            masked, mask, x, dy, layout=_innermost, execution="sparse"
        )
    groups = masked.groups if isinstance(masked, nn.Conv2d) else 1
    peers = density <= MAX_PEER_DENSITY
    if peers and groups == 1 and importlib.util.find_spec("sparseprop") is not None:
        sides["sparseprop"] = _sparseprop(masked, x, dy)
    if peers and isinstance(masked, nn.Linear):
        sides["torch CSR"] = _csr(masked, x, dy)
    return sides


def _sparse_layer(masked: Dense, mask: Tensor, execution: Execution) -> SparseConv2d | SparseLinear:
    if isinstance(masked, nn.Conv2d):
        return SparseConv2d.from_dense(masked, mask, execution=execution)
    return SparseLinear.from_dense(masked, mask, execution=execution)


def _side(layer: nn.Module, weight: Tensor, x: Tensor, dy: Tensor, *, at_mask: bool) -> Side:
    x = x.detach().requires_grad_()

    def grad() -> tuple[Tensor, Tensor]:
        dx, dw = torch.autograd.grad(layer(x), (x, weight), dy)
        return dx, dw

    return Side(grad, at_mask)


def _plain(x: Tensor) -> Tensor:
    return x.contiguous()


def _innermost(x: Tensor) -> Tensor:
    """Batch innermost, or features first: the layout of our layers' own outputs."""
    return batch_innermost(x) if x.dim() == 4 else features_first(x)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _dense(layer: Dense, x: Tensor, dy: Tensor, *, layout: Layout = _plain) -> Side:
    if layout is _channels_last:
        layer.to(memory_format=torch.channels_last)
    return _side(layer, layer.weight, layout(x), layout(dy), at_mask=False)


def _ours(
    masked: Dense,
    mask: Tensor,
    x: Tensor,
    dy: Tensor,
    *,
    layout: Layout,
    execution: Execution = "auto",
) -> Side:
    layer = _sparse_layer(masked, mask, execution)
    return _side(layer, layer.values, layout(x), layout(dy), at_mask=True)


def _sparseprop(masked: Dense, x: Tensor, dy: Tensor) -> Side:
    """The faster of its modes: vectorised over the batch (stored innermost) or over the width."""
    from sparseprop.modules import SparseConv2d as Conv  # noqa: PLC0415 - optional
    from sparseprop.modules import SparseLinear as Linear  # noqa: PLC0415

    if isinstance(masked, nn.Linear):
        linear = Linear.from_dense(masked)
        return _side(linear, linear.W_val, x, dy, at_mask=True)
    modes = []
    for over_width, layout in ((False, _innermost), (True, _plain)):
        conv = Conv.from_dense(masked, vectorizing_over_on=over_width)
        modes.append(_side(conv, conv.W_val, layout(x), layout(dy), at_mask=True))
    return _faster(modes)


def _csr(masked: nn.Linear, x: Tensor, dy: Tensor) -> Side:
    """`torch.sparse.mm`, whose gradient has the active weights alone (that of `@` is dense).

    The faster of activations features first and as they are.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # CSR support is in beta
        weight = masked.weight.detach().to_sparse_csr().requires_grad_()
    return _faster(
        _Csr(weight, layout(x).detach().requires_grad_(), layout(dy)).side()
        for layout in (_innermost, _plain)
    )


@dataclass(frozen=True)
class _Csr:
    """A CSR weight, its input and the gradient of its output."""

    weight: Tensor
    x: Tensor
    dy: Tensor

    def side(self) -> Side:
        def grad() -> tuple[Tensor, Tensor]:
            y = torch.sparse.mm(self.weight, self.x.t()).t()
            dx, dw = torch.autograd.grad(y, (self.x, self.weight), self.dy)
            return dx, dw.values()

        return Side(grad, at_mask=True)


def _faster(sides: Iterable[Side]) -> Side:
    """The faster of some ways to do the same."""
    numbered = {str(number): side for number, side in enumerate(sides)}
    seconds = interleaved({name: side.grad for name, side in numbered.items()}, rounds=1)
    return min(numbered.items(), key=lambda item: seconds[item[0]])[1]


def _copy(layer: Dense, mask: Tensor | None = None) -> Dense:
    """A copy of a layer with its pruned weights at zero."""
    copied = copy.deepcopy(layer)
    if mask is not None:
        copied.weight.data.mul_(mask)
    return copied


def _random_mask(shape: torch.Size, density: float, generator: torch.Generator) -> Tensor:
    """Exactly round(density · weights) active weights, at least one."""
    mask = torch.zeros(shape.numel(), dtype=torch.bool)
    active = max(1, round(density * shape.numel()))
    mask[torch.randperm(shape.numel(), generator=generator)[:active]] = True
    return mask.reshape(shape)


def check(name: str, expected: tuple[Tensor, Tensor], sides: dict[str, Side], mask: Tensor) -> None:
    """Raise unless every side's gradients are those of the masked dense layer."""
    dx, dw = expected[0], expected[1][mask]
    for label, side in sides.items():
        got_dx, got_dw = side.grad()
        got_dw = got_dw if side.at_mask else got_dw[mask]
        for what, got, want in (("input", got_dx, dx), ("weights", got_dw, dw)):
            error = (got - want).abs().max() / want.abs().max()
            if not error < TOLERANCE:
                raise RuntimeError(f"{name}, {label}: gradient for {what} off by {error:.2e}")


def _summary(all_rows: Sequence[Row], densities: Sequence[float]) -> Iterator[Row]:
    """Medians over the four ResNet18 shapes, and how far the automatic choice can fall behind."""
    for density in densities:
        for peer in ("dense", "sparseprop"):
            ratios = [
                row.ratio
                for row in all_rows
                if row.density == density
                and row.case.startswith(RESNET)
                and "," not in row.case
                and row.peer_name.startswith(peer)
            ]
            if ratios:
                yield _ratio_row(f"median of {len(ratios)} {RESNET}", density, ratios, peer)
    for label, layout in (("", NETWORK_LAYOUT), (TORCH_LAYOUT, TORCH_LAYOUT)):
        automatic = [
            row
            for row in all_rows
            if row.peer_name.startswith("dense")
            and row.case.partition(",")[1:] == layout.partition(",")[1:]
        ]
        worst = min(automatic, key=lambda row: row.ratio)
        case = f"lowest, {worst.case.partition(',')[0]}{label}"
        yield _ratio_row(case, worst.density, [worst.ratio], "dense")


def _ratio_row(case: str, density: float, ratios: Sequence[float], peer: str) -> Row:
    """A row of ratios: the peer's time is 1."""
    return Row(BENCH, case, density, 1 / statistics.median(ratios), 1.0, peer, "x")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCH}", description=__doc__)
    add_arguments(parser, quick="fewer densities and rounds")
    add_timing_arguments(parser)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    if importlib.util.find_spec("sparseprop") is None:
        print("sparseprop is not installed; going on without it", file=sys.stderr)
    densities = QUICK_DENSITIES if arguments.quick else DENSITIES
    rounds = 3 if arguments.quick else 9
    chosen = clock(processor_time=arguments.processor_time)
    show(rows(SHAPES, densities, rounds=rounds, clock=chosen), arguments)


if __name__ == "__main__":
    main()
