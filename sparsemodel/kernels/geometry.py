"""Shapes of a convolution, and the batch-innermost layout in which sparse kernels work."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ConvGeometry(NamedTuple):
    """The numbers that define a 2-D convolution apart from its input's size and its weights."""

    out_channels: int
    in_channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int = 1
    stride_w: int = 1
    padding_h: int = 0
    padding_w: int = 0
    dilation_h: int = 1
    dilation_w: int = 1
    groups: int = 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the dense weight: [out, in/groups, kh, kw]."""
        group_width = self.in_channels // self.groups
        return self.out_channels, group_width, self.kernel_h, self.kernel_w

    @property
    def row_length(self) -> int:
        """Number of weights, active or pruned, of one output channel."""
        return self.in_channels // self.groups * self.kernel_h * self.kernel_w

    @property
    def stride(self) -> tuple[int, int]:
        """Step of the window, (h, w)."""
        return self.stride_h, self.stride_w

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros around the input, (h, w)."""
        return self.padding_h, self.padding_w

    @property
    def dilation(self) -> tuple[int, int]:
        """Distance of neighbouring window entries, (h, w)."""
        return self.dilation_h, self.dilation_w

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output; below 1 where the window does not fit the input."""
        reach_h = self.dilation_h * (self.kernel_h - 1) + 1
        reach_w = self.dilation_w * (self.kernel_w - 1) + 1
        return (
            (height + 2 * self.padding_h - reach_h) // self.stride_h + 1,
            (width + 2 * self.padding_w - reach_w) // self.stride_w + 1,
        )


def is_batch_innermost(x: torch.Tensor) -> bool:
    """Whether a logical [B, C, H, W] tensor is stored as contiguous [C, H, W, B]."""
    return x.permute(1, 2, 3, 0).is_contiguous()


def is_features_first(x: torch.Tensor) -> bool:
    """Whether a logical [*, F] tensor is stored as contiguous [F, *]."""
    return x.movedim(-1, 0).is_contiguous()


def empty_batch_innermost(
    like: torch.Tensor, batch: int, channels: int, height: int, width: int
) -> torch.Tensor:
    """An uninitialised logical [B, C, H, W] tensor stored as [C, H, W, B]; no view."""
    strides = 1, height * width * batch, width * batch, batch
    return like.new_empty_strided((batch, channels, height, width), strides)


def empty_features_first(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialised logical [*, F] tensor stored as [F, *]; no view."""
    strides, step = [0] * len(shape), 1
    for i in (*range(len(shape) - 2, -1, -1), len(shape) - 1):
        strides[i], step = step, step * shape[i]
    return like.new_empty_strided(shape, strides)
