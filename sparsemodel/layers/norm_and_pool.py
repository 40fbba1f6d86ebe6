"""torch's batch norm and pooling modules, working in the layout of sparse layers.

Each class takes the place of the torch class that it derives from: same parameters, buffers,
state and results, up to rounding. Where the native kernels cannot run (another device or dtype,
inside torch.compile, gradients in eval mode) they are torch's modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsemodel.kernels.batch_norm import batch_norm_infer, batch_norm_train
from sparsemodel.kernels.cpu import native
from sparsemodel.kernels.pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d

Tensor = torch.Tensor


class FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that can add a residual and cut below zero in the same pass."""

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu(batch_norm(x) + residual); [B, C, H, W] -> the same shape.

        Args:
            input: [B, C, H, W].
            residual: of the same shape, or None.
            relu: whether to cut below zero.
        """
        if not self._fusable(input, residual):
            y = super().forward(input)
            y = y if residual is None else y + residual
            return torch.relu(y) if relu else y
        weight, bias = self.weight, self.bias
        mean, var = self.running_mean, self.running_var
        if not self.training and mean is not None and var is not None:
            return batch_norm_infer(
                input, weight, bias, residual, mean, var, eps=self.eps, relu=relu
            )
        if not self.training:
            mean = var = None  # nothing is tracked, in eval mode either
        return batch_norm_train(
            input,
            weight,
            bias,
            residual,
            mean,
            var,
            momentum=self._next_momentum(),
            eps=self.eps,
            relu=relu,
        )

    def _next_momentum(self) -> float:
        """Count the batch; how far the running statistics move towards it."""
        if not self.training or self.num_batches_tracked is None:
            return 0.0 if self.momentum is None else self.momentum
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # cumulative mean
            return 1.0 / float(self.num_batches_tracked)
        return self.momentum

    def _fusable(self, x: Tensor, residual: Tensor | None) -> bool:
        own = (self.weight, self.bias, self.running_mean, self.running_var)
        if x.dim() != 4 or x.shape[1] != self.num_features or not native.reaches(x):
            return False
        if residual is not None and (residual.shape != x.shape or not native.reaches(residual)):
            return False
        if any(t is not None and not (native.runs(t) and t.is_contiguous()) for t in own):
            return False
        if self.training or self.running_mean is None:
            return x.numel() > self.num_features  # of one value there is no variance
        differentiates = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, residual, self.weight, self.bias)
        )
        return not differentiates


class FusedMaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d without a change of layout."""

    def forward(self, input: Tensor) -> Any:
        """[B, C, H, W] -> [B, C, OH, OW]."""
        return max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class FusedAvgPool2d(nn.AvgPool2d):
    """nn.AvgPool2d without a change of layout."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, OH, OW]."""
        return avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class FusedAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d; to one pixel without a change of layout."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, *output_size]."""
        return adaptive_avg_pool2d(input, self.output_size)


# The class that takes the place of each of torch's.
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.MaxPool2d: FusedMaxPool2d,
    nn.AvgPool2d: FusedAvgPool2d,
    nn.AdaptiveAvgPool2d: FusedAdaptiveAvgPool2d,
}
