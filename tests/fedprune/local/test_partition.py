"""Division of a data set: nothing lost, nothing shared, seeds decide everything."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    PathologicalPartitioner,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.local.partition import partition, split_server_set
from fedprune.settings import PARTITIONS
from prunelab.data.batches import Integers
from prunelab.errors import DataError


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 12), st.integers(0, 99))
def test_the_server_takes_at_most_half_of_a_class(
    labels: list[int], per_class: int, seed: int
) -> None:
    values = np.array(labels, np.int64)
    server, rest = split_server_set(values, per_class=per_class, seed=seed)
    assert server.dtype == rest.dtype == np.int64
    assert sorted([*server, *rest]) == list(range(len(labels)))
    assert (np.diff(server) > 0).all()
    assert (np.diff(rest) > 0).all()
    for label in range(5):
        expected = min(per_class, int((values == label).sum()) // 2)
        assert (values[server] == label).sum() == expected


def test_the_server_set_is_drawn_by_its_seed() -> None:
    labels = np.arange(200) % 4
    sets = [split_server_set(labels, per_class=5, seed=seed)[0].tolist() for seed in (0, 0, 1)]
    assert sets[0] == sets[1] != sets[2]
    with pytest.raises(DataError, match="got -1"):
        split_server_set(labels, per_class=-1, seed=0)


def divide(labels: Integers, num_clients: int, scheme: str, **settings: object) -> list[list[int]]:
    arguments = {"seed": 0, "groups": np.arange(len(labels)) % (num_clients + 3), **settings}
    shares = partition(labels, num_clients=num_clients, scheme=scheme, **arguments)  # type: ignore[arg-type]
    assert all(share.dtype == np.int64 for share in shares)
    return [share.tolist() for share in shares]


@pytest.mark.parametrize("scheme", PARTITIONS)
@settings(max_examples=8, deadline=None)
@given(num_clients=st.integers(3, 9), seed=st.integers(0, 2**62), extra=st.integers(0, 70))
def test_every_sample_is_in_exactly_one_share(
    scheme: str, num_clients: int, seed: int, extra: int
) -> None:
    labels = np.arange(60 + extra) % 5 * 3  # classes 0, 3, 6, 9, 12: gaps do not matter
    shares = divide(labels, num_clients, scheme, seed=seed, alpha=5.0)
    assert len(shares) == num_clients
    assert all(share and share == sorted(share) for share in shares)
    assert sorted(index for share in shares for index in share) == list(range(len(labels)))


@pytest.mark.parametrize("scheme", PARTITIONS)
def test_a_partition_is_decided_by_its_seed_alone_and_is_silent(
    scheme: str, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = np.arange(300) % 10
    first = divide(labels, 8, scheme, seed=1)
    np.random.seed(3)  # noqa: NPY002 - the global stream must not matter
    state, torch_state = np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index,union-attr] # noqa: NPY002
    bars = datasets.utils.are_progress_bars_disabled()
    assert divide(labels, 8, scheme, seed=1) == first
    assert divide(labels, 8, scheme, seed=2) != first
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index,union-attr] # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert datasets.utils.are_progress_bars_disabled() == bars
    assert capfd.readouterr() == ("", "")


def divided_by_flower(keys: Integers, divider: Partitioner, num_parts: int) -> list[list[int]]:
    """Rows of each part that a partitioner of flwr-datasets makes of rows with these keys."""
    divider.dataset = datasets.Dataset.from_dict({"row": np.arange(len(keys)), "key": keys})
    return [sorted(divider.load_partition(part)["row"]) for part in range(num_parts)]


@pytest.mark.filterwarnings("ignore:The specified min_partition_size")  # it draws again, as we do
@settings(max_examples=15, deadline=None)
@given(
    clients=st.integers(3, 9),
    seed=st.integers(0, 2**62),
    alpha=st.floats(0.3, 9.0),
    extra=st.integers(0, 70),
)
def test_shares_are_those_of_flwr_datasets(
    clients: int, seed: int, alpha: float, extra: int
) -> None:
    """On rows in the order that the seed draws first, from which ours are dealt."""
    labels = np.random.default_rng(extra).integers(0, 5, 200 + extra)
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))

    def rows(shares: list[list[int]]) -> list[list[int]]:
        """Places in that order of each share."""
        place = np.argsort(order)
        return [sorted(place[share].tolist()) for share in shares]

    def ours(scheme: str) -> list[list[int]]:
        return rows(divide(labels, clients, scheme, seed=seed, alpha=alpha))

    keys = labels[order]
    assert ours("iid") == divided_by_flower(keys, IidPartitioner(clients), clients)
    dirichlet = DirichletPartitioner(clients, "key", alpha, min_partition_size=3, seed=seed)
    assert ours("dirichlet") == divided_by_flower(keys, dirichlet, clients)
    codes = random.permutation(5)
    parts = divided_by_flower(
        codes[keys],
        PathologicalPartitioner(2 * clients, "key", 1, "deterministic", shuffle=False),
        2 * clients,
    )
    pairs = [sorted(parts[n] + parts[n + 1]) for n in range(0, 2 * clients, 2)]
    assert ours("pathological") == pairs
    groups = np.arange(len(labels)) % clients
    owner = np.random.default_rng(seed)
    owner.permutation(len(labels))
    keys = owner.permutation(clients)[groups[order]]
    natural = divided_by_flower(keys, NaturalIdPartitioner("key"), clients)
    assert rows(divide(labels, clients, "natural", seed=seed, groups=groups)) == natural


def test_iid_shares_are_even_and_mixed() -> None:
    """103 samples sorted by class among 4: sizes 26, 26, 26, 25, both classes in every share."""
    labels = (np.arange(103) >= 50).astype(np.int64)
    shares = divide(labels, 4, "iid")
    assert sorted(map(len, shares)) == [25, 26, 26, 26]
    assert all(set(labels[share].tolist()) == {0, 1} for share in shares)


def test_dirichlet_counts_are_the_cuts_of_the_drawn_shares() -> None:
    """A class of n samples is cut at ⌊n · cumulative shares⌋; its shares are a draw of its own."""
    labels = np.array([0] * 100 + [1] * 70 + [2] * 45)
    shares = divide(labels, 4, "dirichlet", alpha=0.8, seed=11)
    random = np.random.default_rng(11)
    for label, count in enumerate((100, 70, 45)):
        cuts = (np.cumsum(random.dirichlet([0.8] * 4)) * count).astype(int)[:-1]
        expected = np.diff([0, *cuts, count]).tolist()
        assert [labels[share].tolist().count(label) for share in shares] == expected


def test_dirichlet_does_not_follow_the_order_of_the_file() -> None:
    """One class of 400: shares of neighbours in the file would be four intervals."""
    shares = divide(np.zeros(400, np.int64), 4, "dirichlet", alpha=100.0)
    assert all(max(share) - min(share) + 1 > 2 * len(share) for share in shares)


def test_dirichlet_concentration_sets_the_skew() -> None:
    labels = np.arange(4000) % 10

    def largest_class_share(alpha: float) -> float:
        shares = divide(labels, 8, "dirichlet", alpha=alpha)
        return sum(max(np.bincount(labels[s])) / len(s) for s in shares) / len(shares)

    assert largest_class_share(1000.0) < 0.13
    assert largest_class_share(0.1) > 0.35


def test_dirichlet_that_cannot_fill_all_shares_is_refused() -> None:
    with pytest.raises(DataError, match=r"50 samples among 25 clients with alpha 0\.01: no draw"):
        divide(np.arange(50) % 2, 25, "dirichlet", alpha=0.01)


@pytest.mark.parametrize(("clients", "per_client"), [(8, 2), (5, 2), (4, 3), (1, 10), (30, 1)])
def test_pathological_clients_have_their_number_of_classes(clients: int, per_client: int) -> None:
    """8 clients of 2 classes: 16 parts of 10 classes, so six classes have two clients, four one."""
    labels = np.arange(400) % 10
    shares = divide(labels, clients, "pathological", classes_per_client=per_client)
    held = [set(labels[share].tolist()) for share in shares]
    assert all(len(classes) == per_client for classes in held)
    users = [sum(label in classes for classes in held) for label in range(10)]
    assert sum(users) == clients * per_client
    assert max(users) - min(users) <= 1
    for label in range(10):  # a class is cut evenly among its clients
        counts = [
            labels[s].tolist().count(label) for s in shares if label in set(labels[s].tolist())
        ]
        assert max(counts) - min(counts) <= 1


def test_pathological_clients_draw_which_classes_go_together() -> None:
    """2 of 10 classes each: in file order client 0 would always hold classes 0 and 1."""
    labels = np.arange(100) % 10
    pairs = {
        tuple(np.unique(labels[divide(labels, 5, "pathological", seed=seed)[0]]).tolist())
        for seed in range(6)
    }
    assert len(pairs) > 2


def test_pathological_partitions_that_would_lose_samples_are_refused() -> None:
    labels = np.arange(100) % 10
    for clients, per_client in ((4, 2), (5, 11), (5, 0)):
        words = f"{clients} clients of {per_client} classes each cannot hold 10 classes"
        with pytest.raises(DataError, match=words):
            divide(labels, clients, "pathological", classes_per_client=per_client)
    rare = np.array([0] * 20 + [7])
    with pytest.raises(DataError, match="class 7 has 1 samples for 2 clients"):
        divide(rare, 2, "pathological")


def test_natural_groups_stay_whole_and_are_dealt_evenly() -> None:
    """7 groups among 3 clients: 3, 2 and 2 of them."""
    groups = np.arange(70) % 7 * 11
    shares = divide(np.zeros(70, np.int64), 3, "natural", groups=groups)
    held = [set(groups[share].tolist()) for share in shares]
    assert sorted(map(len, held)) == [2, 2, 3]
    assert set.union(*held) == set(groups.tolist())


def test_partitions_that_cannot_be_are_refused() -> None:
    labels = np.arange(10) % 2
    for scheme in PARTITIONS:
        with pytest.raises(DataError, match="10 training samples among 11 clients"):
            divide(labels, 11, scheme)
    with pytest.raises(DataError, match="among 0 clients"):
        divide(labels, 0, "iid")
    with pytest.raises(DataError, match="'sharded'; expected one of iid, dirichlet"):
        divide(labels, 2, "sharded")
    with pytest.raises(DataError, match="3 clients but only 2 natural groups"):
        divide(labels, 3, "natural", groups=labels)
    with pytest.raises(DataError, match="column 'client'"):
        divide(labels, 3, "natural", groups=None)
