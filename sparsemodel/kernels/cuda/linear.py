"""Sparse linear layers by the kernels of linear.cu, features first: x is [in, B], y [out, B].

The functions take checked tensors on the runner's device, contiguous and of one dtype (float32,
bfloat16 or float16; sums are float32). Each result is added in one order: a second call gives
the same bits.
"""
# ruff: noqa: PLR0917 - kernels take their arrays by position

from __future__ import annotations

import torch

from sparsemodel.kernels.cuda.conv import Transposed
from sparsemodel.kernels.cuda.launch import Runner, blocks_of

Tensor = torch.Tensor

_FAMILY = "linear"
_ROWS_OF_BLOCK = 8  # as in linear.cu: warps of a block,
_TILE = 128  # batch entries of a warp in spmm,
_ENTRIES_OF_BLOCK = 32  # and non-zeros of a block in sddmm
_ROWS_OF_CHUNK = 16  # of a thread in square_norms


def forward(
    runner: Runner,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    y: Tensor,
) -> None:
    """Write W · x + bias into `y`: [in, B] -> [out, B]."""
    _spmm(runner, row_ptr, cols, None, values, bias, x, y)


def input_gradient(
    runner: Runner, dy: Tensor, values: Tensor, transposed: Transposed, dx: Tensor
) -> None:
    """Write Wᵀ · dy into `dx`: [out, B] -> [in, B]."""
    t = transposed
    _spmm(runner, t.row_ptr, t.cols, t.order, values, None, dy, dx)


def weight_gradient(runner: Runner, dy: Tensor, x: Tensor, row_ptr: Tensor, cols: Tensor) -> Tensor:
    """dy · xᵀ at the mask: [nnz], in the dtype of `dy`."""
    gradient = dy.new_empty(cols.numel())
    runner.launch(
        _FAMILY, "sddmm", blocks_of(cols.numel(), _ENTRIES_OF_BLOCK), row_ptr, cols, dy, x,
        gradient, row_ptr.numel() - 1, cols.numel(), dy.shape[1], real=dy.dtype,
    )  # fmt: skip
    return gradient


def square_norms(
    runner: Runner, dy: Tensor, x: Tensor, row_ptr: Tensor, cols: Tensor, *, bias: bool
) -> Tensor:
    """Squared norm of each sample's gradient at the mask, one position a sample: float32 [B].

    Source: Goodfellow, Efficient Per-Example Gradient Computations (2015), with the sum over
    inputs taken at the mask alone.

    Args:
        bias: whether the bias's gradient counts.
    """
    rows, batch = row_ptr.numel() - 1, dy.shape[1]
    chunks = blocks_of(rows, _ROWS_OF_CHUNK)
    parts = dy.new_empty((chunks, batch), dtype=torch.float32)
    runner.launch(
        _FAMILY, "square_norms", chunks * blocks_of(batch), row_ptr, cols, dy, x, parts, rows,
        batch, _ROWS_OF_CHUNK, float(bias), real=dy.dtype,
    )  # fmt: skip
    return parts.sum(0)


def _spmm(
    runner: Runner,
    row_ptr: Tensor,
    cols: Tensor,
    order: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    x: Tensor,
    y: Tensor,
) -> None:
    rows, batch = y.shape
    blocks = blocks_of(rows, _ROWS_OF_BLOCK) * blocks_of(batch, _TILE)
    runner.launch(
        _FAMILY, "spmm", blocks, row_ptr, cols, order, values, bias, x, y, rows,
        batch, real=x.dtype,
    )  # fmt: skip
