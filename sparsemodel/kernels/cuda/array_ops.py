"""Operators beyond layers: optimiser steps, sums of updates, norms and losses.

`torch.ops.sparsemodel.*`, on any device: on GPUs by the CUDA kernels where those are to be had
(see sparsemodel.kernels.cuda.launch), else by the reference in plain torch. The operators take
contiguous tensors on one device and check that; only `kd_loss` is differentiable.
"""
# ruff: noqa: PLR0917 - operators take their arrays by position

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels import fixed_point, reference
from sparsemodel.kernels.cuda import arrays as cuda_arrays
from sparsemodel.kernels.cuda import launch as cuda
from sparsemodel.kernels.cuda import linear as cuda_linear
from sparsemodel.kernels.cuda import loss as cuda_loss
from sparsemodel.kernels.cuda import reference as cuda_reference

Tensor = torch.Tensor

# The definitions live as long as this object.
_LIBRARY = torch.library.Library("sparsemodel", "FRAGMENT")


def _runner(x: Tensor) -> cuda.Runner | None:
    return cuda.runner(x.device)


def _check(name: str, first: Tensor, *others: Tensor | None, like: bool = False) -> None:
    """Refuse tensors that are not contiguous or not together; `like`: of other dtype or shape."""
    for x in (first, *(other for other in others if other is not None)):
        if x.device != first.device or not x.is_contiguous():
            raise SparseModelError(
                f"{name}: expected contiguous tensors on {first.device}, got strides "
                f"{x.stride()} of shape {tuple(x.shape)} on {x.device}"
            )
        if like and (x.dtype != first.dtype or x.shape != first.shape):
            raise SparseModelError(
                f"{name}: expected {first.dtype} of shape {tuple(first.shape)}, got {x.dtype} of "
                f"shape {tuple(x.shape)}"
            )


def _check_dtype(name: str, dtype: torch.dtype, *tensors: Tensor) -> None:
    for x in tensors:
        if x.dtype != dtype:
            raise SparseModelError(f"{name}: expected {dtype}, got {x.dtype}; convert it first")


