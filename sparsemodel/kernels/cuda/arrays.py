"""Optimiser steps and exact sums of updates, by the kernels of arrays.cu.

The functions take checked, contiguous tensors on the runner's device.
"""
# ruff: noqa: PLR0917 - kernels take their arrays by position

from __future__ import annotations

import torch

from sparsemodel.kernels.cuda.launch import Runner, blocks_of

Tensor = torch.Tensor

_FAMILY = "arrays"


def sgd_step(
    runner: Runner,
    values: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One step of torch.optim.SGD, in place; `momentum_buffer` None keeps none."""
    runner.launch(
        _FAMILY, "sgd_step", blocks_of(values.numel()), values, gradient, momentum_buffer,
        values.numel(), lr, momentum, weight_decay,
    )  # fmt: skip


def adam_step(
    runner: Runner,
    values: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: int,
) -> None:
    """Step number `step` (from 1) of torch.optim.Adam, or AdamW where `decoupled`, in place."""
    beta1, beta2 = betas
    runner.launch(
        _FAMILY, "adam_step", blocks_of(values.numel()), values, gradient, mean, square,
        values.numel(), lr, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, decoupled,
        lr / (1 - beta1**step), (1 - beta2**step) ** 0.5,
    )  # fmt: skip


def fixed_add(
    runner: Runner,
    high: Tensor,
    low: Tensor,
    values: Tensor,
    means: Tensor | None,
    positions: Tensor | None,
    weight: int,
    refused: Tensor,
) -> None:
    """As `fixed_point.add`, in one pass; values and means are float32."""
    n = values.numel()
    runner.launch(
        _FAMILY, "fixed_add", blocks_of(n), high, low, values, means, positions, n, high.numel(),
        weight, refused,
    )  # fmt: skip
