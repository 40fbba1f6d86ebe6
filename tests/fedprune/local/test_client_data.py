"""A client's samples: a part of them for development, perhaps one for testing, nothing lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedprune.local.data import label_histogram, split, split_sizes
from fedprune.local.shares import open_client
from prunelab.data.store import write_store


@pytest.mark.parametrize("with_test", [False, True])
@pytest.mark.parametrize(
    ("count", "share", "num_dev"),
    [(0, 0.1, 0), (1, 0.1, 0), (2, 0.1, 1), (9, 0.1, 1), (40, 0.1, 4), (3, 0.99, 2)],
)
def test_a_client_keeps_a_part_for_development(
    count: int, share: float, num_dev: int, with_test: bool
) -> None:
    indices = np.random.default_rng(0).permutation(50)[:count]
    rows = split(indices, dev_share=share, with_test=with_test, seed=4)
    parts = [part.tolist() for part in (rows.train, rows.dev, rows.test)]
    assert [part == sorted(part) for part in parts] == [True] * 3
    assert sorted(index for part in parts for index in part) == sorted(indices.tolist())
    assert len(parts[1]) == num_dev
    assert tuple(map(len, parts)) == split_sizes(count, dev_share=share, with_test=with_test)
    if not with_test:
        assert parts[2] == []
    elif count >= 9:  # the development split is the same, whoever tests
        assert len(parts[2]) == num_dev
        assert parts[1] == split(indices, dev_share=share, seed=4).dev.tolist()


def test_nothing_is_set_aside_for_testing_that_training_needs() -> None:
    for count in range(2, 40):
        train, dev, test = split_sizes(count, with_test=True)
        assert train + dev + test == count
        assert train >= 2 or test == 0
        assert 0 <= test <= dev


def test_samples_are_those_of_the_splits(tmp_path: Path) -> None:
    """Sample i has the label i and pixels i, stored channels last."""
    targets = np.arange(12)
    images = np.broadcast_to(targets.astype(np.uint8)[:, None, None, None], (12, 3, 4, 2))
    images = images.transpose(0, 3, 1, 2)
    write_store(tmp_path / "store", images, targets, num_classes=12, name="numbered")
    data = open_client(tmp_path / "store", 0, seed=4, with_test=True)
    rows = split(targets, with_test=True, seed=4)
    for own, expected in ((data.train, rows.train), (data.dev, rows.dev), (data.test, rows.test)):
        assert own.targets.tolist() == expected.tolist()
        assert own.inputs.flags.c_contiguous
        assert np.array_equal(own.inputs, images[expected])
    assert data.label_histogram() == [int(i not in rows.test) for i in range(12)]
    assert (data.input_shape, data.num_classes, data.task) == ((2, 3, 4), 12, "classification")


def test_the_development_split_is_drawn_by_its_seed() -> None:
    splits = [split(np.arange(50), seed=seed).dev.tolist() for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_label_histogram_counts_absent_classes_too() -> None:
    assert label_histogram(np.array([3, 0, 3]), 5) == [1, 0, 0, 2, 0]
    assert label_histogram(np.array([], np.int64), 2) == [0, 0]
    assert label_histogram(np.zeros((7, 3), np.float32), None) == [7]
