"""Sparse linear layers by the kernels of linear.cu, features first: x is [in, B], y [out, B].

The functions take checked tensors on the runner's device, contiguous and of one dtype (float32,
bfloat16 or float16; sums are float32). Each result is added in one order: a second call gives
the same bits.
"""
# ruff: noqa: PLR0917 - kernels take their arrays by position

from __future__ import annotations

from typing import NamedTuple

import torch

from sparsemodel.kernels.cuda.launch import Runner, blocks_of

Tensor = torch.Tensor

_FAMILY = "linear"
_ROWS_OF_BLOCK = 8  # as in linear.cu: warps of a block,
_TILE = 128  # batch entries of a warp in spmm,
_ENTRIES_OF_BLOCK = 32  # and non-zeros of a block in sddmm and sequence_norms,
_SAMPLES_OF_BLOCK = 32  # which has so many samples
_ROWS_OF_CHUNK = 16  # of a thread in square_norms


class Transposed(NamedTuple):
    """The pattern by input: CSR of the transposed weight, all int32.

    `cols` is the output of each entry, `order` where its value stands.
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


def transpose(row_ptr: Tensor, cols: Tensor, in_features: int) -> Transposed:
    """The pattern by input; outputs ascend in each row."""
    rows = torch.repeat_interleave(row_ptr.diff(), output_size=cols.numel())
    order = torch.argsort(cols, stable=True)
    t_row_ptr = torch.zeros(in_features + 1, dtype=torch.int32, device=cols.device)
    t_row_ptr[1:] = torch.bincount(cols, minlength=in_features).cumsum(0)
    return Transposed(t_row_ptr, rows[order].to(torch.int32), order.to(torch.int32))


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


def square_norms(runner: Runner, dy: Tensor, x: Tensor, row_ptr: Tensor, cols: Tensor) -> Tensor:
    """Squared norm of each sample's gradient at the mask, one position a sample: float32 [B].

    Source: Goodfellow, Efficient Per-Example Gradient Computations (2015), with the sum over
    inputs taken at the mask alone.
    """
    rows, batch = row_ptr.numel() - 1, dy.shape[1]
    chunks = blocks_of(rows, _ROWS_OF_CHUNK)
    parts = dy.new_empty((chunks, batch), dtype=torch.float32)
    runner.launch(
        _FAMILY, "square_norms", chunks * blocks_of(batch), row_ptr, cols, dy, x, parts, rows,
        batch, _ROWS_OF_CHUNK, real=dy.dtype,
    )  # fmt: skip
    return parts.sum(0)


def sequence_norms(runner: Runner, dy: Tensor, x: Tensor, row_ptr: Tensor, cols: Tensor) -> Tensor:
    """As `square_norms`, of T positions a sample: dy [out, T, B], x [in, T, B]."""
    rows, (_, positions, batch) = row_ptr.numel() - 1, dy.shape
    chunks = blocks_of(cols.numel(), _ENTRIES_OF_BLOCK)
    parts = dy.new_empty((chunks, batch), dtype=torch.float32)
    runner.launch(
        _FAMILY, "sequence_norms", chunks * blocks_of(batch, _SAMPLES_OF_BLOCK), row_ptr, cols,
        dy, x, parts, rows, cols.numel(), positions, batch, real=dy.dtype,
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
