"""Sparse kernels in plain torch: any device, any floating-point type, any layout.

Forward and gradients go through the dense weight, made for the call and freed after it, so a
reference kernel costs what the dense layer costs. Patterns are CSR rows of the weight flattened
to [out, row_length]; `values` are in the same row-major order.
"""
# ruff: noqa: PLR0917 - kernels take their arrays by position, in the library's order

from __future__ import annotations

import math

import torch
from torch.nn import functional

from sparsemodel.adjust import Entries, TopKBuffer
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.pattern import flat_positions

# A gradient tile of top-K growth holds about this many coordinates.
TILE_COORDINATES = 1 << 18


def dense_weight(
    values: torch.Tensor, row_ptr: torch.Tensor, cols: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """The weight with zeros at its pruned places, of shape `shape`; a view where none is pruned."""
    numel = math.prod(shape)
    if values.numel() == numel:
        return values.view(shape)
    flat = flat_positions(row_ptr, cols, numel // shape[0])
    return values.new_zeros(numel).index_copy_(0, flat, values).view(shape)


def active_values(weight: torch.Tensor, row_ptr: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """The entries of a dense weight or gradient at the active places: [nnz]."""
    if cols.numel() == weight.numel():
        return weight.reshape(-1)
    flat = flat_positions(row_ptr, cols, weight.numel() // weight.shape[0])
    return weight.reshape(-1).index_select(0, flat)


def linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    row_ptr: torch.Tensor,
    cols: torch.Tensor,
) -> torch.Tensor:
    """[*, in] -> [*, out]."""
    weight = dense_weight(values, row_ptr, cols, (len(row_ptr) - 1, x.shape[-1])).t()
    # Not functional.linear: what it returns may be a view, which autograd would let nobody change.
    y = x.new_empty(*x.shape[:-1], weight.shape[1])
    rows_x, rows_y = x.reshape(-1, x.shape[-1]), y.view(-1, weight.shape[1])
    if bias is None:
        torch.mm(rows_x, weight, out=rows_y)
    else:
        torch.addmm(bias, rows_x, weight, out=rows_y)
    return y


def linear_input_grad(
    dy: torch.Tensor,
    values: torch.Tensor,
    row_ptr: torch.Tensor,
    cols: torch.Tensor,
    in_features: int,
) -> torch.Tensor:
    """Gradient of `linear` for its input: [*, out] -> [*, in]."""
    return dy.matmul(dense_weight(values, row_ptr, cols, (dy.shape[-1], in_features)))


def linear_weight_grad(
    x: torch.Tensor, dy: torch.Tensor, row_ptr: torch.Tensor, cols: torch.Tensor
) -> torch.Tensor:
    """Gradient of `linear` for its values: [nnz]."""
    rows_x, rows_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return active_values(rows_dy.t().matmul(rows_x), row_ptr, cols)


def conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    row_ptr: torch.Tensor,
    cols: torch.Tensor,
    geometry: ConvGeometry,
) -> torch.Tensor:
    """[B, in, H, W] -> [B, out, OH, OW]."""
    g = geometry
    weight = dense_weight(values, row_ptr, cols, g.weight_shape)
    return functional.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def conv2d_input_grad(
    dy: torch.Tensor,
    values: torch.Tensor,
    row_ptr: torch.Tensor,
    cols: torch.Tensor,
    geometry: ConvGeometry,
    input_size: tuple[int, int],
) -> torch.Tensor:
    """Gradient of `conv2d` for its input of height and width `input_size`: [B, in, H, W]."""
    weight = dense_weight(values, row_ptr, cols, geometry.weight_shape)
    # Only the shape of the input matters here.
    x = dy.new_empty(1).expand(dy.shape[0], geometry.in_channels, *input_size)
    return _conv_backward(dy, x, weight, geometry, wanted=(True, False))[0]


def conv2d_weight_grad(
    x: torch.Tensor,
    dy: torch.Tensor,
    row_ptr: torch.Tensor,
    cols: torch.Tensor,
    geometry: ConvGeometry,
) -> torch.Tensor:
    """Gradient of `conv2d` for its values: [nnz]."""
    weight = dy.new_empty(1).expand(geometry.weight_shape)
    gradient = _conv_backward(dy, x, weight, geometry, wanted=(False, True))[1]
    return active_values(gradient, row_ptr, cols)


def linear_topk_grad(
    x: torch.Tensor, dy: torch.Tensor, row_ptr: torch.Tensor, cols: torch.Tensor, k: int
) -> Entries:
    """The k weight gradients of `linear` of largest magnitude outside the mask.

    Output features are taken a tile at a time, so no dense gradient is made. Of equal magnitudes
    the lower flat index wins.

    Returns:
        Flat indices (int64, ascending) and gradients (float32), on the CPU.
    """
    rows_x, rows_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    buffer = TopKBuffer(k)
    for start, stop in _tiles(dy.shape[-1], x.shape[-1]):
        tile = rows_dy[:, start:stop].t().matmul(rows_x)
        _offer(buffer, tile, row_ptr, cols, start)
    return buffer.entries()


def conv2d_topk_grad(
    x: torch.Tensor,
    dy: torch.Tensor,
    row_ptr: torch.Tensor,
    cols: torch.Tensor,
    geometry: ConvGeometry,
    k: int,
) -> Entries:
    """As `linear_topk_grad`, for `conv2d`."""
    buffer = TopKBuffer(k)
    in_width = geometry.in_channels // geometry.groups
    out_width = geometry.out_channels // geometry.groups
    for group in range(geometry.groups):
        x_group = x[:, group * in_width : (group + 1) * in_width]
        for start, stop in _tiles(out_width, geometry.row_length):
            first, last = group * out_width + start, group * out_width + stop
            part = geometry._replace(out_channels=stop - start, in_channels=in_width, groups=1)
            weight = dy.new_empty(1).expand(part.weight_shape)
            tile = _conv_backward(dy[:, first:last], x_group, weight, part, (False, True))[1]
            _offer(buffer, tile, row_ptr, cols, first)
    return buffer.entries()


def _conv_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    geometry: ConvGeometry,
    wanted: tuple[bool, bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a dense convolution for input and weight, those that are `wanted`."""
    g = geometry
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups,
        (*wanted, False),
    )  # fmt: skip
    return dx, dw


def _tiles(num_rows: int, row_length: int) -> list[tuple[int, int]]:
    """Ranges of rows that hold about TILE_COORDINATES coordinates each, at least one row."""
    height = max(1, TILE_COORDINATES // max(1, row_length))
    return [(start, min(start + height, num_rows)) for start in range(0, num_rows, height)]


def _offer(
    buffer: TopKBuffer, tile: torch.Tensor, row_ptr: torch.Tensor, cols: torch.Tensor, first: int
) -> None:
    """Add the pruned coordinates of the gradient of rows first, first + 1, … to `buffer`."""
    num_rows = tile.shape[0]
    bounds = row_ptr[first : first + num_rows + 1]
    begin, end = int(bounds[0]), int(bounds[-1])
    tile = tile.reshape(-1)
    row_length = tile.numel() // num_rows
    pruned = torch.ones(tile.numel(), dtype=torch.bool, device=tile.device)
    pruned[flat_positions(bounds, cols[begin:end], row_length)] = False
    places = torch.nonzero(pruned).reshape(-1)
    buffer.add(places + first * row_length, tile[places])
