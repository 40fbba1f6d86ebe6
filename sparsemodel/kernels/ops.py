"""The raw operators `torch.ops.sparsemodel.*`: schema, kernel and shape rule of each.

They know nothing of gradients (sparsemodel.kernels.functional does) and expect arguments that
fit. `dense` asks for the plain-torch kernel through the dense weight; the native library serves
the rest, in the batch-innermost layout. Inputs in another are converted here too, since under
torch.compile the strides that a caller saw need not be the real ones.
"""
# ruff: noqa: PLR0917 - kernels take their arrays by position, in the library's order

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparsemodel.kernels import native, reference
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
    """Register an operator and return its callable form."""
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsemodel::{name}", shapes, lib=_LIBRARY)
    return getattr(torch.ops.sparsemodel, name).default


def _linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    dense: bool,
) -> Tensor:
    if dense:
        return reference.linear(x, values, bias, row_ptr, cols)
    y = empty_features_first(x, (*x.shape[:-1], row_ptr.numel() - 1))
    native.linear(features_first(x), values, bias, row_ptr, cols, y)
    return y


def _linear_shapes(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    dense: bool,
) -> Tensor:
    if dense:
        return reference.linear(x, values, bias, row_ptr, cols)
    return empty_features_first(x, (*x.shape[:-1], row_ptr.numel() - 1))


def _linear_input_grad(
    dy: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    transposed: Tensor,
    in_features: int,
    dense: bool,
) -> Tensor:
    if dense:
        return reference.linear_input_grad(dy, values, row_ptr, cols, in_features)
    dx = empty_features_first(dy, (*dy.shape[:-1], in_features))
    native.linear_input_grad(features_first(dy), values, row_ptr, cols, transposed, dx)
    return dx


def _linear_input_grad_shapes(
    dy: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    transposed: Tensor,
    in_features: int,
    dense: bool,
) -> Tensor:
    if dense:
        return reference.linear_input_grad(dy, values, row_ptr, cols, in_features)
    return empty_features_first(dy, (*dy.shape[:-1], in_features))


def _linear_weight_grad(
    x: Tensor, dy: Tensor, row_ptr: Tensor, cols: Tensor, bias: bool, dense: bool
) -> tuple[Tensor, Tensor]:
    if dense:
        gradient = reference.linear_weight_grad(x, dy, row_ptr, cols)
        return gradient, dy.reshape(-1, dy.shape[-1]).sum(0) if bias else dy.new_empty(0)
    dvalues, dbias = _linear_weight_grad_shapes(x, dy, row_ptr, cols, bias, dense)
    native.linear_weight_grad(features_first(x), features_first(dy), row_ptr, cols, dvalues, dbias)
    return dvalues, dbias


def _linear_weight_grad_shapes(
    x: Tensor, dy: Tensor, row_ptr: Tensor, cols: Tensor, bias: bool, dense: bool
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(cols.numel()), dy.new_empty(dy.shape[-1] if bias else 0)


def _conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    geometry: Sequence[int],
    dense: bool,
) -> Tensor:
    g = ConvGeometry(*geometry)
    if dense:
        return reference.conv2d(x, values, bias, row_ptr, cols, g)
    y = empty_batch_innermost(x, x.shape[0], g.out_channels, *_output_size(x, g))
    native.conv2d(batch_innermost(x), values, bias, row_ptr, cols, g, y)
    return y


def _conv2d_shapes(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    geometry: Sequence[int],
    dense: bool,
) -> Tensor:
    g = ConvGeometry(*geometry)
    if dense:
        return reference.conv2d(x, values, bias, row_ptr, cols, g)
    return empty_batch_innermost(x, x.shape[0], g.out_channels, *_output_size(x, g))


def _conv2d_input_grad(
    dy: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    transposed: Tensor,
    geometry: Sequence[int],
    height: int,
    width: int,
    dense: bool,
) -> Tensor:
    g = ConvGeometry(*geometry)
    if dense:
        return reference.conv2d_input_grad(dy, values, row_ptr, cols, g, (height, width))
    dx = empty_batch_innermost(dy, dy.shape[0], g.in_channels, height, width)
    native.conv2d_input_grad(batch_innermost(dy), values, row_ptr, cols, transposed, g, dx)
    return dx


def _conv2d_input_grad_shapes(
    dy: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    transposed: Tensor,
    geometry: Sequence[int],
    height: int,
    width: int,
    dense: bool,
) -> Tensor:
    g = ConvGeometry(*geometry)
    if dense:
        return reference.conv2d_input_grad(dy, values, row_ptr, cols, g, (height, width))
    return empty_batch_innermost(dy, dy.shape[0], g.in_channels, height, width)


