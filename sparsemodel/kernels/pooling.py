"""Pooling of batch-innermost activations; other layouts go to torch's own kernels."""

# ruff: noqa: PLR0917 - functions take torch's arguments in torch's order

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sparsemodel.kernels.cpu import native
from sparsemodel.kernels.cpu.library import PoolGeometry
from sparsemodel.kernels.geometry import empty_batch_innermost, is_batch_innermost
from sparsemodel.kernels.layout import batch_innermost

Tensor = torch.Tensor
Pair = tuple[int, int]
Size = int | tuple[int, ...]
MAX_WINDOW = 256  # a window place is a byte


def max_pool2d(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """torch.nn.functional.max_pool2d in the layout of `x`: [B, C, H, W] -> [B, C, OH, OW]."""
    kernel, pad = _pair(kernel_size), _pair(padding)
    plain = _pair(dilation) == (1, 1) and not ceil_mode and not return_indices
    if plain and kernel[0] * kernel[1] <= MAX_WINDOW and _suits(x, kernel, pad):
        return _MaxPool.apply(x, kernel, _pair(stride or kernel), pad)
    torch_pool: Callable[..., Any] = functional.max_pool2d
    return torch_pool(
        x,
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode=ceil_mode,
        return_indices=return_indices,
    )


def avg_pool2d(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """torch.nn.functional.avg_pool2d in the layout of `x`: [B, C, H, W] -> [B, C, OH, OW]."""
    kernel, pad = _pair(kernel_size), _pair(padding)
    if not ceil_mode and divisor_override is None and _suits(x, kernel, pad):
        y: Tensor = _AvgPool.apply(x, kernel, _pair(stride or kernel), pad, count_include_pad)
        return y
    return functional.avg_pool2d(
        x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


def adaptive_avg_pool2d(x: Tensor, output_size: Any) -> Tensor:
    """torch.nn.functional.adaptive_avg_pool2d; to one pixel in the layout of `x`."""
    if output_size in (1, (1, 1), [1, 1]) and _in_layout(x):
        y: Tensor = _GlobalAvgPool.apply(x)
        return y
    return functional.adaptive_avg_pool2d(x, output_size)


def _in_layout(x: Tensor) -> bool:
    return x.dim() == 4 and native.reaches(x) and is_batch_innermost(x)


def _suits(x: Tensor, kernel: Pair, padding: Pair) -> bool:
    """Whether the native kernel takes this; arguments that make no sense are left to torch."""
    return _in_layout(x) and all(
        0 <= 2 * padding[i] <= kernel[i] <= x.shape[2 + i] + 2 * padding[i] for i in range(2)
    )


def _pair(number: Size) -> Pair:
    return (number, number) if isinstance(number, int) else (number[0], number[-1])


def _geometry(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> PoolGeometry:
    batch, channels, height, width = x.shape
    return PoolGeometry.pool(
        batch, channels, (height, width), kernel, stride=stride, padding=padding
    )


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
        g = _geometry(x, kernel, stride, padding)
        y = empty_batch_innermost(x, g.batch, g.channels, g.out_h, g.out_w)
        taps = torch.empty(y.numel() if x.requires_grad else 0, dtype=torch.uint8)
        native.library().maxpool_forward(
            g, x.data_ptr(), y.data_ptr(), taps.data_ptr() if x.requires_grad else None,
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(taps)
        ctx.geometry = g
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (taps,) = ctx.saved_tensors
        g, dy = ctx.geometry, batch_innermost(dy)
        dx = empty_batch_innermost(dy, g.batch, g.channels, g.in_h, g.in_w)
        native.library().maxpool_backward(
            g, taps.data_ptr(), dy.data_ptr(), dx.data_ptr(), torch.get_num_threads()
        )
        return dx, None, None, None


class _AvgPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: Pair, stride: Pair, padding: Pair, include_pad: bool
    ) -> Tensor:
        g = _geometry(x, kernel, stride, padding)
        y = empty_batch_innermost(x, g.batch, g.channels, g.out_h, g.out_w)
        native.library().avgpool_forward(
            g, include_pad, x.data_ptr(), y.data_ptr(), torch.get_num_threads()
        )
        ctx.geometry, ctx.include_pad = g, include_pad
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        g, dy = ctx.geometry, batch_innermost(dy)
        dx = empty_batch_innermost(dy, g.batch, g.channels, g.in_h, g.in_w)
        native.library().avgpool_backward(
            g, ctx.include_pad, dy.data_ptr(), dx.data_ptr(), torch.get_num_threads()
        )
        return dx, None, None, None, None


class _GlobalAvgPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        y = empty_batch_innermost(x, batch, channels, 1, 1)
        native.library().global_avgpool_forward(
            channels, height * width, batch, x.data_ptr(), y.data_ptr(), torch.get_num_threads()
        )
        ctx.shape = tuple(x.shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        batch, channels, height, width = ctx.shape
        dy = batch_innermost(dy)
        dx = empty_batch_innermost(dy, batch, channels, height, width)
        native.library().global_avgpool_backward(
            channels, height * width, batch, dy.data_ptr(), dx.data_ptr(), torch.get_num_threads()
        )
        return dx
