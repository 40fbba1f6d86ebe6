"""Moving activations between torch's layouts and the batch-innermost one; no-ops where in place.

The functions change storage order alone: shape and values stay.
"""

from __future__ import annotations

import torch

from sparsemodel.kernels.cpu import native
from sparsemodel.kernels.geometry import (
    ConvGeometry,
    empty_batch_innermost,
    empty_features_first,
    is_batch_innermost,
    is_features_first,
)

# So many activations are worth moving from torch's own layout to channels last.
MIN_MOVED = 1 << 20


def batch_innermost(x: torch.Tensor) -> torch.Tensor:
    """The tensor [B, C, H, W], stored as contiguous [C, H, W, B]."""
    if is_batch_innermost(x):
        return x
    if native.reaches(x) and x.is_contiguous():
        y = empty_batch_innermost(x, *x.shape)
        native.transpose(x, y, x.shape[0], x.numel() // max(1, x.shape[0]))
        return y
    if native.reaches(x) and _is_channels_last(x):
        y = empty_batch_innermost(x, *x.shape)
        native.transpose_planes(_pixels(x), _pixels(y))
        return y
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def contiguous_nchw(x: torch.Tensor) -> torch.Tensor:
    """The tensor [B, C, H, W], stored as it reads."""
    if x.is_contiguous():
        return x
    if native.reaches(x) and is_batch_innermost(x):
        y = x.new_empty(x.shape)
        native.transpose(x, y, x.numel() // max(1, x.shape[0]), x.shape[0])
        return y
    if native.reaches(x) and _is_channels_last(x):
        y = x.new_empty(x.shape)
        native.transpose_planes(x.flatten(2).transpose(1, 2), y.flatten(2).transpose(1, 2))
        return y
    return x.contiguous()


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """The tensor [B, C, H, W], stored as contiguous [B, H, W, C]."""
    if _is_channels_last(x) or not native.reaches(x):
        return x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    if x.is_contiguous():
        native.transpose_planes(x.flatten(2), y.flatten(2))
    elif is_batch_innermost(x):
        native.transpose_planes(_pixels(x).transpose(1, 2), _pixels(y).transpose(1, 2))
    else:
        y.copy_(x)
    return y


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W], batch innermost or channels last, as a view [H · W, B, C]."""
    return x.permute(2, 3, 0, 1).flatten(0, 1)


def for_dense_conv(x: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """The tensor [B, C, H, W] in the layout in which torch's convolution with it is fastest.

    Where activations outweigh weights that is channels last, by up to a quarter on processors
    with AVX-512. From torch's own layout only large activations gain more than the move costs.
    """
    if not _is_usual(x, geometry):
        return _as_nchw(x)
    if _is_channels_last(x):
        return x
    num_weights = geometry.out_channels * geometry.row_length
    if x.numel() < (MIN_MOVED if x.is_contiguous() else num_weights):
        return contiguous_nchw(x)
    return channels_last(x)


def as_stored(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`x` channels last or as it reads, whichever `other` is."""
    return _as_nchw(x) if other.is_contiguous() or _of_one(x) else channels_last(x)


def _is_usual(x: torch.Tensor, g: ConvGeometry) -> bool:
    """Whether torch's convolution takes it channels last.

    Version 2.14 crashes there on some dilated windows, windows beyond the plane and dimensions of
    size one; plain windows inside the plane are what networks have. The weight gradient of a
    strided 1 × 1 convolution of fewer channels than a register holds writes past its buffer
    (oneDNN's issue 6035).
    """
    height, width = x.shape[2:]
    inside = g.kernel_h <= height and g.kernel_w <= width
    padded = g.padding_h < g.kernel_h and g.padding_w < g.kernel_w
    pointwise = g.kernel_h == g.kernel_w == 1
    overrun = pointwise and g.stride != (1, 1) and g.in_channels // g.groups < 16
    plain = g.dilation == (1, 1) and inside and padded and not overrun
    return plain and min(x.shape[1:]) > 1


def _of_one(x: torch.Tensor) -> bool:
    """Whether both layouts are the same memory: one channel, or one pixel."""
    return x.shape[1] == 1 or x.shape[2] * x.shape[3] == 1


def _as_nchw(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, and with such strides also in dimensions of size one, which torch goes by."""
    x = contiguous_nchw(x)
    _, channels, height, width = x.shape
    pixels = height * width
    return x.as_strided(x.shape, (channels * pixels, pixels, width, 1))


def features_first(x: torch.Tensor) -> torch.Tensor:
    """The tensor [*, F], stored as contiguous [F, *]."""
    if is_features_first(x):
        return x
    if native.reaches(x) and x.is_contiguous():
        y = empty_features_first(x, tuple(x.shape))
        native.transpose(x, y, x.numel() // max(1, x.shape[-1]), x.shape[-1])
        return y
    return x.movedim(-1, 0).contiguous().movedim(0, -1)
