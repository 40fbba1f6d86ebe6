"""Sparse convolution by the kernels of conv.cu, batch innermost: x is [C, H, W, B].

The functions take checked tensors on the runner's device, contiguous in that order and of one
dtype (float32, bfloat16 or float16; sums are float32). Each result is added in one order: a
second call gives the same bits.
"""
# ruff: noqa: PLR0917 - kernels take their arrays by position

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels.csr import MAX_ENTRIES
from sparsemodel.kernels.cuda.launch import Runner, blocks_of
from sparsemodel.kernels.geometry import ConvGeometry

Tensor = torch.Tensor

_FAMILY = "conv"
_ROWS_OF_BLOCK = 8  # as in conv.cu: warps of a block,
_TILE = 128  # places of a warp,
_ENTRIES_OF_BLOCK = 32  # and non-zeros of a block in conv_weight and conv_square_norms,
_SAMPLES_OF_BLOCK = 32  # which has so many samples


class Transposed(NamedTuple):
    """The pattern by input: CSR whose rows are (input channel, window entry), all int32.

    `cols` is the output channel of each entry, `order` where its value stands.
    """

    row_ptr: Tensor
    cols: Tensor
    order: Tensor

    def joined(self) -> Tensor:
        """All of it as one vector, cols then order then row_ptr: what layers keep."""
        return torch.cat([self.cols, self.order, self.row_ptr])

    @classmethod
    def split(cls, joined: Tensor, nnz: int) -> Transposed:
        """What `joined` made of `nnz` entries, as views."""
        return cls(joined[2 * nnz :], joined[:nnz], joined[nnz : 2 * nnz])


def transpose(row_ptr: Tensor, cols: Tensor, geometry: ConvGeometry) -> Transposed:
    """The pattern by input; output channels ascend in each row."""
    g = geometry
    rows = torch.repeat_interleave(row_ptr.diff(), output_size=cols.numel())
    t_rows = rows // (g.out_channels // g.groups) * g.row_length + cols
    order = torch.argsort(t_rows, stable=True)
    num_rows = g.groups * g.row_length
    t_row_ptr = torch.zeros(num_rows + 1, dtype=torch.int32, device=cols.device)
    t_row_ptr[1:] = torch.bincount(t_rows, minlength=num_rows).cumsum(0)
    return Transposed(t_row_ptr, rows[order].to(torch.int32), order.to(torch.int32))


@functools.lru_cache(maxsize=1024)
def sizes(
    geometry: ConvGeometry, batch: int, size: tuple[int, int], device: torch.device
) -> Tensor:
    """The sizes of a call on inputs of `size` (h, w), in the order of geometry.cuh: int32.

    Raises:
        SparseModelError: a channel of the batch has 2³¹ places or more.
    """
    g = geometry
    places = batch * max(math.prod(size), math.prod(g.output_size(*size)))
    if places > MAX_ENTRIES:
        raise SparseModelError(
            f"a batch of {batch} planes of {size} has {places:,} places a channel, more than int32 "
            "counts; split the batch"
        )
    numbers = (
        batch, g.in_channels, g.out_channels, *size, *g.output_size(*size), g.kernel_h, g.kernel_w,
        g.stride_h, g.stride_w, g.padding_h, g.padding_w, g.dilation_h, g.dilation_w, g.groups,
    )  # fmt: skip
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def forward(
    runner: Runner,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    geometry: ConvGeometry,
    y: Tensor,
) -> None:
    """Write the convolution into `y`: [in, H, W, B] -> [out, OH, OW, B]."""
    size, batch = (x.shape[1], x.shape[2]), x.shape[3]
    blocks = blocks_of(geometry.out_channels, _ROWS_OF_BLOCK) * blocks_of(y[0].numel(), _TILE)
    runner.launch(
        _FAMILY, "conv_forward", blocks, row_ptr, cols, values, bias, x, y,
        sizes(geometry, batch, size, x.device), real=x.dtype,
    )  # fmt: skip


def input_gradient(
    runner: Runner,
    dy: Tensor,
    values: Tensor,
    transposed: Transposed,
    geometry: ConvGeometry,
    dx: Tensor,
) -> None:
    """Write the input's gradient into `dx`: [out, OH, OW, B] -> [in, H, W, B]."""
    size = dx.shape[1], dx.shape[2]
    blocks = blocks_of(geometry.in_channels, _ROWS_OF_BLOCK) * blocks_of(dx[0].numel(), _TILE)
    runner.launch(
        _FAMILY, "conv_input", blocks, transposed.row_ptr, transposed.cols, transposed.order,
        values, dy, dx, sizes(geometry, dy.shape[3], size, dy.device), real=dy.dtype,
    )  # fmt: skip


def weight_gradient(
    runner: Runner, dy: Tensor, x: Tensor, row_ptr: Tensor, cols: Tensor, geometry: ConvGeometry
) -> Tensor:
    """The weight's gradient at the mask: [nnz], in the dtype of `dy`."""
    gradient = dy.new_empty(cols.numel())
    size = x.shape[1], x.shape[2]
    runner.launch(
        _FAMILY, "conv_weight", blocks_of(cols.numel(), _ENTRIES_OF_BLOCK), row_ptr, cols, dy, x,
        gradient, cols.numel(), sizes(geometry, x.shape[3], size, x.device), real=dy.dtype,
    )  # fmt: skip
    return gradient


def square_norms(
    runner: Runner, dy: Tensor, x: Tensor, row_ptr: Tensor, cols: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Squared norm of each sample's weight gradient at the mask: float32 [B]."""
    batch, size = x.shape[3], (x.shape[1], x.shape[2])
    chunks = blocks_of(cols.numel(), _ENTRIES_OF_BLOCK)
    parts = dy.new_empty((chunks, batch), dtype=torch.float32)
    runner.launch(
        _FAMILY, "conv_square_norms", chunks * blocks_of(batch, _SAMPLES_OF_BLOCK), row_ptr, cols,
        dy, x, parts, cols.numel(), sizes(geometry, batch, size, x.device), real=dy.dtype,
    )  # fmt: skip
    return parts.sum(0)
