"""One client's samples and its development split, as numpy arrays; no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunelab.data.batches import Images, Integers
from prunelab.runs.seeds import rng

DEV_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's samples: for training, and its development split.

    Attributes:
        train_images, dev_images: uint8 or float32 [n, C, H, W], contiguous.
        train_labels, dev_labels: int64 [n].
        num_classes: of the whole data set, whichever the client has.
    """

    train_images: Images
    train_labels: Integers
    dev_images: Images
    dev_labels: Integers
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def label_histogram(self) -> list[int]:
        """How many samples of each class, on both sides together."""
        both = np.concatenate([self.train_labels, self.dev_labels])
        return label_histogram(both, self.num_classes)


def client_data(
    images: Images,
    labels: Integers,
    indices: Integers,
    *,
    num_classes: int,
    dev_share: float = DEV_SHARE,
    seed: int,
) -> ClientData:
    """A client's samples out of everybody's, copied, and split by `split_development`.

    Args:
        images, labels: of the training side.
        indices: int64 [n], of the client's samples.
    """
    train, dev = split_development(indices, dev_share=dev_share, seed=seed)
    # Not by indexing, which keeps the layout of the whole: kernels want channel by channel.
    own, held = images.take(train, axis=0), images.take(dev, axis=0)
    return ClientData(own, labels[train], held, labels[dev], num_classes)


def split_development(
    indices: Integers, *, dev_share: float = DEV_SHARE, seed: int
) -> tuple[Integers, Integers]:
    """A client's indices for training and a seeded `dev_share` for development, both ascending.

    Of two samples or more at least one is for development and one for training; a single one
    is for training.
    """
    order = rng(seed).permutation(indices)
    num_dev = num_development(len(order), dev_share=dev_share)
    return np.sort(order[num_dev:]), np.sort(order[:num_dev])


def num_development(samples: int, *, dev_share: float = DEV_SHARE) -> int:
    """How many of a client's samples are for development."""
    return min(max(1, round(dev_share * samples)), samples - 1) if samples else 0


def label_histogram(labels: Integers, num_classes: int) -> list[int]:
    """How many samples of each class.

    >>> label_histogram(np.array([3, 0, 3]), 5)
    [1, 0, 0, 2, 0]
    """
    counts: list[int] = np.bincount(labels, minlength=num_classes).tolist()
    return counts
