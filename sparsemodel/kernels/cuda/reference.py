"""What the operators of cuda_array_ops compute, in plain torch: any device, any float type."""
# ruff: noqa: PLR0917 - arrays by position, in the order of the operators

from __future__ import annotations

import torch
from torch.nn import functional

from sparsemodel.kernels import reference
from sparsemodel.kernels.csr import flat_positions, mask_from_csr
from sparsemodel.kernels.geometry import ConvGeometry

Tensor = torch.Tensor

IGNORED = -100  # the label of a row that is left out


def square_norms(dy: Tensor, x: Tensor, row_ptr: Tensor, cols: Tensor, bias: bool) -> Tensor:
    """Squared norm of each sample's gradient at the mask: float32 [B]."""
    mask = mask_from_csr(row_ptr, cols, (dy.shape[0], x.shape[0])).float()
    inputs = mask @ x.float().square() + float(bias)
    return (dy.float().square() * inputs).sum(0)


def conv2d_square_norms(
    dy: Tensor, x: Tensor, row_ptr: Tensor, cols: Tensor, geometry: ConvGeometry
) -> Tensor:
    """Squared norm of each sample's weight gradient at the mask: float32 [B]."""
    weight = dy.new_empty(1, dtype=torch.float32).expand(geometry.weight_shape)
    places = flat_positions(row_ptr, cols, geometry.row_length)
    norms = dy.new_zeros(dy.shape[3], dtype=torch.float32)
    for b in range(dy.shape[3]):
        gradient, seen = (t[None, ..., b].float().contiguous() for t in (dy, x))
        wanted = False, True, False
        dense = reference.conv2d_backward(gradient, seen, weight, geometry, wanted)[1]
        assert dense is not None
        norms[b] = dense.reshape(-1)[places].square().sum()
    return norms


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
