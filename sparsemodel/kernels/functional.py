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
from torch.nn import functional

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels import native, ops, reference
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.kernels.layout import batch_innermost, contiguous_nchw, features_first
from sparsemodel.pattern import flat_positions

Tensor = torch.Tensor


class SparseIndex(NamedTuple):
    """Where a layer's values stand: CSR by output, the native index by input, flat indices.

    `transposed` is there (not empty) where native kernels can run, `flat` (int64 [nnz]) where
    dense kernels have run.
    """

    row_ptr: Tensor
    cols: Tensor
    transposed: Tensor
    flat: Tensor

    @classmethod
    def build(
        cls, row_ptr: Tensor, cols: Tensor, geometry: ConvGeometry, *, sparse: bool = True
    ) -> SparseIndex:
        """The index of a checked pattern; of what `sparse` kernels alone read, only if asked."""
        transposed = torch.empty(0, dtype=torch.int32, device=cols.device)
        if sparse and cols.device.type == "cpu" and native.loaded():
            transposed = native.transpose_pattern(row_ptr, cols, geometry)
        return cls(row_ptr, cols, transposed, cols.new_empty(0, dtype=torch.int64))

    def with_positions(self, row_length: int) -> SparseIndex:
        """The same with `flat`, which dense kernels read."""
        if self.flat.numel() == self.cols.numel():
            return self
        return self._replace(flat=flat_positions(self.row_ptr, self.cols, row_length))


def sparse_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: SparseIndex,
    geometry: ConvGeometry,
    *,
    dense: bool = False,
) -> Tensor:
    """x · Wᵀ + bias with a sparse W.

    Args:
        x: [*, in]; any layout. Stored features first ([in, *]) it is not copied.
        values: [nnz], the active weights.
        bias: [out] or None.
        index: the pattern.
        geometry: that of a 1×1 convolution, `ConvGeometry(out, in, 1, 1)`.
        dense: compute through the dense weight, in torch's layout.

    Returns:
        [*, out], stored features first unless computed densely.

    Raises:
        SparseModelError: dtypes or devices that differ, or a shape that does not fit.
    """
    _check_alike(x, values, index)
    _check_weights(values, bias, index, geometry)
    _check_width(x, geometry.in_channels)
    differentiable = _differentiable(x, values, bias)
    y: Tensor
    if dense or not _native(values, index):
        out_features, in_features = index.row_ptr.numel() - 1, x.shape[-1]
        if values.numel() == out_features * in_features:
            return functional.linear(x, values.view(out_features, in_features), bias)
        flat = index.with_positions(in_features).flat
        call = _DenseLinear.apply if differentiable else reference.linear
        y = call(x, values, bias, flat, out_features)
    elif differentiable:
        y = _Linear.apply(x, values, bias, index.row_ptr, index.cols, index.transposed)
    else:
        y = ops.linear(features_first(x), values, bias, index.row_ptr, index.cols)
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
    _check_weights(values, bias, index, geometry)
    _check_planes(x, geometry.in_channels)
    if min(geometry.output_size(x.shape[2], x.shape[3])) < 1:
        raise SparseModelError(
            f"a {geometry.kernel_h}×{geometry.kernel_w} window does not fit the padded input of "
            f"shape {tuple(x.shape)}"
        )
    differentiable = _differentiable(x, values, bias)
    y: Tensor
    if dense or not _native(values, index):
        if values.numel() == geometry.out_channels * geometry.row_length and x.is_contiguous():
            weight, g = values.view(geometry.weight_shape), geometry
            return functional.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)
        flat = index.with_positions(geometry.row_length).flat
        if differentiable:
            y = _DenseConv2d.apply(x, values, bias, flat, geometry)
        else:
            y = reference.conv2d(contiguous_nchw(x), values, bias, flat, geometry)
    elif differentiable:
        y = _Conv2d.apply(x, values, bias, index.row_ptr, index.cols, index.transposed, geometry)
    else:
        y = ops.conv2d(batch_innermost(x), values, bias, index.row_ptr, index.cols, geometry)
    return y


def linear_topk_grad(
    x: Tensor, dy: Tensor, index: SparseIndex, geometry: ConvGeometry, k: int
) -> tuple[Tensor, Tensor]:
    """The k weight gradients of `sparse_linear` of largest magnitude outside the mask.

    The dense gradient is never made: memory is a tile and O(k). Of equal magnitudes the lower
    flat index wins.

    Args:
        x: the layer's input, [*, in].
        dy: its output's gradient, [*, out].
        index: the pattern.
        geometry: as in `sparse_linear`.
        k: how many to keep, >= 0.

    Returns:
        Flat indices into the dense weight (int64, ascending) and gradients (float32), min(k,
        pruned weights) of each, on the CPU.

    Raises:
        MaskError: a gradient is NaN.
        SparseModelError: dtypes or devices that differ, or a shape that does not fit.
    """
    _check_alike(x, dy, index)
    _check_width(x, geometry.in_channels)
    _check_width(dy, geometry.out_channels)
    if not _native(dy, index):
        return reference.linear_topk_grad(x, dy, index.row_ptr, index.cols, k)
    indices, values = ops.linear_topk_grad(x, dy, index.row_ptr, index.cols, k)
    return indices, values


