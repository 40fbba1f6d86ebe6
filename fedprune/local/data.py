"""One client's samples and their splits, as numpy arrays; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunelab.data.batches import Integers
from prunelab.runs.seeds import rng

DEV_SHARE = 0.1

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Split:
    """Samples of one use.

    Attributes:
        inputs, targets: [n, ...] and [n] or [n, ...], as a store has them, contiguous.
    """

    inputs: Array
    targets: Array

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's samples.

    Attributes:
        train: what it trains on.
        dev: its development split, for what is chosen.
        test: for the record only; empty where the server has samples to test with.
        num_classes: of the whole data set, whichever the client has; None: targets are no classes.
        task: what the samples are for, a name in prunelab.training.task.TASKS.
    """

    train: Split
    dev: Split
    test: Split
    num_classes: int | None
    task: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one input: (channels, height, width) of an image."""
        return tuple(self.train.inputs.shape[1:])

    def label_histogram(self) -> list[int]:
        """Of the samples for training and for development together."""
        both = np.concatenate([self.train.targets, self.dev.targets])
        return label_histogram(both, self.num_classes)


@dataclass(frozen=True, eq=False)
class Rows:
    """Ascending indices of a client's samples by use, int64."""

    train: Integers
    dev: Integers
    test: Integers


def split(
    indices: Integers, *, dev_share: float = DEV_SHARE, with_test: bool = False, seed: int
) -> Rows:
    """A client's indices, and of them a seeded `dev_share` for development.

    Of two samples or more at least one is for development and one for training; a single one
    is for training.

    Args:
        with_test: whether as many again are set aside for testing, of four samples or more.
    """
    order = rng(seed).permutation(indices)
    sizes = split_sizes(len(order), dev_share=dev_share, with_test=with_test)
    num_dev, held = sizes[1], sizes[1] + sizes[2]
    return Rows(np.sort(order[held:]), np.sort(order[:num_dev]), np.sort(order[num_dev:held]))


def split_sizes(
    samples: int, *, dev_share: float = DEV_SHARE, with_test: bool = False
) -> tuple[int, int, int]:
    """How many of a client's samples are for training, for development and for testing.

    >>> split_sizes(40), split_sizes(40, with_test=True), split_sizes(3, with_test=True)
    ((36, 4, 0), (32, 4, 4), (2, 1, 0))
    """
    num_dev = min(max(1, round(dev_share * samples)), samples - 1) if samples else 0
    num_test = max(0, min(num_dev, samples - num_dev - 2)) if with_test else 0
    return samples - num_dev - num_test, num_dev, num_test


def label_histogram(targets: Array, num_classes: int | None) -> list[int]:
    """How many samples of each class; of samples without classes how many there are.

    >>> label_histogram(np.array([3, 0, 3]), 5)
    [1, 0, 0, 2, 0]
    """
    if num_classes is None:
        return [len(targets)]
    counts: list[int] = np.bincount(targets, minlength=num_classes).tolist()
    return counts
