"""Distillation loss over a large vocabulary by the kernels of loss.cu: no softmax is stored."""
# ruff: noqa: PLR0917 - kernels take their arrays by position

from __future__ import annotations

import torch

from sparsemodel.kernels.cuda.launch import Runner

Tensor = torch.Tensor

_FAMILY = "loss"


def kd_loss(
    runner: Runner,
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(1 − α) CE(y, p) + α τ² KL(p_T^τ ‖ p_S^τ) of each row, and what its gradient needs.

    A class that the teacher rules out (−∞) adds nothing, whatever the student says of it. A
    row of label −100 has loss and gradient 0; any other label out of range gives NaN.
    Source: Hinton, Vinyals and Dean (2015); online softmax: Milakov and Gimelshein (2018).

    Args:
        runner: where to run.
        logits, teacher: [B, C], contiguous, alike: float32, bfloat16 or float16.
        labels: int64 [B].
        alpha: weight of the teacher, in [0, 1].
        temperature: τ > 0.

    Returns:
        Losses, float32 [B], and largest values and sums of exponentials, float32 [B, 6].
    """
    rows, classes = logits.shape
    loss = logits.new_empty(rows, dtype=torch.float32)
    logs = logits.new_empty((rows, 6), dtype=torch.float32)
    runner.launch(
        _FAMILY, "kd_forward", rows, logits, teacher, labels, loss, logs, classes, alpha,
        temperature, real=logits.dtype,
    )  # fmt: skip
    return loss, logs


def kd_loss_backward(
    runner: Runner,
    scale: Tensor,
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    logs: Tensor,
    alpha: float,
    temperature: float,
) -> Tensor:
    """Gradient for `logits` [B, C] of Σ scale · loss, scale float32 [B]."""
    gradient = torch.empty_like(logits)
    runner.launch(
        _FAMILY, "kd_backward", len(logits), logits, teacher, labels, scale, logs, gradient,
        logits.shape[1], alpha, temperature, real=logits.dtype,
    )  # fmt: skip
    return gradient
