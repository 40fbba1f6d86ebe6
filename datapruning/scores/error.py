"""Scores from the logits of one model: how wrong, and how unsure it is of each sample.

Pure functions of logits [B, C] of any floating-point type on any device, before softmax, and
labels, int64 [B]. All compute in float64 and return float64 [B] on the CPU; high means keep.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from datapruning.errors import ScoreError


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """‖softmax(logits) − onehot(label)‖₂, in [0, √2]: the error vector's length.

    Meant for a checkpoint early in training, then averaged over independent runs (of the score
    itself, not of the logits).
    Source: Paul et al., Deep Learning on a Data Diet (NeurIPS 2021), definition 2.2.

    Raises:
        ScoreError: shapes that do not fit, labels out of range, or logits that are not finite.

    >>> el2n(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([0.7071], dtype=torch.float64)
    """
    logits, labels = _checked(logits, labels)
    errors = logits.softmax(1)
    errors[torch.arange(len(labels), device=labels.device), labels] -= 1
    lengths: Tensor = torch.linalg.vector_norm(errors, dim=1)
    return lengths.cpu()


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy −log p_y, in nats.

    Raises:
        ScoreError: as in `el2n`.
    """
    logits, labels = _checked(logits, labels)
    return functional.cross_entropy(logits, labels, reduction="none").cpu()


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{j≠y} p_j − p_y, in [−1, 1]: above 0 where the sample is wrong.

    Raises:
        ScoreError: as in `el2n`, or a single class.

    >>> margin(torch.tensor([[0.0, 0.0, -9e9]]), torch.tensor([2]))
    tensor([0.5000], dtype=torch.float64)
    """
    logits, labels = _checked(logits, labels)
    if logits.shape[1] < 2:
        raise ScoreError("a margin needs two classes or more, got one")
    probabilities = logits.softmax(1)
    own = probabilities.gather(1, labels[:, None])
    others = probabilities.scatter(1, labels[:, None], -1.0)
    return (others.max(1).values - own.squeeze(1)).cpu()


def entropy(logits: Tensor) -> Tensor:
    """−Σ_c p_c log p_c of the prediction, in [0, log C] nats; needs no labels.

    Raises:
        ScoreError: logits that are not [B, C], or not finite.
    """
    logs = _checked_logits(logits).log_softmax(1)
    # 0 · log 0 is 0, also where the logarithm has underflown to −∞.
    return -(logs.exp() * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(1).cpu()


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the logits' device, logits float64."""
    doubles = _checked_logits(logits)
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ScoreError(
            f"expected one whole-number label for each of {len(logits)} rows of logits, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    labels = labels.to(logits.device, torch.int64)
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < logits.shape[1]):
        raise ScoreError(
            f"labels lie in {int(labels.min())} ... {int(labels.max())}, but the model has "
            f"{logits.shape[1]} classes"
        )
    return doubles, labels


def _checked_logits(logits: Tensor) -> Tensor:
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ScoreError(f"expected logits [B, classes], got {logits.dtype} {tuple(logits.shape)}")
    doubles = logits.detach().double()
    wrong = ~doubles.isfinite().all(1)
    if wrong.any():
        raise ScoreError(
            f"the logits of {int(wrong.sum())} of {len(logits)} samples are not finite (first: row "
            f"{int(wrong.nonzero()[0])} of the batch): the model has diverged"
        )
    return doubles