def _sgd_step(
    values: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    _check("sgd_step", values, gradient, momentum_buffer, like=True)
    runner = _runner(values) if values.dtype == torch.float32 else None
    if runner is None:
        reference.sgd_step(values, gradient, momentum_buffer, lr, momentum, weight_decay)
        return
    cuda_arrays.sgd_step(
        runner, values, gradient, momentum_buffer, lr=lr, momentum=momentum,
        weight_decay=weight_decay,
    )  # fmt: skip


def _adam_step(
    values: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: int,
) -> None:
    _check("adam_step", values, gradient, mean, square, like=True)
    runner = _runner(values) if values.dtype == torch.float32 else None
    if runner is None:
        reference.adam_step(
            values, gradient, mean, square, lr, beta1, beta2, eps, weight_decay, decoupled, step
        )
        return
    cuda_arrays.adam_step(
        runner, values, gradient, mean, square, lr=lr, betas=(beta1, beta2), eps=eps,
        weight_decay=weight_decay, decoupled=decoupled, step=step,
    )  # fmt: skip


def _fixed_add(
    high: Tensor,
    low: Tensor,
    values: Tensor,
    means: Tensor | None,
    positions: Tensor | None,
    weight: int,
    refused: Tensor,
) -> None:
    """As `fixed_point.add`, which says what is added where, and what is refused."""
    _check("fixed_add", high, low, like=True)
    _check("fixed_add", values, means, like=True)
    _check("fixed_add", high, values, positions, refused)
    _check_dtype(
        "fixed_add", torch.int64, high, refused, *([] if positions is None else [positions])
    )
    shape = values.shape if positions is None else positions.shape
    fit = positions is not None or values.numel() == high.numel()
    if not fit or values.shape != shape or refused.shape != (2,):
        raise SparseModelError(
            f"fixed_add: expected {high.numel()} values, or positions and values of one shape, and "
            f"two counts; got {tuple(values.shape)}, {tuple(shape)} and {tuple(refused.shape)}"
        )
    if abs(weight) > fixed_point.MAX_TOTAL_WEIGHT:
        raise SparseModelError(
            f"fixed_add: weight {weight} would overflow; {fixed_point.MAX_TOTAL_WEIGHT} is the most"
        )
    arrays = high, low, values, means, positions, weight, refused
    runner = _runner(high) if values.dtype == torch.float32 else None
    if runner is None:
        fixed_point.add(*arrays)
    else:
        cuda_arrays.fixed_add(runner, *arrays)


def _square_norms(dy: Tensor, x: Tensor, row_ptr: Tensor, cols: Tensor) -> Tensor:
    """Of dy [out, B] and x [in, B], or of samples of T positions, [out, T, B] and [in, T, B]."""
    _check("square_norms", dy, x, row_ptr, cols)
    _check_dtype("square_norms", dy.dtype, x)
    if dy.dim() not in {2, 3} or dy.shape[1:] != x.shape[1:] or len(dy) != row_ptr.numel() - 1:
        raise SparseModelError(
            f"square_norms: expected dy [{row_ptr.numel() - 1}, B] and x [in, B], or both with "
            f"positions [*, T, B], got {tuple(dy.shape)} and {tuple(x.shape)}"
        )
    runner = cuda.runner_for(dy)
    if runner is None:
        return cuda_reference.square_norms(dy, x, row_ptr, cols)
    norms = cuda_linear.square_norms if dy.dim() == 2 else cuda_linear.sequence_norms
    return norms(runner, dy, x, row_ptr, cols)


def _kd_loss(
    logits: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float
) -> tuple[Tensor, Tensor]:
    _check("kd_loss", logits, teacher, like=True)
    _check("kd_loss", logits, labels)
    _check_dtype("kd_loss", torch.int64, labels)
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise SparseModelError(
            f"kd_loss: expected logits [B, C] and labels [B], got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if not (0 <= alpha <= 1 and temperature > 0):
        raise SparseModelError(
            f"kd_loss: expected alpha in [0, 1] and temperature > 0, got {alpha} and {temperature}"
        )
    runner = cuda.runner_for(logits)
    if runner is None:
        loss = cuda_reference.kd_loss(logits, teacher, labels, alpha, temperature)
        return loss, logits.new_zeros((len(logits), 6), dtype=torch.float32)
    return cuda_loss.kd_loss(runner, logits, teacher, labels, alpha, temperature)


def _kd_loss_backward(
    scale: Tensor,
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    logs: Tensor,
    alpha: float,
    temperature: float,
) -> Tensor:
    runner = cuda.runner_for(logits)
    arrays = scale.contiguous(), logits, teacher, labels
    if runner is None:
        return cuda_reference.kd_loss_backward(*arrays, alpha, temperature)
    return cuda_loss.kd_loss_backward(runner, *arrays, logs, alpha, temperature)


def _define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    shapes: Callable[..., Any],
) -> Any:
    """Register an operator for all devices and return what calls it."""
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsemodel::{name}", shapes, lib=_LIBRARY)
    return getattr(torch.ops.sparsemodel, name).default


def _nothing(*_: Any) -> None:
    """The shape rule of what changes its arguments alone."""


def _kd_loss_shapes(
    logits: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float
) -> tuple[Tensor, Tensor]:
    n = logits.shape[0]
    return (
        logits.new_empty(n, dtype=torch.promote_types(logits.dtype, torch.float32)),
        logits.new_empty((n, 6), dtype=torch.float32),
    )


sgd_step = _define(
    "sgd_step",
    "(Tensor(a!) values, Tensor gradient, Tensor(b!)? momentum_buffer, float lr, float momentum, "
    "float weight_decay) -> ()",
    _sgd_step,
    _nothing,
)
adam_step = _define(
    "adam_step",
    "(Tensor(a!) values, Tensor gradient, Tensor(b!) mean, Tensor(c!) square, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, bool decoupled, int step) -> ()",
    _adam_step,
    _nothing,
)
fixed_add = _define(
    "fixed_add",
    "(Tensor(a!) high, Tensor(b!) low, Tensor values, Tensor? means, Tensor? positions, "
    "int weight, Tensor(c!) refused) -> ()",
    _fixed_add,
    _nothing,
)
square_norms = _define(
    "square_norms",
    "(Tensor dy, Tensor x, Tensor row_ptr, Tensor cols) -> Tensor",
    _square_norms,
    lambda dy, x, row_ptr, cols: dy.new_empty(dy.shape[-1], dtype=torch.float32),
)
# The losses and what the gradient needs.
kd_loss = _define(
    "kd_loss",
    "(Tensor logits, Tensor teacher, Tensor labels, float alpha, float temperature) "
    "-> (Tensor, Tensor)",
    _kd_loss,
    _kd_loss_shapes,
)
kd_loss_backward = _define(
    "kd_loss_backward",
    "(Tensor scale, Tensor logits, Tensor teacher, Tensor labels, Tensor logs, float alpha, "
    "float temperature) -> Tensor",
    _kd_loss_backward,
    lambda scale, logits, teacher, labels, logs, alpha, temperature: torch.empty_like(logits),
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, teacher, labels, ctx.alpha, ctx.temperature = inputs
    ctx.save_for_backward(logits, teacher, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradient = kd_loss_backward(scale, *ctx.saved_tensors, ctx.alpha, ctx.temperature)
    return gradient, None, None, None, None


torch.library.register_autograd(
    "sparsemodel::kd_loss", _gradient, setup_context=_keep, lib=_LIBRARY
)
