"""Batch norm, addition of a residual and ReLU in one pass over batch-innermost activations."""

# ruff: noqa: PLR0917 - kernels take their arrays by position, in the library's order

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sparsemodel.kernels.cpu import native
from sparsemodel.kernels.cpu.native import address
from sparsemodel.kernels.geometry import empty_batch_innermost
from sparsemodel.kernels.layout import batch_innermost

Tensor = torch.Tensor


def batch_norm_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    """relu(normalised x · weight + bias + residual) by the batch's own statistics.

    Needs the native library and float32 on the CPU. The running statistics move by `momentum`,
    in place, as torch's. Gradients of gradients are not offered.

    Args:
        x: [B, C, H, W] of two values a channel or more; any layout.
        weight, bias: [C] or None.
        residual: of x's shape, or None.
        running_mean, running_var: [C], both or neither.

    Returns:
        [B, C, H, W], stored batch innermost.
    """
    y: Tensor = _BatchNorm.apply(
        x, weight, bias, residual, running_mean, running_var, momentum, eps, relu
    )
    return y


def batch_norm_infer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    eps: float,
    relu: bool,
) -> Tensor:
    """As `batch_norm_train`, by the running statistics and without gradients."""
    x = batch_innermost(x)
    residual = None if residual is None else batch_innermost(residual)
    y = empty_batch_innermost(x, *x.shape)
    native.library().batchnorm_infer(
        x.shape[1], x.numel() // x.shape[1], x.data_ptr(), address(residual), address(weight),
        address(bias), eps, running_mean.data_ptr(), running_var.data_ptr(), relu, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        relu: bool,
    ) -> Tensor:
        x = batch_innermost(x)
        residual = None if residual is None else batch_innermost(residual)
        channels = x.shape[1]
        y = empty_batch_innermost(x, *x.shape)
        mean, invstd = x.new_empty(channels), x.new_empty(channels)
        native.library().batchnorm_train(
            channels, x.numel() // channels, x.data_ptr(), address(residual), address(weight),
            address(bias), eps, momentum, address(running_mean), address(running_var), relu,
            y.data_ptr(), mean.data_ptr(), invstd.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        for statistics in (running_mean, running_var):
            if statistics is not None:  # autograd cannot see writes through an address
                torch.autograd.graph.increment_version(statistics)
        ctx.save_for_backward(x, weight, mean, invstd, y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, y = ctx.saved_tensors
        _, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        dy, channels = batch_innermost(dy), x.shape[1]
        dx = empty_batch_innermost(x, *x.shape)
        dweight = x.new_empty(channels) if wants_weight else None
        dbias = x.new_empty(channels) if wants_bias else None
        dresidual = None
        if wants_residual:  # without ReLU it is dy itself
            dresidual = dy if y is None else empty_batch_innermost(x, *x.shape)
        native.library().batchnorm_backward(
            channels, x.numel() // channels, x.data_ptr(), address(y), dy.data_ptr(),
            address(weight), mean.data_ptr(), invstd.data_ptr(), y is not None, dx.data_ptr(),
            address(dweight), address(dbias), None if y is None else address(dresidual),
            torch.get_num_threads(),
        )  # fmt: skip
        return dx, dweight, dbias, dresidual, None, None, None, None, None
