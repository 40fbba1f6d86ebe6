"""Linear layers' operators `torch.ops.sparsemodel.*` on GPUs: CUDA kernels and the reference.

sparsemodel.kernels.ops defines them. Where the kernels are not to be had (see
kernels.cuda.launch) or do not know the dtype, they compute by the reference in plain torch.
Convolutions have none: tensor cores on a dense weight made for the call are 5 to 30 times as fast.
"""
# ruff: noqa: PLR0917 - operators take their arrays by position, in the library's order

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsemodel.kernels import ops as _definitions  # noqa: F401 - what is implemented here
from sparsemodel.kernels import reference
from sparsemodel.kernels.csr import flat_positions
from sparsemodel.kernels.cuda import launch as cuda
from sparsemodel.kernels.cuda import linear as cuda_linear
from sparsemodel.kernels.cuda import measured
from sparsemodel.kernels.geometry import empty_features_first
from sparsemodel.kernels.layout import features_first

Tensor = torch.Tensor
Gradients = tuple[Tensor, Tensor, Tensor]

# The implementations live as long as this object.
_LIBRARY = torch.library.Library("sparsemodel", "FRAGMENT")


def linear(x: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, cols: Tensor) -> Tensor:
    """x · Wᵀ + bias: [*, in] -> [*, out], stored features first."""
    runner, x = cuda.runner_for(x), features_first(x)
    y = empty_features_first(x, (*x.shape[:-1], row_ptr.numel() - 1))
    if runner is not None:
        cuda_linear.forward(runner, _flat(x), values, bias, row_ptr, cols, _flat(y))
        return y
    weight = reference.csr_weight(values, row_ptr, cols, (y.shape[-1], x.shape[-1]))
    return y.copy_(reference.linear(x, weight, bias))


def linear_backward(
    dy: Tensor,
    x: Tensor | None,
    values: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    transposed: Tensor,
    in_features: int,
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients for input, values and bias; those that are not wanted have no elements."""
    runner, dy = cuda.runner_for(dy), features_first(dy)
    dx, dvalues, dbias = (dy.new_empty(0) for _ in range(3))
    if wanted[0]:
        dx = empty_features_first(dy, (*dy.shape[:-1], in_features))
        if runner is None:
            weight = reference.csr_weight(values, row_ptr, cols, (dy.shape[-1], in_features))
            dx.copy_(dy.matmul(weight))
        else:
            index = cuda_linear.Transposed.split(transposed, cols.numel())
            cuda_linear.input_gradient(runner, _flat(dy), values, index, _flat(dx))
    if wanted[1]:
        assert x is not None, "the values' gradient needs the input"
        flat_x, flat_dy = _flat(features_first(x)), _flat(dy)
        if runner is not None and _at_the_mask_alone(flat_dy, in_features, cols.numel()):
            dvalues = cuda_linear.weight_gradient(runner, flat_dy, flat_x, row_ptr, cols)
        else:
            dense = flat_dy.matmul(flat_x.t())
            dvalues = dense.reshape(-1)[flat_positions(row_ptr, cols, in_features)]
    if wanted[2]:
        dbias = _flat(dy).sum(1)
    return dx, dvalues, dbias


def _at_the_mask_alone(dy: Tensor, in_features: int, nnz: int) -> bool:
    """Whether the dense gradient would take too much memory, or longer than the kernel."""
    weights = len(dy) * in_features
    return weights > measured.MAX_DENSE_GRADIENT or measured.sparse_is_faster(
        "gradient at the mask", dy, weights=weights, nnz=nnz, rows=dy.shape[1]
    )


def transposed_index(row_ptr: Tensor, cols: Tensor, in_features: int) -> Tensor:
    """The pattern by input that the gradient of the input reads: int32, one vector."""
    return cuda_linear.transpose(row_ptr, cols, in_features).joined()


def _flat(x: Tensor) -> Tensor:
    """[*, F] stored features first -> a view [F, B]."""
    return x.movedim(-1, 0).view(x.shape[-1], -1) if x.numel() else x.new_empty(_flat_shape(x))


def _flat_shape(x: Tensor) -> tuple[int, int]:
    return x.shape[-1], x.shape[:-1].numel()


_LIBRARY.impl("linear", linear, "CUDA")
_LIBRARY.impl("linear_backward", linear_backward, "CUDA")
