"""The largest gradients outside the mask by the kernel of topk.cu, without the dense gradient."""
# ruff: noqa: PLR0917 - kernels take their arrays by position

from __future__ import annotations

import torch

from sparsemodel.errors import MaskError
from sparsemodel.kernels.cuda.conv import sizes
from sparsemodel.kernels.cuda.launch import Runner, blocks_of
from sparsemodel.kernels.geometry import ConvGeometry

Tensor = torch.Tensor

_SIDE = 64  # of a tile, as in topk.cu
_BINS = 4096
_MAX_POSITION = 2**31 - 1
# A key is 31 bits of magnitude and 31 of position; each pass looks at a digit: (shift, width).
_DIGITS = ((50, 12), (38, 12), (26, 12), (14, 12), (2, 12), (0, 2))
_MIN_CANDIDATES = 1 << 16  # so many may be sorted before more passes are worth their time


def topk_grad(
    runner: Runner,
    x: Tensor,
    dy: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    geometry: ConvGeometry,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The k weight gradients of largest magnitude outside the mask, ties to the lower index.

    A radix selection: each pass computes the gradient tile by tile and counts one digit of
    (magnitude, position) among those that can still be selected, until the rest is few enough to
    sort. Two passes are the rule (one that counts, one that writes down), seven the most.
    Memory is O(k), the gradient is never held, and the result does not depend on the schedule.

    Args:
        runner: where to run.
        x: [in, H, W, B], contiguous, float32, bfloat16 or float16.
        dy: [out, OH, OW, B], alike.
        row_ptr, cols: the pattern, int32.
        geometry: of the layer; a linear one is a 1×1 convolution of one pixel.
        k: how many, >= 0.

    Returns:
        Flat indices into the dense weight (int64, ascending) and gradients (float32), min(k,
        pruned weights) of each.

    Raises:
        MaskError: a gradient at a pruned place is NaN.
    """
    scan = _Scan(runner, x, dy, row_ptr, cols, geometry)
    k = min(k, geometry.out_channels * geometry.row_length - cols.numel())
    if k == 0:
        return x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.float32)
    shift, prefix, num_candidates = _threshold(scan, k)
    keys, gradients = scan.selected(shift, prefix, num_candidates)
    keys, order = keys.topk(k)
    positions, by_position = (_MAX_POSITION - (keys & _MAX_POSITION)).sort()
    return positions, gradients[order[by_position]]


def _threshold(scan: _Scan, k: int) -> tuple[int, int, int]:
    """(shift, prefix, n): n keys have key >> shift >= prefix, at least k and few more."""
    prefix = above = 0
    for shift, width in _DIGITS:
        counts = scan.counts(shift, width, prefix).flip(0)
        totals = counts.cumsum(0)
        place = int(torch.searchsorted(totals, k - above))
        num_candidates = above + int(totals[place])
        above = num_candidates - int(counts[place])
        prefix = prefix << width | (1 << width) - 1 - place
        if num_candidates <= max(2 * k, _MIN_CANDIDATES):
            return shift, prefix, num_candidates
    assert num_candidates == k, "no two keys are equal"
    return 0, prefix, k


class _Scan:
    """Passes over the tiles of a gradient."""

    def __init__(
        self,
        runner: Runner,
        x: Tensor,
        dy: Tensor,
        row_ptr: Tensor,
        cols: Tensor,
        geometry: ConvGeometry,
    ) -> None:
        self._runner, self._x, self._dy = runner, x, dy
        numbers = sizes(geometry, x.shape[3], (x.shape[1], x.shape[2]), x.device)
        self._arrays = x, dy, row_ptr, cols, numbers
        across = blocks_of(geometry.row_length, _SIDE)
        down = blocks_of(geometry.out_channels // geometry.groups, _SIDE)
        self._blocks = geometry.groups * across * down

    def counts(self, shift: int, width: int, prefix: int) -> Tensor:
        """How many keys begin with `prefix`, by their next digit: int64 [2^width], on the CPU."""
        histogram = self._x.new_zeros(_BINS + 1, dtype=torch.int32)
        self._launch(shift, width, prefix, False, histogram, None, None)
        found = histogram.cpu().long()
        if found[_BINS]:
            raise MaskError(f"{int(found[_BINS])} gradients are NaN; has training diverged?")
        return found[: 1 << width]

    def selected(self, shift: int, prefix: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys (int64) and gradients of those with key >> shift >= prefix, in no order."""
        written = self._x.new_zeros(1, dtype=torch.int32)
        keys = self._x.new_empty(count, dtype=torch.int64)
        gradients = self._x.new_empty(count, dtype=torch.float32)
        self._launch(shift, 0, prefix, True, written, keys, gradients)
        return keys, gradients

    def _launch(
        self,
        shift: int,
        width: int,
        prefix: int,
        emit: bool,
        histogram: Tensor,
        keys: Tensor | None,
        gradients: Tensor | None,
    ) -> None:
        self._runner.launch(
            "topk", "topk_grad", self._blocks, *self._arrays, shift, width, prefix, emit,
            histogram, keys, gradients, 0 if keys is None else keys.numel(), real=self._x.dtype,
        )  # fmt: skip
