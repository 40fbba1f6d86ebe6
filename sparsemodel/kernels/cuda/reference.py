"""What the operators of cuda_array_ops compute, in plain torch: any device, any float type."""
# ruff: noqa: PLR0917 - arrays by position, in the order of the operators

from __future__ import annotations

import torch
from torch.nn import functional

from sparsemodel.kernels.csr import flat_positions, mask_from_csr

Tensor = torch.Tensor

IGNORED = -100  # the label of a row that is left out


def square_norms(dy: Tensor, x: Tensor, row_ptr: Tensor, cols: Tensor) -> Tensor:
    """Squared norm of each sample's gradient at the mask: float32 [B]."""
    if dy.dim() == 3:  # [*, T, B]: a sample's gradient is the sum over its positions
        places = flat_positions(row_ptr, cols, len(x))
        samples = zip(dy.float().unbind(2), x.float().unbind(2), strict=True)
        norms = [(d @ seen.t()).reshape(-1)[places].square().sum() for d, seen in samples]
        return torch.stack(norms) if norms else dy.new_empty(0, dtype=torch.float32)
    mask = mask_from_csr(row_ptr, cols, (len(dy), len(x))).float()
    return (dy.float().square() * (mask @ x.float().square())).sum(0)


def kd_loss(
    logits: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float
) -> Tensor:
    """(1 − α) CE + α τ² KL(teacher ‖ student) of each row: [B], of single precision at least.

    0 where the label is −100.
    """
    logits, teacher = _precise(logits), _precise(teacher)
    hard = functional.cross_entropy(logits, labels, reduction="none")
    student = torch.log_softmax(logits / temperature, 1)
    guide = torch.log_softmax(teacher / temperature, 1)
    weight = guide.exp()
    soft = torch.where(weight > 0, weight * (guide - student), 0.0).sum(1)
    return torch.where(labels == IGNORED, 0.0, (1 - alpha) * hard + alpha * temperature**2 * soft)


def kd_loss_backward(
    scale: Tensor,
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float,
    temperature: float,
) -> Tensor:
    """Gradient for `logits` of Σ scale · loss, in their dtype."""
    z, t = _precise(logits), _precise(teacher)
    one_hot = functional.one_hot(labels.clamp(min=0), logits.shape[1])
    hard = torch.softmax(z, 1) - one_hot
    soft = torch.softmax(z / temperature, 1) - torch.softmax(t / temperature, 1)
    gradient = (1 - alpha) * hard + alpha * temperature * soft
    gradient = torch.where((labels == IGNORED)[:, None], 0.0, gradient)
    return (scale[:, None] * gradient).to(logits.dtype)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
