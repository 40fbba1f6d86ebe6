"""Confident learning: which labels look wrong, from probabilities of models that did not see them.

Every function takes probabilities [N, C], after softmax and *out of sample*: a row is what models
say that were not trained on that sample; and labels, int64 [N]. All compute in float64.

Source: Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels
(JAIR 2021), section 3: the confident joint, its calibration, and the ways to prune.
Departs from it: a class counts at least one sample as its own when the joint is calibrated, so
that no class is taken for wrong as a whole; and a sample whose label is its likeliest class is no
issue, however many the joint counts. The authors' package cleanlab does both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from datapruning.errors import ScoreError

_ROUNDING = 1e-9  # the mean of equal probabilities may come out above each of them


def self_confidence(probabilities: Tensor, labels: Tensor) -> Tensor:
    """1 − p_y, float64 [N] in [0, 1]; high: others doubt the label.

    The complement of the paper's self-confidence p_y, so that high is hard as in other scores.

    Raises:
        ScoreError: rows that are no probabilities, or labels that do not fit.

    >>> self_confidence(torch.tensor([[0.75, 0.25]]), torch.tensor([1]))
    tensor([0.7500], dtype=torch.float64)
    """
    probabilities, labels = _checked(probabilities, labels)
    return 1 - _own(probabilities, labels)


def confident_learning(
    probabilities: Tensor, labels: Tensor, *, prune_by: str = "noise-rate"
) -> Tensor:
    """`self_confidence`, and one more for every label issue: float64 [N] in [0, 2].

    Issues have scores above 1 and all others at most 1, so that a ranking drops exactly the issues
    first, the least confident foremost.

    Args:
        prune_by: as in `label_issues`.

    Raises:
        ScoreError: as `label_issues` does.
    """
    issues = label_issues(probabilities, labels, prune_by=prune_by)
    return self_confidence(probabilities, labels) + issues.double()


def thresholds(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean probability of each class over the samples with its label, float64 [C].

    Infinite for classes without samples: nobody is confident of them.

    Raises:
        ScoreError: as in `self_confidence`.
    """
    probabilities, labels = _checked(probabilities, labels)
    num_classes = probabilities.shape[1]
    sums = torch.zeros(num_classes, dtype=torch.float64)
    sums.index_add_(0, labels, _own(probabilities, labels))
    counts = torch.bincount(labels, minlength=num_classes)
    return torch.where(counts > 0, sums / counts, torch.inf)


