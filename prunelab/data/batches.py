"""From stored images to what a network is fed: batches, normalisation, augmentation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch.nn import functional


def prepare(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, C, H, W] -> float32, (x / 255 − 0.5) / 0.25; float images pass as they are.

    The constants are fixed: a mean over everybody's images would be data that leave a client.

    >>> prepare(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-2.,  2.])
    """
    if images.is_floating_point():
        return images.float()
    return (images.float() / 255.0 - 0.5) / 0.25


def batches(
    num_samples: int, *, batch_size: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Shuffled index batches; a last batch of one joins the batch before it.

    Batch norm cannot be trained on a single value, and no sample should be left out for that.

    >>> [len(b) for b in batches(9, batch_size=4, generator=torch.Generator().manual_seed(0))]
    [4, 5]
    """
    order = torch.randperm(num_samples, generator=generator)
    starts = list(range(0, num_samples, batch_size))
    if len(starts) > 1 and num_samples - starts[-1] == 1:
        starts.pop()
    for start, end in pairwise([*starts, num_samples]):
        yield order[start:end]


def augment(images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Random crop of the zero-padded image and random horizontal flip, drawn for each image.

    Args:
        images: [N, C, H, W]; the padding is H / 8 on every side, rounded up (4 for CIFAR's 32).
    """
    n, _, height, width = images.shape
    pad = math.ceil(height / 8)
    padded = functional.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    rows = top[:, None] + torch.arange(height)
    columns = torch.arange(width).repeat(n, 1)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + left[:, None]
    sample = torch.arange(n)[:, None, None]
    # Indexing dimensions 0, 2, 3 around the slice puts channels last.
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
