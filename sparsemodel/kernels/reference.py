"""Sparse kernels and optimiser steps in plain torch: any device, floating-point type and layout.

Forward and gradients go through the dense weight, made for the call and freed after it, so a
reference kernel costs what the dense layer costs.
"""
# ruff: noqa: PLR0917 - kernels take their arrays by position, in the library's order

from __future__ import annotations

import math

import torch
from torch.nn import functional

from sparsemodel.kernels.csr import flat_positions
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.masks.adjust import TensorEntries, TopKBuffer

# A gradient tile of top-K growth holds about this many coordinates. On a GPU a product must be
# large to be fast; 64 MiB of float32 are.
TILE_COORDINATES = 1 << 18
GPU_TILE_COORDINATES = 1 << 24

# Whether the gradients for input, weight and bias are asked for, and those gradients.
Wanted = tuple[bool, bool, bool]
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def csr_weight(
    values: torch.Tensor, row_ptr: torch.Tensor, cols: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """`dense_weight` of a CSR pattern of the weight's rows, flattened."""
    return dense_weight(values, flat_positions(row_ptr, cols, math.prod(shape[1:])), shape)


def dense_weight(values: torch.Tensor, flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight of shape `shape` with `values` at its flat indices `flat` (int64, ascending).

    Zeros are at its pruned places; where none is pruned it is a view, and `flat` not looked at.
    """
    numel = math.prod(shape)
    if values.numel() == numel:
        return values.view(shape)
    return values.new_zeros(numel).scatter(0, flat, values).view(shape)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[*, in] -> [*, out]."""
    if x.dim() == 2:
        return functional.linear(x, weight, bias)
    # Here what functional.linear returns may be a view, which autograd would let nobody change.
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows_x, rows_y = x.reshape(-1, x.shape[-1]), y.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows_x, weight.t(), out=rows_y)
    else:
        torch.addmm(bias, rows_x, weight.t(), out=rows_y)
    return y


def linear_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, wanted: Wanted
) -> Gradients:
    """Gradients of `linear` for input, weight and bias, those that are wanted."""
    dx = gradient = dbias = None
    rows_dy = dy.reshape(-1, dy.shape[-1])
    if wanted[0] and weight is not None:
        dx = rows_dy.mm(weight).view(x.shape)
    if wanted[1]:
        gradient = rows_dy.t().mm(x.reshape(-1, x.shape[-1]))
    if wanted[2]:
        dbias = rows_dy.sum(0)
    return dx, gradient, dbias


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: ConvGeometry
) -> torch.Tensor:
    """[B, in, H, W] -> [B, out, OH, OW]."""
    g = geometry
    return functional.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def conv2d_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    geometry: ConvGeometry,
    wanted: Wanted,
) -> Gradients:
    """Gradients of `conv2d` for input, weight and bias, those that are wanted."""
    dx, gradient, dbias = _conv_backward(dy, x, weight, geometry, wanted)
    return (
        dx if wanted[0] else None,
        gradient if wanted[1] else None,
        dbias if wanted[2] else None,
    )


def linear_topk_grad(
    x: torch.Tensor, dy: torch.Tensor, row_ptr: torch.Tensor, cols: torch.Tensor, k: int
) -> TensorEntries:
    """The k weight gradients of `linear` of largest magnitude outside the mask.

    Output features are taken a tile at a time, so no dense gradient is made. Of equal magnitudes
    the lower flat index wins.

    Returns:
        Flat indices (int64, ascending) and gradients (float32), on the CPU.
    """
    rows_x, rows_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    buffer = TopKBuffer(k)
    for start, stop in _tiles(dy.shape[-1], x.shape[-1], dy.device):
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
) -> TensorEntries:
    """As `linear_topk_grad`, for `conv2d`."""
    buffer = TopKBuffer(k)
    in_width = geometry.in_channels // geometry.groups
    out_width = geometry.out_channels // geometry.groups
    for group in range(geometry.groups):
        x_group = x[:, group * in_width : (group + 1) * in_width]
        for start, stop in _tiles(out_width, geometry.row_length, dy.device):
            first, last = group * out_width + start, group * out_width + stop
            part = geometry._replace(out_channels=stop - start, in_channels=in_width, groups=1)
            weight = dy.new_empty(1).expand(part.weight_shape)
            tile = _conv_backward(dy[:, first:last], x_group, weight, part, (False, True, False))[1]
            _offer(buffer, tile, row_ptr, cols, first)
    return buffer.entries()


def _conv_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    geometry: ConvGeometry,
    wanted: Wanted,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a dense convolution for input, weight and bias, those that are wanted."""
    g = geometry
    dx, dw, db = torch.ops.aten.convolution_backward.default(
        dy, x, weight, [g.out_channels], g.stride, g.padding, g.dilation, False, (0, 0), g.groups,
        wanted,
    )  # fmt: skip
    return dx, dw, db


def sgd_step(
    values: torch.Tensor,
    gradient: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One step of torch.optim.SGD, in place."""
    if weight_decay:
        gradient = gradient.add(values, alpha=weight_decay)
    if momentum_buffer is not None:
        gradient = momentum_buffer.mul_(momentum).add_(gradient)
    values.add_(gradient, alpha=-lr)


def adam_step(
    values: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: int,
) -> None:
    """Step number `step` (from 1) of torch.optim.Adam, or AdamW where `decoupled`, in place."""
    if weight_decay and decoupled:
        values.mul_(1 - lr * weight_decay)
    elif weight_decay:
        gradient = gradient.add(values, alpha=weight_decay)
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    divisor = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    values.addcdiv_(mean, divisor, value=-lr / (1 - beta1**step))


def _tiles(num_rows: int, row_length: int, device: torch.device) -> list[tuple[int, int]]:
    """Ranges of rows that hold about a tile's coordinates each, at least one row."""
    coordinates = GPU_TILE_COORDINATES if device.type == "cuda" else TILE_COORDINATES
    height = max(1, coordinates // max(1, row_length))
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
