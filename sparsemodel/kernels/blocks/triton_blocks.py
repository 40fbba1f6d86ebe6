"""Block-sparse linear layers on tensor cores: the Triton kernels and what starts them.

A weight [out, in] is made of whole blocks of side × side. Its values stay in the order of
`weight[mask]`: a row of blocks is then `side` runs of neighbouring numbers, and a block a tile of
them with the run's length as stride, so that a layer needs no second copy and no other state.
Products are of the values' type, sums float32; each result is added up by one program in one
order, so that a second call gives the same bits.

This module needs Triton, which comes with CUDA builds of torch: import it where it is used.
"""
# ruff: noqa: PLR0917 - kernels take their arrays by position
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sparsemodel.kernels.blocks.index import BlockIndex

Tensor = torch.Tensor

# Rows of the batch that a program takes: at least what tl.dot needs. Not measured yet.
MIN_ROWS, MAX_ROWS = 16, 128


@triton.jit
def _forward(
    x, values, bias, row_ptr, cols, y, batch,
    x_row, x_col, y_row,
    side: tl.constexpr, num_rows: tl.constexpr, has_bias: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """y[rows of a tile, a row of blocks] = x · Wᵀ + bias."""
    # Batch tiles are on the first axis: the others end at 65,535.
    rows = tl.program_id(0).to(tl.int64) * num_rows + tl.arange(0, num_rows)
    block_row = tl.program_id(1)
    lane = tl.arange(0, side)
    start = tl.load(row_ptr + block_row * side)
    length = tl.load(row_ptr + block_row * side + 1) - start
    inside = rows[:, None] < batch
    x_rows = x + rows[:, None] * x_row
    # Transposed by its addresses: [column of the block, row of the block].
    tile = values + start + lane[None, :] * length + lane[:, None]
    total = tl.full((num_rows, side), 0.0, tl.float32)
    for place in range(0, length, side):
        columns = tl.load(cols + start + place).to(tl.int64) + lane
        inputs = tl.load(x_rows + columns[None, :] * x_col, mask=inside, other=0.0)
        total = tl.dot(inputs, tl.load(tile + place), total, input_precision=precision)
    outputs = block_row.to(tl.int64) * side + lane
    if has_bias:
        total += tl.load(bias + outputs)[None, :].to(tl.float32)
    target = y + rows[:, None] * y_row + outputs[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _input_gradient(
    dy, values, row_ptr, col_ptr, block_rows, starts, dx, batch,
    dy_row, dy_col, dx_row,
    side: tl.constexpr, num_rows: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """dx[rows of a tile, a column of blocks] = dy · W."""
    rows = tl.program_id(0).to(tl.int64) * num_rows + tl.arange(0, num_rows)
    block_col = tl.program_id(1)
    lane = tl.arange(0, side)
    inside = rows[:, None] < batch
    dy_rows = dy + rows[:, None] * dy_row
    total = tl.full((num_rows, side), 0.0, tl.float32)
    first = tl.load(col_ptr + block_col)
    last = tl.load(col_ptr + block_col + 1)
    for entry in range(first, last):
        row = tl.load(block_rows + entry).to(tl.int64) * side
        length = tl.load(row_ptr + row + 1) - tl.load(row_ptr + row)
        tile = values + tl.load(starts + entry) + lane[:, None] * length + lane[None, :]
        outputs = row + lane
        gradient = tl.load(dy_rows + outputs[None, :] * dy_col, mask=inside, other=0.0)
        total = tl.dot(gradient, tl.load(tile), total, input_precision=precision)
    inputs = block_col.to(tl.int64) * side + lane
    target = dx + rows[:, None] * dx_row + inputs[None, :]
    tl.store(target, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _value_gradient(
    dy, x, row_ptr, cols, block_rows, starts, dvalues, batch,
    dy_row, dy_col, x_row, x_col,
    side: tl.constexpr, num_rows: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """dW of one block = dyᵀ · x, over the whole batch."""
    entry = tl.program_id(0)
    lane = tl.arange(0, side)
    start = tl.load(starts + entry)
    row = tl.load(block_rows + entry).to(tl.int64) * side
    length = tl.load(row_ptr + row + 1) - tl.load(row_ptr + row)
    columns = tl.load(cols + start).to(tl.int64) + lane
    dy_cols = dy + (row + lane)[:, None] * dy_col
    x_cols = x + columns[None, :] * x_col
    total = tl.full((side, side), 0.0, tl.float32)
    for begin in range(0, batch, num_rows):
        rows = tl.arange(0, num_rows).to(tl.int64) + begin
        gradient = tl.load(dy_cols + rows[None, :] * dy_row, mask=rows[None, :] < batch, other=0.0)
        inputs = tl.load(x_cols + rows[:, None] * x_row, mask=rows[:, None] < batch, other=0.0)
        total = tl.dot(gradient, inputs, total, input_precision=precision)
    target = dvalues + start + lane[:, None] * length + lane[None, :]
    tl.store(target, total.to(dvalues.dtype.element_ty))


class Kernels(NamedTuple):
    """The three kernels, as `KERNELS` compiled for a GPU or by Triton's interpreter."""

    forward: Any
    input_gradient: Any
    value_gradient: Any


KERNELS = Kernels(_forward, _input_gradient, _value_gradient)


def forward(
    kernels: Kernels,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: BlockIndex,
    y: Tensor,
) -> None:
    """y [B, out], contiguous, = x [B, in], in any strides, · Wᵀ + bias."""
    batch, rows = _batch(x)
    if batch == 0 or y.shape[1] == 0:
        return
    grid = triton.cdiv(batch, rows), y.shape[1] // index.side
    kernels.forward[grid](
        x, values, values if bias is None else bias, index.row_ptr, index.cols, y, batch,
        *x.stride(), y.stride(0), side=index.side, num_rows=rows, has_bias=bias is not None,
        precision=_precision(),
    )  # fmt: skip


def input_gradient(
    kernels: Kernels, dy: Tensor, values: Tensor, index: BlockIndex, dx: Tensor
) -> None:
    """dx [B, in], contiguous, = dy [B, out], in any strides, · W."""
    batch, rows = _batch(dy)
    if batch == 0 or dx.shape[1] == 0:
        return
    grid = triton.cdiv(batch, rows), dx.shape[1] // index.side
    kernels.input_gradient[grid](
        dy, values, index.row_ptr, index.col_ptr, index.block_rows, index.starts, dx, batch,
        *dy.stride(), dx.stride(0), side=index.side, num_rows=rows, precision=_precision(),
    )  # fmt: skip


def value_gradient(
    kernels: Kernels, dy: Tensor, x: Tensor, index: BlockIndex, dvalues: Tensor
) -> None:
    """dvalues [nnz] = dyᵀ · x at the blocks; zero for a batch of none."""
    batch, rows = _batch(x)
    if len(index.starts) == 0:
        return
    kernels.value_gradient[(len(index.starts),)](
        dy, x, index.row_ptr, index.cols, index.block_rows, index.starts, dvalues, batch,
        *dy.stride(), *x.stride(), side=index.side, num_rows=min(rows, 64), precision=_precision(),
    )  # fmt: skip


def _batch(x: Tensor) -> tuple[int, int]:
    """Rows of x, and how many of them a program takes."""
    batch = x.shape[0]
    return batch, min(MAX_ROWS, max(MIN_ROWS, triton.next_power_of_2(batch)))


def _precision() -> str:
    """What tl.dot makes of float32: tf32 only where torch's own products may use it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
