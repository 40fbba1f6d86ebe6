"""Sparse blocks on a GPU against torch dense and torch's BSR.

    python -m benchmarks.cuda_structured [--quick] [--json]

Layers of 4096 → 4096 at a batch of 8192. Every result is compared with dense torch's before
anything is timed. Times are medians of device events, all sides in turn in one process.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from benchmarks.cuda_kernels import command, milliseconds, show
from benchmarks.rows import Row
from sparsemodel.kernels.blocks import ops as block_ops
from sparsemodel.kernels.blocks.index import BlockIndex
from sparsemodel.kernels.csr import csr_from_mask
from sparsemodel.masks.structure import SIDES, block_counts, block_mask

Tensor = torch.Tensor
Call = Callable[[], Any]

BENCH = "cuda_structured"
DENSITIES = (0.05, 0.1, 0.25, 0.5)
DENSE, BSR = "torch", "torch BSR"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest


@dataclass(frozen=True)
class Case:
    """One operation: ours, and peers of which `torch` computes the same."""

    name: str
    density: float
    ours: Call
    peers: dict[str, Call]


def cases(width: int, batch: int, dtype: torch.dtype, sides: tuple[int, ...]) -> Iterator[Case]:
    """All cases on the current default device, each made when it is its turn."""
    for density in DENSITIES:
        for side in sides:
            yield from _blocks(width, batch, dtype, density, side)


def _blocks(
    width: int, batch: int, dtype: torch.dtype, density: float, side: int
) -> Iterator[Case]:
    mask, weight = _weight(width, dtype, density, side)
    row_ptr, cols = csr_from_mask(mask)
    index = BlockIndex.build(row_ptr, cols, width, side)
    pattern = row_ptr, cols, index.joined(), side
    values = weight[mask]
    x, dy = torch.randn(2, batch, width, dtype=dtype).unbind()
    backward = torch.ops.sparsemodel.block_linear_backward
    positions = mask.flatten().nonzero().flatten()
    name = f"{str(dtype).removeprefix('torch.')}, side {side}"

    def gradient() -> Tensor:
        return (dy.t() @ x).flatten()[positions]

    yield Case(
        f"blocks, {name}", density,
        lambda: block_ops.block_linear(x, values, None, *pattern),
        {DENSE: lambda: functional.linear(x, weight), **_bsr_peer(x, weight, side)},
    )  # fmt: skip
    yield Case(
        f"blocks, {name}, input gradient", density,
        lambda: backward(dy, x, values, *pattern, [True, False])[0],
        {DENSE: lambda: dy @ weight, **_bsr_peer(dy, weight.t(), side)},
    )  # fmt: skip
    yield Case(
        f"blocks, {name}, gradient at the blocks", density,
        lambda: backward(dy, x, values, *pattern, [False, True])[1], {DENSE: gradient},
    )  # fmt: skip


def _weight(width: int, dtype: torch.dtype, density: float, side: int) -> tuple[Tensor, Tensor]:
    """A mask of random blocks and a dense weight under it."""
    scores = {"w": torch.rand(width, width).cpu()}
    mask = block_mask(scores, block_counts({"w": (width, width)}, density, side=side), side=side)
    weight = torch.randn(width, width, dtype=dtype) / width**0.5
    pattern = mask["w"].to(weight.device)
    return pattern, weight * pattern


def _bsr_peer(x: Tensor, weight: Tensor, side: int) -> dict[str, Call]:
    """torch's own block-sparse product x · Wᵀ."""
    with warnings.catch_warnings():  # torch calls the format a beta
        warnings.simplefilter("ignore", UserWarning)
        blocks = weight.contiguous().to_sparse_bsr((side, side))
    return {BSR: lambda: functional.linear(x, blocks)}


def compare(case: Case, dtype: torch.dtype) -> None:
    """Refuse to time what does not compute the same as dense torch."""
    ours, expected = case.ours().double(), case.peers[DENSE]().double()
    bound = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    if not torch.allclose(ours, expected, rtol=0, atol=bound):
        raise SystemExit(f"{case.name}: ours and {DENSE} differ; nothing was timed")


def working(case: Case) -> dict[str, Call]:
    """The peers that run: torch's sparse formats do not take every type and side."""
    found = {}
    for name, peer in case.peers.items():
        try:
            peer()
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            print(f"# {case.name}: left out {name} ({reason})", file=sys.stderr)
        else:
            found[name] = peer
    return found


def rows(width: int, batch: int, rounds: int, sides: tuple[int, ...]) -> Iterator[Row]:
    """Time every case on the current GPU."""
    with torch.device("cuda"):
        for dtype in (torch.bfloat16, torch.float32):
            for case in cases(width, batch, dtype, sides):
                compare(case, dtype)
                times = milliseconds({"ours": case.ours, **working(case)}, rounds)
                ours = times.pop("ours")
                for name, peer in times.items():
                    yield Row(BENCH, case.name, case.density, ours, peer, name, "ms")


def main() -> None:
    """Run the command."""
    arguments = command(BENCH, __doc__)
    if block_ops.kernels_for(torch.zeros(1, device="cuda")) is None:
        raise SystemExit("the kernels of sparse blocks cannot be used here; the warning says why")
    size = (1024, 2048, 10, (32,)) if arguments.quick else (4096, 8192, 50, SIDES)
    show(rows(*size), as_json=arguments.json)


if __name__ == "__main__":
    main()
