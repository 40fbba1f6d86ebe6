"""K-means in torch, which GPUs use, against scikit-learn's and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from datapruning.scores import kmeans as room
from datapruning.scores import prototypes
from datapruning.scores.kmeans import greedy_starts, kmeans, settled


def points(count: int = 300, *, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("block", [None, 40])
def test_from_the_same_starts_it_ends_where_scikit_learn_does(
    block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a few points at a time."""
    if block is not None:
        monkeypatch.setattr(room, "_ENTRIES", block)
    x = points()
    theirs = KMeans(5, n_init=1, init=x[:5].numpy(), tol=room.TOLERANCE).fit(x.numpy())
    centroids, labels, inertia = settled(x, x[:5])
    torch.testing.assert_close(centroids, torch.from_numpy(theirs.cluster_centers_))
    assert torch.equal(labels, torch.from_numpy(theirs.labels_).long())
    assert inertia == pytest.approx(theirs.inertia_)


def test_restarts_are_as_good_as_scikit_learns() -> None:
    """Both end in local optima, which differ by a few percent; more restarts are never worse."""
    x = points()
    theirs = KMeans(8, n_init=4, random_state=0).fit(x.numpy()).inertia_

    def inertia(restarts: int, seed: int = 0) -> float:
        centroids, labels = kmeans(x, num_clusters=8, seed=seed, restarts=restarts)
        return float((x - centroids[labels]).square().sum())

    assert inertia(4) == pytest.approx(theirs, rel=0.02)
    assert inertia(4) <= inertia(1)
    assert inertia(4) == inertia(4)
    assert len({inertia(1, seed) for seed in range(4)}) > 1


def test_starts_lie_in_all_clouds() -> None:
    """Ten far clouds of thirty: uniform draws would miss some of them all but always."""
    clouds = torch.arange(10).repeat(30)
    x = torch.cat([points(), 1000.0 * torch.eye(10, dtype=torch.float64)[clouds]], 1)
    for seed in range(5):
        starts = greedy_starts(x, room._drawn(10, seed, 0))
        assert starts[:, 6:].argmax(1).unique().tolist() == list(range(10))


def test_a_start_by_hand() -> None:
    """From 0 the squared distances are 0, 1, 9: u = .05 draws the second, .5 the third.

    Of both the third leaves less: 1 in place of 4.
    """
    x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    uniform = torch.tensor([[0.1, 0.9], [0.05, 0.5]], dtype=torch.float64)
    assert greedy_starts(x, uniform).tolist() == [[0.0], [3.0]]
    assert greedy_starts(x, uniform[:, :1]).tolist() == [[0.0], [1.0]]


def test_more_clusters_than_points_that_differ() -> None:
    centroids, labels = kmeans(torch.ones(6, 2).double(), num_clusters=4, seed=0, restarts=2)
    assert centroids.tolist() == [[1.0, 1.0]] * 4
    assert labels.tolist() == [0] * 6


def test_prototypes_stay_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU they are scikit-learn's, elsewhere those of here; the meta device stands for it.

    The scores of the one are those of the other where the clusters are clear.
    """
    clear = torch.eye(3, dtype=torch.float64).repeat(20, 1) + 0.01 * points(60)[:, :3]
    of_cpu = prototypes.self_supervised(clear, num_clusters=3, seed=0)
    seen: list[Any] = []

    def noted(unit: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append((unit.device.type, options))
        return unit[: options["num_clusters"]], torch.zeros(len(unit), device=unit.device).long()

    monkeypatch.setattr(prototypes, "kmeans", noted)
    unit = prototypes.unit_embeddings(clear)
    centroids, labels = prototypes.clusters(unit.to("meta"), num_clusters=3, seed=5)
    assert seen == [("meta", {"num_clusters": 3, "seed": 5, "restarts": 4})]
    assert centroids.is_meta
    assert labels.is_meta
    monkeypatch.undo()
    monkeypatch.setattr(
        prototypes, "_of_scikit_learn",
        lambda unit, count, seed: kmeans(unit, num_clusters=count, seed=seed, restarts=4),
    )  # fmt: skip
    of_here = prototypes.self_supervised(clear, num_clusters=3, seed=0)
    torch.testing.assert_close(of_here, of_cpu)


def test_starts_and_sums_never_wait_for_the_host() -> None:
    """One look a step, in `settled`, is all that the host reads; see its loop."""
    captured = pytest.importorskip("fedprune.local.captured", reason="needs flwr")
    x, uniform = points(20).to("meta"), room._drawn(4, 0, 0).to("meta")
    with captured.Watch(torch.device("meta")) as watch:
        starts = greedy_starts(x, uniform)
        labels, squared = room._nearest(x, starts)
        means = room._means(x, labels, starts)
    assert means.shape == (4, 6)
    assert squared.shape == (20,)
    assert not watch.obstacles
