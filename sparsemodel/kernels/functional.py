"""Differentiable sparse layers as functions of tensors, checked and brought into layout.

`dense` picks the plain-torch kernel through the dense weight; where the native library cannot
run (another device or dtype, or it is not there) that kernel is used whatever `dense` says.
Gradients of gradients are not offered.
"""
# ruff: noqa: PLR0917 - kernels take their arrays by position, in the library's order

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels import native, ops
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.kernels.layout import batch_innermost, contiguous_nchw, features_first

Tensor = torch.Tensor


class SparseIndex(NamedTuple):
    """Where a layer's values stand: CSR by output, and the native index by input."""

    row_ptr: Tensor
    cols: Tensor
    transposed: Tensor


def build_index(row_ptr: Tensor, cols: Tensor, geometry: ConvGeometry) -> Tensor:
    """The native index by input of a checked pattern; empty where the library cannot run."""
    if row_ptr.device.type == "cpu" and native.loaded():
        return native.transpose_pattern(row_ptr, cols, geometry)
    return torch.empty(0, dtype=torch.int32, device=row_ptr.device)


def sparse_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, index: SparseIndex, *, dense: bool = False
) -> Tensor:
    """x · Wᵀ + bias with a sparse W.

    Args:
        x: [*, in]; any layout. Stored features first ([in, *]) it is not copied.
        values: [nnz], the active weights.
        bias: [out] or None.
        index: the pattern.
        dense: compute through the dense weight, in torch's layout.

    Returns:
        [*, out], stored features first unless computed densely.

    Raises:
        SparseModelError: dtypes or devices that differ.
    """
    _check_alike(x, values, index)
    dense = dense or not _native(values, index)
    y: Tensor = _Linear.apply(x, values, bias, *index, dense)
    return y


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: SparseIndex,
    geometry: ConvGeometry,
    *,
    dense: bool = False,
) -> Tensor:
    """2-D convolution with a sparse weight.

    Args:
        x: [B, in, H, W]; any layout. Stored batch innermost ([in, H, W, B]) it is not copied.
        values: [nnz], the active weights.
        bias: [out] or None.
        index: the pattern.
        geometry: channels, kernel, stride, padding, dilation, groups.
        dense: compute through the dense weight, in torch's layout.

    Returns:
        [B, out, OH, OW], stored batch innermost unless computed densely.

    Raises:
        SparseModelError: dtypes or devices that differ, or a shape that does not fit.
    """
    _check_alike(x, values, index)
    if x.dim() != 4 or x.shape[1] != geometry.in_channels:
        raise SparseModelError(
            f"expected an input [B, {geometry.in_channels}, H, W], got {tuple(x.shape)}"
        )
    if min(geometry.output_size(x.shape[2], x.shape[3])) < 1:
        raise SparseModelError(
            f"a {geometry.kernel_h}×{geometry.kernel_w} window does not fit the padded input of "
            f"shape {tuple(x.shape)}"
        )
    dense = dense or not _native(values, index)
    y: Tensor = _Conv2d.apply(x, values, bias, *index, geometry, dense)
    return y


def linear_topk_grad(x: Tensor, dy: Tensor, index: SparseIndex, k: int) -> tuple[Tensor, Tensor]:
    """The k weight gradients of `sparse_linear` of largest magnitude outside the mask.

    The dense gradient is never made: memory is a tile and O(k). Of equal magnitudes the lower
    flat index wins.

    Args:
        x: the layer's input, [*, in].
        dy: its output's gradient, [*, out].
        index: the pattern.
        k: how many to keep, >= 0.

    Returns:
        Flat indices into the dense weight (int64, ascending) and gradients (float32), min(k,
        pruned weights) of each, on the CPU.

    Raises:
        MaskError: a gradient is NaN.
        SparseModelError: dtypes or devices that differ.
    """
    _check_alike(x, dy, index)
    dense = not _native(dy, index)
    indices, values = ops.linear_topk_grad(x, dy, index.row_ptr, index.cols, k, dense)
    return indices, values


