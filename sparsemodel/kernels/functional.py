"""Differentiable sparse layers as functions of tensors, checked and brought into layout.

`dense` picks the plain-torch kernel through the dense weight; where native kernels cannot run
(another device or dtype, they are not there, or convolutions on a GPU) that kernel is used whatever
`dense` says.
Gradients of gradients are not offered.
"""
# ruff: noqa: PLR0917 - kernels take their arrays by position, in the library's order

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels import ops, reference
from sparsemodel.kernels.choice import MAX_FEW_ROWS
from sparsemodel.kernels.cpu import native
from sparsemodel.kernels.csr import flat_positions
from sparsemodel.kernels.cuda import launch as cuda
from sparsemodel.kernels.cuda import layer_ops as cuda_ops
from sparsemodel.kernels.cuda import source as cuda_source
from sparsemodel.kernels.geometry import ConvGeometry
from sparsemodel.kernels.layout import (
    MIN_MOVED,
    as_stored,
    batch_innermost,
    features_first,
    for_dense_conv,
)

Tensor = torch.Tensor


class SparseIndex(NamedTuple):
    """Where a layer's values stand: CSR by output, the native index by input, a bit a weight.

    `transposed` is there (not empty) where native sparse kernels can run, `bits` (int16 [out,
    ceil(row length / 16)]) where the native library has computed through the dense weight.
    """

    row_ptr: Tensor
    cols: Tensor
    transposed: Tensor
    bits: Tensor

    @classmethod
    def build(
        cls, row_ptr: Tensor, cols: Tensor, geometry: ConvGeometry, *, sparse: bool = True
    ) -> SparseIndex:
        """The index of a checked pattern; of what `sparse` kernels alone read, only if asked.

        On a GPU those of linear layers.
        """
        transposed = torch.empty(0, dtype=torch.int32, device=cols.device)
        if sparse and cols.device.type == "cpu" and native.loaded():
            transposed = native.transpose_pattern(row_ptr, cols, geometry)
        elif sparse and cuda.runner(cols.device) is not None:
            transposed = cuda_ops.transposed_index(row_ptr, cols, geometry.in_channels)
        return cls(row_ptr, cols, transposed, cols.new_empty(0, dtype=torch.int16))

    def with_bits(self, row_length: int) -> SparseIndex:
        """The same with `bits`, where the native library can make them."""
        if self.bits.numel() or not native.reaches_pattern(self.cols):
            return self
        return self._replace(bits=native.pattern_bits(self.row_ptr, self.cols, row_length))


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
        return _dense_linear(x, values, bias, index, differentiable)
    if differentiable:
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
    if dense or x.is_cuda or not _native(values, index):
        return _dense_conv2d(x, values, bias, index, geometry, differentiable)
    if differentiable:
        y = _Conv2d.apply(x, values, bias, index.row_ptr, index.cols, index.transposed, geometry)
    else:
        y = ops.conv2d(batch_innermost(x), values, bias, index.row_ptr, index.cols, geometry)
    return y


