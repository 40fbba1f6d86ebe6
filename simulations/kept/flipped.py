"""Labels of which a share is wrong on purpose."""

from __future__ import annotations

import torch
from torch import Tensor


def flipped(labels: Tensor, share: float, *, num_classes: int, random: torch.Generator) -> Tensor:
    """Labels of which round(share · N), drawn at random, become another class, each as likely.

    >>> changed = flipped(torch.zeros(10).long(), 0.4, num_classes=3, random=torch.Generator())
    >>> int((changed != 0).sum())
    4
    """
    rows = torch.randperm(len(labels), generator=random)[: round(share * len(labels))]
    steps = torch.randint(1, num_classes, (len(rows),), generator=random)
    result = labels.clone()
    result[rows] = (labels[rows] + steps) % num_classes
    return result
