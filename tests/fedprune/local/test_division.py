"""Divisions as two arrays: the shares of dealing client by client, however many there are."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fedprune.local.division import Division
from fedprune.local.partition import partition
from prunelab.data.batches import Integers


def test_shares_are_cut_out_as_lists_are() -> None:
    shares = [np.array([1, 4]), np.array([], np.int64), np.array([0, 2, 3])]
    division = Division.of(shares)
    assert [share.tolist() for share in division] == [share.tolist() for share in shares]
    assert division[-1].tolist() == [0, 2, 3]
    assert [share.tolist() for share in division[:2]] == [[1, 4], []]
    assert Division.of(division) is division
    with pytest.raises(IndexError):
        division[3]
    within = division.within(np.array([10, 20, 30, 40, 50]))
    assert [share.tolist() for share in within] == [[20, 50], [], [10, 30, 40]]


def dealt(labels: Integers, num_clients: int, scheme: str, seed: int) -> list[Integers]:
    """Each client's share, made by itself: what `partition` does at once."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    values = labels[order]
    if scheme == "iid":
        shares = np.array_split(np.arange(len(values)), num_clients)
    elif scheme == "dirichlet":
        random, parts = np.random.default_rng(seed), []
        for label in np.unique(values):
            rows = np.flatnonzero(values == label)
            cuts = (np.cumsum(random.dirichlet(np.full(num_clients, 50.0))) * len(rows)).astype(int)
            parts.append(np.split(rows, cuts[:-1]))
        shares = [np.concatenate(own) for own in zip(*parts, strict=True)]
    else:
        classes = np.unique(values)
        codes = random.permutation(len(classes))
        wanted = 2 * num_clients // len(classes) + (codes < 2 * num_clients % len(classes))
        parts = [values] * (2 * num_clients)
        for label, code, count in zip(classes, codes, wanted, strict=True):
            rows = np.flatnonzero(values == label)
            parts[code :: len(classes)] = np.array_split(rows, count)
        shares = [np.concatenate(parts[2 * k : 2 * k + 2]) for k in range(num_clients)]
    return [np.sort(order[share]) for share in shares]


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "pathological"])
def test_a_partition_at_once_is_that_of_client_by_client(scheme: str) -> None:
    labels = np.random.default_rng(1).integers(0, 7, 20_011)
    found = partition(labels, num_clients=603, scheme=scheme, alpha=50.0, seed=3)
    expected = dealt(labels, 603, scheme, 3)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_memory_of_a_partition_is_that_of_its_samples() -> None:
    """A list of arrays would take more than a hundred bytes a client beside them."""
    labels = np.arange(200_000) % 10
    tracemalloc.start()
    division = partition(labels, num_clients=100_000, scheme="iid", seed=0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(division) == 100_000
    assert held < 8 * 300_000 + 100_000