def likely_labels(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The likeliest class of those whose threshold a sample reaches, int64 [N]; −1: none.

    Raises:
        ScoreError: as in `self_confidence`.
    """
    limits = thresholds(probabilities, labels)
    probabilities, labels = _checked(probabilities, labels)
    best, found = probabilities.where(probabilities >= limits - _ROUNDING, -1.0).max(1)
    return torch.where(best < 0, -1, found)


def confident_joint(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Counts of samples by label (rows) and likely label (columns), int64 [C, C].

    Samples that reach no threshold are not counted.

    Raises:
        ScoreError: as in `self_confidence`.

    >>> p = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.9, 0.1], [0.1, 0.9]])
    >>> confident_joint(p, torch.tensor([0, 0, 1, 1]))  # thresholds .8 and .5
    tensor([[1, 0],
            [1, 1]])
    """
    likely = likely_labels(probabilities, labels)
    num_classes, is_counted = probabilities.shape[1], likely >= 0
    cells = labels.cpu()[is_counted] * num_classes + likely[is_counted]
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def calibrated_joint(counts: Tensor, labels: Tensor) -> Tensor:
    """Estimated shares of (label, true class) in all samples, float64 [C, C], which sum to 1.

    Each row of the confident joint is scaled to as many samples as have its label.

    Args:
        counts: a confident joint.
    """
    counts, sizes = _kept_alive(counts), torch.bincount(labels.cpu(), minlength=len(counts))
    return counts * sizes[:, None] / counts.sum(1, keepdim=True) / len(labels)


def label_issues(probabilities: Tensor, labels: Tensor, *, prune_by: str = "noise-rate") -> Tensor:
    """Which labels look wrong, bool [N].

    Args:
        prune_by: "noise-rate": for each pair of classes as many of those with the first label as
            the calibrated joint says belong to the second, those with the largest p_second −
            p_first; "class": for each label as many as the joint says belong elsewhere, those
            with the lowest p_label; "both": those that both name; "confident-joint": those that
            the confident joint itself counts off its diagonal. Counts are rounded, halves to even.

    Raises:
        ScoreError: rows that are no probabilities, labels that do not fit, or another rule.
    """
    if prune_by not in _RULES:
        raise ScoreError(f"prune_by: expected one of {', '.join(_RULES)}, got {prune_by!r}")
    probabilities, labels = _checked(probabilities, labels)
    issues = _RULES[prune_by](probabilities, labels)
    return issues & (_own(probabilities, labels) < probabilities.max(1).values)


def _by_noise_rate(probabilities: Tensor, labels: Tensor) -> Tensor:
    issues = torch.zeros(len(labels), dtype=torch.bool)
    counts = _pruned_counts(probabilities, labels)
    for label, row in enumerate(counts):
        rows = (labels == label).nonzero()[:, 0]
        for other in row.nonzero()[:, 0].tolist():
            margins = probabilities[rows, other] - probabilities[rows, label]
            issues[rows[_highest(margins, int(row[other]))]] = True
    return issues


def _by_class(probabilities: Tensor, labels: Tensor) -> Tensor:
    issues = torch.zeros(len(labels), dtype=torch.bool)
    for label, count in enumerate(_pruned_counts(probabilities, labels, whole=True).tolist()):
        rows = (labels == label).nonzero()[:, 0]
        issues[rows[_highest(-probabilities[rows, label], count)]] = True
    return issues


def _by_both(probabilities: Tensor, labels: Tensor) -> Tensor:
    return _by_noise_rate(probabilities, labels) & _by_class(probabilities, labels)


def _by_joint(probabilities: Tensor, labels: Tensor) -> Tensor:
    likely = likely_labels(probabilities, labels)
    return (likely >= 0) & (likely != labels)


_RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "noise-rate": _by_noise_rate,
    "class": _by_class,
    "both": _by_both,
    "confident-joint": _by_joint,
}


def _pruned_counts(probabilities: Tensor, labels: Tensor, *, whole: bool = False) -> Tensor:
    """Samples off the joint's diagonal, int64 [C, C], or [C]: those of a whole row together."""
    counts = _kept_alive(confident_joint(probabilities, labels))
    totals, sizes = counts.sum(1), torch.bincount(labels, minlength=len(counts))
    wrong = counts.clone().fill_diagonal_(0)
    # Whole numbers up to the one division, so that halves are halves.
    scaled = wrong.sum(1) * sizes / totals if whole else wrong * sizes[:, None] / totals[:, None]
    return scaled.round().long()


def _kept_alive(counts: Tensor) -> Tensor:
    """The counts, float64, with at least one sample of each class counted as its own."""
    return (counts + torch.diag((counts.diagonal() == 0).long())).double()


def _highest(values: Tensor, count: int) -> Tensor:
    """Positions of the highest values, of equal ones the first."""
    return torch.argsort(values, descending=True, stable=True)[:count]


def _own(probabilities: Tensor, labels: Tensor) -> Tensor:
    return probabilities.gather(1, labels[:, None])[:, 0]


def _checked(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU, probabilities float64."""
    if probabilities.dim() != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ScoreError(
            f"expected probabilities [N, C] and labels [N], got {tuple(probabilities.shape)} and "
            f"{tuple(labels.shape)}"
        )
    p, y = probabilities.detach().double().cpu(), labels.detach().long().cpu()
    wrong = ~((p >= 0).all(1) & ((p.sum(1) - 1).abs() < 1e-3))
    if wrong.any():
        raise ScoreError(
            f"{int(wrong.sum())} of {len(p)} rows are no probabilities (first: row "
            f"{int(wrong.nonzero()[0])}): apply softmax to logits; NaN are rows that every model "
            "was trained on, or models that have diverged"
        )
    if int(y.min()) < 0 or int(y.max()) >= p.shape[1]:
        raise ScoreError(
            f"labels lie in {int(y.min())} ... {int(y.max())}, but there are probabilities of "
            f"{p.shape[1]} classes"
        )
    return p, y
