"""2:4 linear layers through torch's semi-structured tensors, which cuSPARSELt multiplies.

The forward pass alone is sparse: the gradient for the input multiplies by Wᵀ, whose columns, not
rows, are 2:4, and the gradient for the weight is a product of dense matrices. Both are torch's
dense ones, the latter gathered at the mask.
"""
# ruff: noqa: PLR0917 - kernels take their arrays by position

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sparsemodel.errors import NativeLibraryWarning
from sparsemodel.kernels import reference
from sparsemodel.kernels.csr import flat_positions
from sparsemodel.kernels.cuda import launch as cuda

Tensor = torch.Tensor


class Compressed(NamedTuple):
    """A compressed weight and what it was made from: which values, and the pattern itself."""

    stamp: tuple[object, ...]
    cols: Tensor
    weight: Tensor


def obstacle(values: Tensor, shape: tuple[int, ...]) -> str | None:
    """Why 2:4 kernels cannot multiply these values in a weight [out, in]; None where they can."""
    if values.device.type != "cuda":
        return f"the layer is on {values.device}; they need an NVIDIA GPU"
    if not cuda.enabled():
        return f"this path has not been run on a GPU yet; {cuda.ENVIRONMENT}=on uses it"
    capability = torch.cuda.get_device_capability(values.device)
    if capability < (8, 0):
        return f"they need sm_80 or later, the GPU is sm_{capability[0]}{capability[1]}"
    if not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt; install a CUDA build of torch"
    return shape_obstacle(values.dtype, shape)


def shape_obstacle(dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """The part of `obstacle` that no device decides."""
    if dtype not in {torch.float16, torch.bfloat16}:
        return f"they take float16 and bfloat16, the values are {dtype}; call .to(torch.bfloat16)"
    limits = torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[dtype]
    multiples = limits.sparse_min_rows, limits.sparse_min_cols
    if any(n == 0 or n % multiple for n, multiple in zip(shape, multiples, strict=True)):
        return f"a weight must be a multiple of {multiples}, this one is {tuple(shape)}"
    return None


@functools.cache
def warn_once(why: str) -> None:
    """Say, once for each reason, that the reference computes a 2:4 layer."""
    warnings.warn(
        f"2:4 kernels are not used, the reference computes instead: {why}",
        NativeLibraryWarning,
        stacklevel=3,
    )


def compress(values: Tensor, row_ptr: Tensor, cols: Tensor, width: int) -> Tensor:
    """The 2:4 tensor [out, in] of a layer's values."""
    return torch.sparse.to_sparse_semi_structured(_weight(values.detach(), row_ptr, cols, width))


def refreshed(
    kept: Compressed | None, values: Tensor, row_ptr: Tensor, cols: Tensor, width: int
) -> Compressed:
    """`kept` where the values are the same as then, else made anew.

    A change that torch does not count, through `values.data`, is not seen.
    """
    stamp = values._version, values.data_ptr(), values.dtype
    if kept is not None and kept.stamp == stamp and kept.cols is cols:
        return kept
    return Compressed(stamp, cols, compress(values, row_ptr, cols, width))


def product(x: Tensor, compressed: Tensor, bias: Tensor | None) -> Tensor:
    """x [*, in] · Wᵀ + bias -> [*, out]; not differentiable."""
    y: Tensor = functional.linear(x.reshape(-1, x.shape[-1]).contiguous(), compressed, bias)
    return y.reshape(*x.shape[:-1], compressed.shape[0])


def linear(x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, cols: Tensor) -> Tensor:
    """x [*, in] · Wᵀ + bias -> [*, out], compressing W for the call; differentiable."""
    y: Tensor = _Linear.apply(x, values, bias, row_ptr, cols)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, cols: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, values, row_ptr, cols)
        return product(x, compress(values, row_ptr, cols, x.shape[-1]), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, row_ptr, cols = ctx.saved_tensors
        wanted, width = ctx.needs_input_grad[:3], x.shape[-1]
        weight = _weight(values, row_ptr, cols, width) if wanted[0] else None
        dx, gradient, dbias = reference.linear_backward(dy, x, weight, wanted)
        if gradient is not None:
            gradient = gradient.reshape(-1)[flat_positions(row_ptr, cols, width)]
        return dx, gradient, dbias, None, None


def _weight(values: Tensor, row_ptr: Tensor, cols: Tensor, width: int) -> Tensor:
    return reference.csr_weight(values, row_ptr, cols, (row_ptr.numel() - 1, width))
