"""The operators `torch.ops.sparsemodel.*`: schema, native kernel and shape rule of each.

They know nothing of gradients (sparsemodel.kernels.functional does) and expect float32 tensors on
the CPU that fit. Inputs in another layout than the batch-innermost one are converted here, too,
since under torch.compile the strides that a caller saw need not be the real ones.
"""

# ruff: noqa: PLR0917 - kernels take their arrays by position, in the library's order

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparsemodel.kernels.cpu import native
from sparsemodel.kernels.geometry import (
    ConvGeometry,
    empty_batch_innermost,
    empty_features_first,
)
from sparsemodel.kernels.layout import batch_innermost, features_first

Tensor = torch.Tensor

# The definitions live as long as this object.
_LIBRARY = torch.library.Library("sparsemodel", "DEF")


def _define(name: str, schema: str, kernel: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    """Register an operator and return what calls it."""
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"sparsemodel::{name}", shapes, lib=_LIBRARY)
    operator = getattr(torch.ops.sparsemodel, name).default

    def call(first: Tensor, *rest: Any) -> Any:
        # The dispatcher costs more than a small layer; only traced and fake tensors need it.
        return kernel(first, *rest) if native.reaches(first) else operator(first, *rest)

    return call


def _linear(
    x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, cols: Tensor
) -> Tensor:
    y = _linear_shapes(x, values, bias, row_ptr, cols)
    native.linear(features_first(x), values, bias, row_ptr, cols, y)
    return y


def _linear_shapes(
    x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, cols: Tensor
) -> Tensor:
    return empty_features_first(x, (*x.shape[:-1], row_ptr.numel() - 1))


def _linear_backward(
    dy: Tensor,
    x: Tensor | None,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    transposed: Tensor,
    in_features: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _linear_backward_shapes(
        dy, x, values, row_ptr, cols, transposed, in_features, wanted
    )
    dy, x = features_first(dy), None if x is None else features_first(x)
    native.linear_backward(dy, x, values, row_ptr, cols, transposed, in_features, *gradients)
    return gradients


def _linear_backward_shapes(
    dy: Tensor,
    x: Tensor | None,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    transposed: Tensor,
    in_features: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*dy.shape[:-1], in_features)
    return (
        empty_features_first(dy, shape) if wanted[0] else dy.new_empty(0),
        dy.new_empty(cols.numel() if wanted[1] else 0),
        dy.new_empty(dy.shape[-1] if wanted[2] else 0),
    )


def _conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    geometry: Sequence[int],
) -> Tensor:
    y = _conv2d_shapes(x, values, bias, row_ptr, cols, geometry)
    g = _geometry(geometry)
    native.conv2d(batch_innermost(x), values, bias, row_ptr, cols, g, y)
    return y


def _conv2d_shapes(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    geometry: Sequence[int],
) -> Tensor:
    g = _geometry(geometry)
    size = g.output_size(x.shape[2], x.shape[3])
    return empty_batch_innermost(x, x.shape[0], g.out_channels, *size)


def _conv2d_backward(
    dy: Tensor,
    x: Tensor | None,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    transposed: Tensor,
    geometry: Sequence[int],
    size: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _conv2d_backward_shapes(
        dy, x, values, row_ptr, cols, transposed, geometry, size, wanted
    )
    dy, x = batch_innermost(dy), None if x is None else batch_innermost(x)
    g, (height, width) = _geometry(geometry), size
    native.conv2d_backward(dy, x, values, row_ptr, cols, transposed, g, (height, width), *gradients)
    return gradients


def _conv2d_backward_shapes(
    dy: Tensor,
    x: Tensor | None,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    transposed: Tensor,
    geometry: Sequence[int],
    size: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    in_channels = _geometry(geometry).in_channels
    return (
        empty_batch_innermost(dy, dy.shape[0], in_channels, *size)
        if wanted[0]
        else dy.new_empty(0),
        dy.new_empty(cols.numel() if wanted[1] else 0),
        dy.new_empty(dy.shape[1] if wanted[2] else 0),
    )


def _linear_topk_grad(
    x: Tensor, dy: Tensor, row_ptr: Tensor, cols: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    return native.linear_topk_grad(features_first(x), features_first(dy), row_ptr, cols, k)


def _linear_topk_grad_shapes(
    x: Tensor, dy: Tensor, row_ptr: Tensor, cols: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    return _entries(x, min(k, x.shape[-1] * dy.shape[-1] - cols.numel()))


def _conv2d_topk_grad(
    x: Tensor, dy: Tensor, row_ptr: Tensor, cols: Tensor, geometry: Sequence[int], k: int
) -> tuple[Tensor, Tensor]:
    g = _geometry(geometry)
    return native.conv2d_topk_grad(batch_innermost(x), batch_innermost(dy), row_ptr, cols, g, k)


def _conv2d_topk_grad_shapes(
    x: Tensor, dy: Tensor, row_ptr: Tensor, cols: Tensor, geometry: Sequence[int], k: int
) -> tuple[Tensor, Tensor]:
    g = _geometry(geometry)
    return _entries(x, min(k, g.out_channels * g.row_length - cols.numel()))


def _entries(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(count, dtype=torch.int64), x.new_empty(count)


def _geometry(numbers: Sequence[int]) -> ConvGeometry:
    """What the dispatcher passes on as a plain list."""
    return numbers if isinstance(numbers, ConvGeometry) else ConvGeometry(*numbers)


_INDEX = "Tensor row_ptr, Tensor cols, Tensor transposed"

linear = _define(
    "linear",
    "(Tensor x, Tensor values, Tensor? bias, Tensor row_ptr, Tensor cols) -> Tensor",
    _linear,
    _linear_shapes,
)
# Gradients for input, values and bias; those that are not wanted have no elements.
linear_backward = _define(
    "linear_backward",
    f"(Tensor dy, Tensor? x, Tensor values, {_INDEX}, SymInt in_features, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    _linear_backward,
    _linear_backward_shapes,
)
linear_topk_grad = _define(
    "linear_topk_grad",
    "(Tensor x, Tensor dy, Tensor row_ptr, Tensor cols, int k) -> (Tensor, Tensor)",
    _linear_topk_grad,
    _linear_topk_grad_shapes,
)
conv2d = _define(
    "conv2d",
    "(Tensor x, Tensor values, Tensor? bias, Tensor row_ptr, Tensor cols, int[] geometry) "
    "-> Tensor",
    _conv2d,
    _conv2d_shapes,
)
conv2d_backward = _define(
    "conv2d_backward",
    f"(Tensor dy, Tensor? x, Tensor values, {_INDEX}, int[] geometry, SymInt[2] size, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _conv2d_backward,
    _conv2d_backward_shapes,
)
conv2d_topk_grad = _define(
    "conv2d_topk_grad",
    "(Tensor x, Tensor dy, Tensor row_ptr, Tensor cols, int[] geometry, int k) -> (Tensor, Tensor)",
    _conv2d_topk_grad,
    _conv2d_topk_grad_shapes,
)