def linear_topk_grad(
    x: Tensor, dy: Tensor, index: SparseIndex, geometry: ConvGeometry, k: int
) -> tuple[Tensor, Tensor]:
    """The k weight gradients of `sparse_linear` of largest magnitude outside the mask.

    The dense gradient is never made: memory is a tile and O(k), on a GPU tiles of torch's own
    products. Of equal magnitudes the lower flat index wins.

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
    if dy.is_cuda or not _native(dy, index):
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
    if dy.is_cuda or not _native(dy, index):
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


def _dense_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, index: SparseIndex, differentiable: bool
) -> Tensor:
    """Through the dense weight; of few rows, without ever making it."""
    shape = index.row_ptr.numel() - 1, x.shape[-1]
    if values.numel() == shape[0] * shape[1]:
        return functional.linear(x, values.view(shape), bias)
    few = x.numel() <= MAX_FEW_ROWS * shape[1] and native.reaches(x)
    index = index.with_bits(shape[1])
    y: Tensor
    if few:
        call = _FewLinear.apply if differentiable else native.linear_few
        y = call(x.contiguous(), values, bias, index.row_ptr, index.bits)
    elif differentiable:
        y = _DenseLinear.apply(x, values, bias, index.row_ptr, index.cols, index.bits)
    else:
        y = reference.linear(x, _weight(values, index, shape), bias)
    return y


class _FewLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        row_ptr: Tensor,
        bits: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, values, row_ptr, bits)
        return native.linear_few(x, values, bias, row_ptr, bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, row_ptr, bits = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        gradients = native.linear_few_backward(dy.contiguous(), x, values, row_ptr, bits, wanted)
        return (*gradients, None, None)


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        row_ptr: Tensor,
        cols: Tensor,
        bits: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, values, row_ptr, cols, bits)
        index = SparseIndex(row_ptr, cols, cols, bits)
        shape = row_ptr.numel() - 1, x.shape[-1]
        return reference.linear(x, _weight(values, index, shape), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, row_ptr, cols, bits = ctx.saved_tensors
        index = SparseIndex(row_ptr, cols, cols, bits)
        wanted = ctx.needs_input_grad[:3]
        weight = _weight(values, index, (dy.shape[-1], x.shape[-1])) if wanted[0] else None
        dx, gradient, dbias = reference.linear_backward(dy, x, weight, wanted)
        return dx, _at_mask(gradient, index), dbias, None, None, None


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


def _dense_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: SparseIndex,
    geometry: ConvGeometry,
    differentiable: bool,
) -> Tensor:
    """Through the dense weight, made for the call."""
    num_weights = geometry.out_channels * geometry.row_length
    if values.numel() == num_weights and x.is_contiguous() and x.numel() < MIN_MOVED:
        return reference.conv2d(x, values.view(geometry.weight_shape), bias, geometry)
    index = index.with_bits(geometry.row_length)
    if differentiable:
        y: Tensor = _DenseConv2d.apply(
            x, values, bias, index.row_ptr, index.cols, index.bits, geometry
        )
        return y
    weight = _weight(values, index, geometry.weight_shape)
    return reference.conv2d(for_dense_conv(x, geometry), weight, bias, geometry)


class _DenseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        row_ptr: Tensor,
        cols: Tensor,
        bits: Tensor,
        geometry: ConvGeometry,
    ) -> Tensor:
        x = for_dense_conv(x, geometry)
        ctx.save_for_backward(x, values, row_ptr, cols, bits)
        ctx.geometry = geometry
        index = SparseIndex(row_ptr, cols, cols, bits)
        return reference.conv2d(x, _weight(values, index, geometry.weight_shape), bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, row_ptr, cols, bits = ctx.saved_tensors
        index = SparseIndex(row_ptr, cols, cols, bits)
        wanted, shape = ctx.needs_input_grad[:3], ctx.geometry.weight_shape
        # For the weight's gradient alone, only the weight's shape matters.
        weight = _weight(values, index, shape) if wanted[0] else dy.new_empty(1).expand(shape)
        dy = as_stored(dy, x)
        dx, gradient, dbias = reference.conv2d_backward(dy, x, weight, ctx.geometry, wanted)
        return dx, _at_mask(gradient, index), dbias, None, None, None, None


def _weight(values: Tensor, index: SparseIndex, shape: tuple[int, ...]) -> Tensor:
    """The dense weight; a view of the values where none is pruned."""
    if values.numel() == math.prod(shape):
        return values.view(shape)
    if index.bits.numel() and native.reaches(values):
        return native.dense_weight(values, index.row_ptr, index.bits, shape)
    return reference.csr_weight(values, index.row_ptr, index.cols, shape)


def _at_mask(gradient: Tensor | None, index: SparseIndex) -> Tensor | None:
    """A dense weight's gradient at the active places."""
    if gradient is None or gradient.numel() == index.cols.numel():
        return None if gradient is None else gradient.reshape(-1)
    if index.bits.numel() and native.reaches(gradient):
        return native.active_values(gradient.contiguous(), index.row_ptr, index.cols, index.bits)
    row_length = math.prod(gradient.shape[1:])
    return gradient.reshape(-1).index_select(
        0, flat_positions(index.row_ptr, index.cols, row_length)
    )


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
    if values.device.type == "cuda":
        known = values.dtype in cuda_source.REALS
    else:
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
    if values.numel() != index.cols.numel() or values.dim() != 1:
        raise SparseModelError(
            f"expected {index.cols.numel()} values, as the pattern has, got {tuple(values.shape)}"
        )
    if bias is not None and (
        bias.numel() != geometry.out_channels
        or bias.dtype != values.dtype
        or not _together(bias, values)
    ):
        raise SparseModelError(
            f"expected a bias of {geometry.out_channels} {values.dtype} numbers on "
            f"{values.device}, got {tuple(bias.shape)}, {bias.dtype} on {bias.device}"
        )


def _together(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are on one device; quick on the CPU, where layers may be tiny."""
    return (a.is_cpu and b.is_cpu) or a.device == b.device


def _check_alike(x: Tensor, values: Tensor, index: SparseIndex) -> None:
    if x.dtype != values.dtype:
        raise SparseModelError(
            f"the input is {x.dtype}, the layer's values {values.dtype}; convert one of them "
            "(x.to(dtype) or layer.to(dtype))"
        )
    if not (_together(x, values) and _together(values, index.cols)):
        raise SparseModelError(
            f"the input is on {x.device}, the values on {values.device}, the pattern on "
            f"{index.cols.device}; move them to one device"
        )