def _conv2d_weight_grad(
    x: Tensor,
    dy: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    geometry: Sequence[int],
    bias: bool,
    dense: bool,
) -> tuple[Tensor, Tensor]:
    g = ConvGeometry(*geometry)
    if dense:
        gradient = reference.conv2d_weight_grad(x, dy, row_ptr, cols, g)
        return gradient, dy.sum((0, 2, 3)) if bias else dy.new_empty(0)
    dvalues, dbias = _conv2d_weight_grad_shapes(x, dy, row_ptr, cols, geometry, bias, dense)
    native.conv2d_weight_grad(
        batch_innermost(x), batch_innermost(dy), row_ptr, cols, g, dvalues, dbias
    )
    return dvalues, dbias


def _conv2d_weight_grad_shapes(
    x: Tensor,
    dy: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    geometry: Sequence[int],
    bias: bool,
    dense: bool,
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(cols.numel()), dy.new_empty(dy.shape[1] if bias else 0)


def _linear_topk_grad(
    x: Tensor, dy: Tensor, row_ptr: Tensor, cols: Tensor, k: int, dense: bool
) -> tuple[Tensor, Tensor]:
    if dense:
        return reference.linear_topk_grad(x, dy, row_ptr, cols, k)
    return native.linear_topk_grad(features_first(x), features_first(dy), row_ptr, cols, k)


def _linear_topk_grad_shapes(
    x: Tensor, dy: Tensor, row_ptr: Tensor, cols: Tensor, k: int, dense: bool
) -> tuple[Tensor, Tensor]:
    return _entries(min(k, x.shape[-1] * dy.shape[-1] - cols.numel()))


def _conv2d_topk_grad(
    x: Tensor,
    dy: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    geometry: Sequence[int],
    k: int,
    dense: bool,
) -> tuple[Tensor, Tensor]:
    g = ConvGeometry(*geometry)
    if dense:
        return reference.conv2d_topk_grad(x, dy, row_ptr, cols, g, k)
    return native.conv2d_topk_grad(batch_innermost(x), batch_innermost(dy), row_ptr, cols, g, k)


def _conv2d_topk_grad_shapes(
    x: Tensor,
    dy: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    geometry: Sequence[int],
    k: int,
    dense: bool,
) -> tuple[Tensor, Tensor]:
    g = ConvGeometry(*geometry)
    return _entries(min(k, g.out_channels * g.row_length - cols.numel()))


def _entries(count: int) -> tuple[Tensor, Tensor]:
    """Indices and values of top-K growth, which are on the CPU wherever the layer is."""
    return (
        torch.empty(count, dtype=torch.int64, device="cpu"),
        torch.empty(count, dtype=torch.float32, device="cpu"),
    )


def _output_size(x: Tensor, g: ConvGeometry) -> tuple[int, int]:
    return g.output_size(x.shape[2], x.shape[3])


linear = _define(
    "linear",
    "(Tensor x, Tensor values, Tensor? bias, Tensor row_ptr, Tensor cols, bool dense) -> Tensor",
    _linear,
    _linear_shapes,
)
linear_input_grad = _define(
    "linear_input_grad",
    "(Tensor dy, Tensor values, Tensor row_ptr, Tensor cols, Tensor transposed, "
    "SymInt in_features, bool dense) -> Tensor",
    _linear_input_grad,
    _linear_input_grad_shapes,
)
linear_weight_grad = _define(
    "linear_weight_grad",
    "(Tensor x, Tensor dy, Tensor row_ptr, Tensor cols, bool bias, bool dense) -> (Tensor, Tensor)",
    _linear_weight_grad,
    _linear_weight_grad_shapes,
)
linear_topk_grad = _define(
    "linear_topk_grad",
    "(Tensor x, Tensor dy, Tensor row_ptr, Tensor cols, int k, bool dense) -> (Tensor, Tensor)",
    _linear_topk_grad,
    _linear_topk_grad_shapes,
)
conv2d = _define(
    "conv2d",
    "(Tensor x, Tensor values, Tensor? bias, Tensor row_ptr, Tensor cols, int[] geometry, "
    "bool dense) -> Tensor",
    _conv2d,
    _conv2d_shapes,
)
conv2d_input_grad = _define(
    "conv2d_input_grad",
    "(Tensor dy, Tensor values, Tensor row_ptr, Tensor cols, Tensor transposed, int[] geometry, "
    "SymInt height, SymInt width, bool dense) -> Tensor",
    _conv2d_input_grad,
    _conv2d_input_grad_shapes,
)
conv2d_weight_grad = _define(
    "conv2d_weight_grad",
    "(Tensor x, Tensor dy, Tensor row_ptr, Tensor cols, int[] geometry, bool bias, bool dense) "
    "-> (Tensor, Tensor)",
    _conv2d_weight_grad,
    _conv2d_weight_grad_shapes,
)
conv2d_topk_grad = _define(
    "conv2d_topk_grad",
    "(Tensor x, Tensor dy, Tensor row_ptr, Tensor cols, int[] geometry, int k, bool dense) "
    "-> (Tensor, Tensor)",
    _conv2d_topk_grad,
    _conv2d_topk_grad_shapes,
)
