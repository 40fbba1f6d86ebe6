"""A client's samples: a part of them for development, nothing lost."""

from __future__ import annotations

import numpy as np
import pytest

from fedprune.local.data import ClientData, client_data, label_histogram
from prunelab.data.batches import Integers


def numbered(count: int, indices: Integers, **options: float) -> ClientData:
    """Of `count` samples, where sample i has label i and pixels i."""
    labels = np.arange(count)
    images = labels.astype(np.uint8).reshape(-1, 1, 1, 1)
    return client_data(images, labels, indices, num_classes=count, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "share", "num_dev"),
    [(0, 0.1, 0), (1, 0.1, 0), (2, 0.1, 1), (9, 0.1, 1), (40, 0.1, 4), (3, 0.99, 2)],
)
def test_a_client_keeps_a_part_for_development(count: int, share: float, num_dev: int) -> None:
    indices = np.random.default_rng(0).permutation(50)[:count]
    data = numbered(50, indices, dev_share=share, seed=4)
    dev, train = data.dev_labels.tolist(), data.train_labels.tolist()
    assert len(dev) == num_dev
    assert dev == sorted(dev)
    assert train == sorted(train)
    assert sorted(dev + train) == sorted(indices.tolist())
    assert data.dev_images.flatten().tolist() == dev
    assert data.train_images.flatten().tolist() == train
    assert data.label_histogram() == [int(label in indices) for label in range(50)]


def test_images_that_lie_channels_last_become_contiguous() -> None:
    images = np.arange(5 * 2 * 3 * 4, dtype=np.uint8).reshape(5, 3, 4, 2).transpose(0, 3, 1, 2)
    data = client_data(images, np.arange(5), np.arange(5), num_classes=5, seed=0)
    assert data.train_images.flags.c_contiguous
    assert np.array_equal(data.train_images, images[data.train_labels])


def test_the_development_split_is_drawn_by_its_seed() -> None:
    splits = [numbered(50, np.arange(50), seed=seed).dev_labels.tolist() for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_label_histogram_counts_absent_classes_too() -> None:
    assert label_histogram(np.array([3, 0, 3]), 5) == [1, 0, 0, 2, 0]
    assert label_histogram(np.array([], np.int64), 2) == [0, 0]