def conv2d_topk_grad(
    x: Tensor, dy: Tensor, index: SparseIndex, geometry: ConvGeometry, k: int
) -> tuple[Tensor, Tensor]:
    """As `linear_topk_grad`, for `sparse_conv2d`: x [B, in, H, W], dy [B, out, OH, OW]."""
    _check_alike(x, dy, index)
    _check_planes(x, geometry.in_channels)
    _check_planes(dy, geometry.out_channels)
    if not _native(dy, index):
        return reference.conv2d_topk_grad(x, dy, index.row_ptr, index.cols, geometry, k)
    indices, values = ops.conv2d_topk_grad(x, dy, index.row_ptr, index.cols, geometry, k)
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
    ) -> Tensor:
        x = features_first(x)
        y: Tensor = ops.linear(x, values, bias, row_ptr, cols)
        kept = x if values.requires_grad else None
        ctx.save_for_backward(kept, values, row_ptr, cols, transposed)
        ctx.in_features = x.shape[-1]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, row_ptr, cols, transposed = ctx.saved_tensors
        wanted = _wanted(ctx)
        dx, dvalues, dbias = ops.linear_backward(
            dy, x, values, row_ptr, cols, transposed, ctx.in_features, wanted
        )
        if ctx.needs_input_grad[2] and not wanted[2]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        return (*_given(ctx, dx, dvalues, dbias), None, None, None)


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        flat: Tensor,
        out_features: int,
    ) -> Tensor:
        ctx.save_for_backward(x, values, flat)
        return reference.linear(x, values, bias, flat, out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, flat = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        return (*reference.linear_backward(dy, x, values, flat, wanted), None, None)


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
    ) -> Tensor:
        x = batch_innermost(x)
        y: Tensor = ops.conv2d(x, values, bias, row_ptr, cols, geometry)
        kept = x if values.requires_grad else None
        ctx.save_for_backward(kept, values, row_ptr, cols, transposed)
        ctx.geometry, ctx.size = geometry, x.shape[2:]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, row_ptr, cols, transposed = ctx.saved_tensors
        wanted = _wanted(ctx)
        dx, dvalues, dbias = ops.conv2d_backward(
            dy, x, values, row_ptr, cols, transposed, ctx.geometry, ctx.size, wanted
        )
        if ctx.needs_input_grad[2] and not wanted[2]:
            dbias = dy.sum((0, 2, 3))
        return (*_given(ctx, dx, dvalues, dbias), None, None, None, None)


class _DenseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        flat: Tensor,
        geometry: ConvGeometry,
    ) -> Tensor:
        x = contiguous_nchw(x)
        ctx.save_for_backward(x, values, flat)
        ctx.geometry = geometry
        return reference.conv2d(x, values, bias, flat, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, flat = ctx.saved_tensors
        gradients = reference.conv2d_backward(
            contiguous_nchw(dy), x, values, flat, ctx.geometry, ctx.needs_input_grad[:3]
        )
        return (*gradients, None, None)


def _wanted(ctx: Any) -> tuple[bool, bool, bool]:
    """Which gradients to ask of a kernel; it gives the bias's only beside the values'."""
    dx, dvalues, dbias = ctx.needs_input_grad[:3]
    return dx, dvalues, dvalues and dbias


def _given(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that autograd asked for, None for the others."""
    needs = ctx.needs_input_grad
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=False))


def _differentiable(x: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    """Whether a call has to be recorded for gradients."""
    return torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    )


def _native(values: Tensor, index: SparseIndex) -> bool:
    """Whether native kernels take this; the index by input exists where the library does."""
    known = values.dtype == torch.float32 and values.device.type == "cpu"
    return known and index.transposed.numel() > 0


def _check_width(x: Tensor, width: int) -> None:
    if x.dim() == 0 or x.shape[-1] != width:
        raise SparseModelError(f"expected a tensor [*, {width}], got {tuple(x.shape)}")


def _check_planes(x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise SparseModelError(f"expected a tensor [B, {channels}, H, W], got {tuple(x.shape)}")


def _check_weights(
    values: Tensor, bias: Tensor | None, index: SparseIndex, geometry: ConvGeometry
) -> None:
    if values.shape != index.cols.shape:
        raise SparseModelError(
            f"expected {index.cols.numel()} values, as the pattern has, got {tuple(values.shape)}"
        )
    if bias is not None and (
        bias.numel() != geometry.out_channels
        or bias.dtype != values.dtype
        or bias.device != values.device
    ):
        raise SparseModelError(
            f"expected a bias of {geometry.out_channels} {values.dtype} numbers on "
            f"{values.device}, got {tuple(bias.shape)}, {bias.dtype} on {bias.device}"
        )


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
