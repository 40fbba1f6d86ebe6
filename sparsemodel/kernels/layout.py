"""Moving activations between torch's layouts and the batch-innermost one; no-ops where in place.

The functions change storage order alone: shape and values stay.
"""

from __future__ import annotations

import torch

from sparsemodel.kernels import native
from sparsemodel.kernels.geometry import (
    empty_batch_innermost,
    empty_features_first,
    is_batch_innermost,
    is_features_first,
)


def batch_innermost(x: torch.Tensor) -> torch.Tensor:
    """The tensor [B, C, H, W], stored as contiguous [C, H, W, B]."""
    if is_batch_innermost(x):
        return x
    if native.reaches(x) and x.is_contiguous():
        y = empty_batch_innermost(x, *x.shape)
        native.transpose(x, y, x.shape[0], x.numel() // max(1, x.shape[0]))
        return y
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def contiguous_nchw(x: torch.Tensor) -> torch.Tensor:
    """The tensor [B, C, H, W] in a layout that torch's convolutions take without a copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    if native.reaches(x) and is_batch_innermost(x):
        y = x.new_empty(x.shape)
        native.transpose(x, y, x.numel() // max(1, x.shape[0]), x.shape[0])
        return y
    return x.contiguous()


def features_first(x: torch.Tensor) -> torch.Tensor:
    """The tensor [*, F], stored as contiguous [F, *]."""
    if is_features_first(x):
        return x
    if native.reaches(x) and x.is_contiguous():
        y = empty_features_first(x, tuple(x.shape))
        native.transpose(x, y, x.numel() // max(1, x.shape[-1]), x.shape[-1])
        return y
    return x.movedim(-1, 0).contiguous().movedim(0, -1)
