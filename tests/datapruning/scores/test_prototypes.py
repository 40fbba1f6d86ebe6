"""Distances to prototypes against plain float64 loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from datapruning.errors import ScoreError
from datapruning.scores import prototypes
from datapruning.scores.prototypes import self_supervised, supervised
from prunelab.runs.seeds import stream_seed


def blobs(per: int = 30, *, spread: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three clouds about axes of five dimensions, and the number of each sample's cloud."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(3).repeat(per)
    centres = 2 * torch.eye(5, dtype=torch.float64)[label]
    return centres + spread * torch.randn(3 * per, 5, generator=generator).double(), label


def cosine(a: Tensor, b: Tensor) -> float:
    return float(sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))) / (
        math.sqrt(sum(x * x for x in a.tolist())) * math.sqrt(sum(y * y for y in b.tolist()))
    )


def test_self_supervised_is_the_cosine_distance_to_the_nearest_centroid() -> None:
    """Against scikit-learn's own centroids and a loop over samples and centroids."""
    x, _ = blobs()
    unit = np.stack([row / np.linalg.norm(row) for row in x.numpy()])
    means = KMeans(4, n_init=4, random_state=stream_seed(7) % 2**32).fit(unit)
    centroids = torch.from_numpy(means.cluster_centers_)
    expected = [min(1 - cosine(row, c) for c in centroids) for row in x]
    found = self_supervised(x, num_clusters=4, seed=7)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_nearness_is_by_angle_and_not_by_length() -> None:
    """Scaling any sample changes nothing; the untypical sample has the highest score."""
    x, _ = blobs(spread=0.05)
    x[17] = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    scale = torch.linspace(0.1, 9, len(x), dtype=torch.float64)[:, None]
    found = self_supervised(x, num_clusters=3, seed=0)
    torch.testing.assert_close(self_supervised(x * scale, num_clusters=3, seed=0), found)
    assert int(found.argmax()) == 17


def test_blocks_and_minibatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks give the same to float64; mini-batches find the same three clouds."""
    x, label = blobs(spread=0.1)
    whole = self_supervised(x, num_clusters=3, seed=0)
    monkeypatch.setattr(prototypes, "_ENTRIES", 7)
    # Products of other sizes may be added up in another order.
    blocks = self_supervised(x, num_clusters=3, seed=0)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-14)
    monkeypatch.setattr(prototypes, "MINIBATCH_ABOVE", 50)
    some = self_supervised(x, num_clusters=3, seed=0)
    assert not torch.equal(some, whole)
    torch.testing.assert_close(some, whole, atol=2e-3, rtol=0)
    _, cluster = prototypes.clusters(prototypes.unit_embeddings(x), num_clusters=3, seed=0)
    assert len({(int(a), int(b)) for a, b in zip(label, cluster, strict=True)}) == 3


def test_supervised_is_the_cosine_distance_to_the_own_mean() -> None:
    x, label = blobs()
    label = label * 10 - 3  # labels need be neither dense nor positive
    expected = []
    for row, own in zip(x, label, strict=True):
        members = [m / m.norm() for m, other in zip(x, label, strict=True) if other == own]
        expected.append(1 - cosine(row, sum(members) / len(members)))  # type: ignore[arg-type]
    found = supervised(x.float(), label)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=1e-6, rtol=0)


def test_seeds_decide_and_duplicates_do_not_warn() -> None:
    x, _ = blobs(spread=2.0)
    runs = [self_supervised(x, num_clusters=10, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    # More clusters than different samples: a ConvergenceWarning would be an error here.
    assert self_supervised(torch.ones(6, 2), num_clusters=4, seed=0).tolist() == [0.0] * 6


def test_a_zero_embedding_has_distance_one() -> None:
    x, label = blobs()
    x[0] = 0
    assert float(self_supervised(x, num_clusters=3, seed=0)[0]) == 1
    assert float(supervised(x, label)[0]) == 1


def test_what_is_refused() -> None:
    x, label = blobs()
    x[[4, 9]] = math.nan
    with pytest.raises(ScoreError, match=r"2 of 90 embeddings hold NaN .* the first in row 4"):
        self_supervised(x, num_clusters=3, seed=0)
    with pytest.raises(ScoreError, match="7 clusters of 6 samples"):
        self_supervised(torch.eye(6), num_clusters=7, seed=0)
    with pytest.raises(ScoreError, match="90 embeddings but labels of shape"):
        supervised(blobs()[0], label[:5])
    with pytest.raises(ScoreError, match=r"expected embeddings \[N, D\]"):
        supervised(torch.zeros(3), label)