def conv2d_topk_grad(
    x: Tensor, dy: Tensor, index: SparseIndex, geometry: ConvGeometry, k: int
) -> tuple[Tensor, Tensor]:
    """As `linear_topk_grad`, for `sparse_conv2d`: x [B, in, H, W], dy [B, out, OH, OW]."""
    _check_alike(x, dy, index)
    dense = not _native(dy, index)
    indices, values = ops.conv2d_topk_grad(x, dy, index.row_ptr, index.cols, geometry, k, dense)
    return indices, values


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        row_ptr: Tensor,
        cols: Tensor,
        transposed: Tensor,
        dense: bool,
    ) -> Tensor:
        if not dense:
            x = features_first(x)
        kept = x if values.requires_grad else None
        ctx.save_for_backward(kept, values, row_ptr, cols, transposed)
        ctx.in_features = x.shape[-1]
        ctx.dense = dense
        y: Tensor = ops.linear(x, values, bias, row_ptr, cols, dense)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, row_ptr, cols, transposed = ctx.saved_tensors
        dx = dvalues = dbias = None
        if not ctx.dense:
            dy = features_first(dy)
        if ctx.needs_input_grad[0]:
            dx = ops.linear_input_grad(
                dy, values, row_ptr, cols, transposed, ctx.in_features, ctx.dense
            )
        if ctx.needs_input_grad[1]:
            bias = ctx.needs_input_grad[2]
            dvalues, dbias = ops.linear_weight_grad(x, dy, row_ptr, cols, bias, ctx.dense)
            dbias = dbias if bias else None
        elif ctx.needs_input_grad[2]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, dvalues, dbias, None, None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        row_ptr: Tensor,
        cols: Tensor,
        transposed: Tensor,
        geometry: ConvGeometry,
        dense: bool,
    ) -> Tensor:
        x = contiguous_nchw(x) if dense else batch_innermost(x)
        kept = x if values.requires_grad else None
        ctx.save_for_backward(kept, values, row_ptr, cols, transposed)
        ctx.geometry, ctx.size = geometry, x.shape[2:]
        ctx.dense = dense
        y: Tensor = ops.conv2d(x, values, bias, row_ptr, cols, geometry, dense)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, row_ptr, cols, transposed = ctx.saved_tensors
        dx = dvalues = dbias = None
        dy = contiguous_nchw(dy) if ctx.dense else batch_innermost(dy)
        if ctx.needs_input_grad[0]:
            dx = ops.conv2d_input_grad(
                dy, values, row_ptr, cols, transposed, ctx.geometry, *ctx.size, ctx.dense
            )
        if ctx.needs_input_grad[1]:
            bias = ctx.needs_input_grad[2]
            dvalues, dbias = ops.conv2d_weight_grad(
                x, dy, row_ptr, cols, ctx.geometry, bias, ctx.dense
            )
            dbias = dbias if bias else None
        elif ctx.needs_input_grad[2]:
            dbias = dy.sum((0, 2, 3))
        return dx, dvalues, dbias, None, None, None, None, None


def _native(values: Tensor, index: SparseIndex) -> bool:
    """Whether native kernels take this; the index by input exists where the library does."""
    known = values.dtype == torch.float32 and values.device.type == "cpu"
    return known and index.transposed.numel() > 0


def _check_alike(x: Tensor, values: Tensor, index: SparseIndex) -> None:
    if x.dtype != values.dtype:
        raise SparseModelError(
            f"the input is {x.dtype}, the layer's values {values.dtype}; convert one of them "
            "(x.to(dtype) or layer.to(dtype))"
        )
    if not x.device == values.device == index.cols.device:
        raise SparseModelError(
            f"the input is on {x.device}, the values on {values.device}, the pattern on "
            f"{index.cols.device}; move them to one device"
        )
