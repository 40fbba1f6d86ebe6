"""Near-duplicates, D² and k-centre against plain float64 loops; no N × N matrix anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datapruning.errors import ScoreError
from datapruning.scores import prototypes
from datapruning.scores.geometry import d2, k_center, semdedup


def points(n: int, d: int, *, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(a: Tensor, b: Tensor) -> float:
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a.tolist(), b.tolist(), strict=True)))


# --- SemDeDup ------------------------------------------------------------------------------------


def test_semdedup_equals_a_loop_over_clusters() -> None:
    x = points(80, 4)
    unit = prototypes.unit_embeddings(x)
    centroids, cluster = prototypes.clusters(unit, num_clusters=5, seed=3)
    expected = torch.empty(80, dtype=torch.float64)
    for number in range(5):
        members = [i for i in range(80) if int(cluster[i]) == number]
        members.sort(key=lambda i: float(unit[i] @ centroids[number]))
        for place, i in enumerate(members):
            before = [float(unit[i] @ unit[j]) for j in members[:place]]
            expected[i] = 1 - max(before, default=-1.0)
    torch.testing.assert_close(semdedup(x, num_clusters=5, seed=3), expected)


def test_planted_duplicates_are_found() -> None:
    """200 samples, 20 of them copies, 20 more copies with noise of 1e-4: all 40, nothing else.

    Of two samples at cosine distance below 1e-6 one goes; independent ones in 16 dimensions are
    nowhere as near.
    """
    x = points(160, 16)
    copies, near = x[:20].clone(), x[20:40] * 3 + 1e-4 * points(20, 16, seed=1)
    scores = semdedup(torch.cat([x, copies, near]), num_clusters=4, seed=0)
    is_duplicate = scores < 1e-6
    assert int(is_duplicate.sum()) == 40
    pairs = [(i, 160 + i) for i in range(40)]
    assert all(bool(is_duplicate[a]) != bool(is_duplicate[b]) for a, b in pairs)
    assert int((scores == 2).sum()) == 4  # the first of each cluster


def test_of_duplicates_the_outermost_stays() -> None:
    """One cluster about (1, 0): the sample at 0.1 rad goes before the one at 0.09 rad."""
    angles = torch.tensor([0.0, 0.09, 0.1, -0.08], dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin()], 1)
    scores = semdedup(x, num_clusters=1, seed=0)
    centre = math.atan2(float(x[:, 1].mean()), float(x[:, 0].mean()))
    order = sorted(range(4), key=lambda i: -abs(float(angles[i]) - centre))
    assert float(scores[order[0]]) == 2
    for place, i in enumerate(order[1:], start=1):
        nearest = min(abs(float(angles[i] - angles[j])) for j in order[:place])
        assert float(scores[i]) == pytest.approx(1 - math.cos(nearest), abs=1e-12)


# --- D² ------------------------------------------------------------------------------------------


def plain_d2(x: Tensor, scores: list[float], k: int, forward: float, reverse: float) -> list[int]:
    """Rows in the order of choice, by the definition, with dense lists."""
    n = len(x)
    near = [
        sorted((j for j in range(n) if j != i), key=lambda j: distance(x[i], x[j]))[:k]
        for i in range(n)
    ]
    edges = {(i, j) for i in range(n) for j in near[i]} | {
        (j, i) for i in range(n) for j in near[i]
    }
    mean = sum(distance(x[i], x[j]) ** 2 for i, j in edges) / len(edges)
    message = {(i, j): distance(x[i], x[j]) ** 2 / mean for i, j in edges}
    value = [
        scores[i]
        + sum(math.exp(-forward * message[i, j]) * scores[j] for j in range(n) if (i, j) in edges)
        for i in range(n)
    ]
    chosen: list[int] = []
    while len(chosen) < n:
        best = max((i for i in range(n) if i not in chosen), key=lambda i: value[i])
        chosen.append(best)
        for j in range(n):
            if (best, j) in edges and j not in chosen:
                value[j] -= math.exp(-reverse * message[best, j]) * value[best]
    return chosen


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 25), st.integers(1, 4), st.integers(0, 99), st.sampled_from([0.3, 0.5, 2.0]))
def test_d2_equals_the_definition(n: int, k: int, seed: int, gamma: float) -> None:
    k = min(k, n - 1)
    x = points(n, 3, seed=seed)
    scores = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = d2(x, scores, num_neighbors=k, forward=gamma, reverse=1.0 + gamma)
    order = plain_d2(x, scores.tolist(), k, gamma, 1.0 + gamma)
    expected = torch.empty(n, dtype=torch.float64)
    expected[torch.tensor(order)] = torch.arange(n, 0, -1, dtype=torch.float64)
    assert torch.equal(found, expected)


def test_d2_passes_over_the_neighbours_of_what_it_took() -> None:
    """Two tight clouds, one a little harder: by score all of it first, by D² the clouds in turn."""
    x = torch.cat([points(10, 2) * 0.01, points(10, 2, seed=1) * 0.01 + 5])
    scores = torch.cat([torch.linspace(1.0, 1.1, 10), torch.linspace(0.8, 0.9, 10)]).double()
    found = d2(x, scores, num_neighbors=5)
    first = torch.topk(found, 2).indices
    assert sorted((first >= 10).tolist()) == [False, True]


def test_d2_refuses() -> None:
    x = points(5, 2)
    with pytest.raises(ScoreError, match="finite and at least 0"):
        d2(x, torch.tensor([1.0, 2, -1, 3, 4]))
    with pytest.raises(ScoreError, match="num_neighbors = 10: expected 1 to 4"):
        d2(x, torch.ones(5))
    with pytest.raises(ScoreError, match="scores of shape"):
        d2(x, torch.ones(4), num_neighbors=2)
    with pytest.raises(ScoreError, match="forward and reverse"):
        d2(x, torch.ones(5), num_neighbors=2, forward=-1)


# --- k-centre ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(0, 99), st.data())
def test_k_center_equals_a_loop(n: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, n))
    x = points(n, 3, seed=seed)
    found = k_center(x, seed=seed, count=count)
    assert sorted(found.tolist()) == list(range(1, n + 1))
    chosen = [int(found.argmax())]
    while len(chosen) < n:
        centres = chosen[:count]
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance(x[i], x[c]) for c in centres)))
    assert torch.argsort(found, descending=True).tolist() == chosen


def test_k_center_starts_by_the_seed_and_covers() -> None:
    """Of five clouds far apart, the first five are one of each, wherever it starts."""
    x = torch.cat([points(20, 2, seed=i) * 0.1 + 10 * i for i in range(5)])
    starts = set()
    for seed in range(8):
        first = torch.topk(k_center(x, seed=seed), 5).indices
        starts.add(int(first[0]))
        assert sorted((first // 20).tolist()) == [0, 1, 2, 3, 4]
    assert len(starts) > 4
    with pytest.raises(ScoreError, match="count = 101: expected 1 to 100"):
        k_center(x, seed=0, count=101)


def test_k_center_tells_near_samples_apart_far_from_zero() -> None:
    """At 1e8 the product form of distances has no digit left for differences of 1e-4."""
    x = 1e8 + 1e-4 * torch.tensor([[0.0], [4], [1], [9], [6]], dtype=torch.float64)
    for seed in range(6):
        order = torch.argsort(k_center(x, seed=seed), descending=True).tolist()
        for place in range(1, 5):
            near = [min(distance(x[i], x[c]) for c in order[:place]) for i in order[place:]]
            assert near[0] == max(near)


# --- memory --------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers how many entries the largest tensor had that any operation made."""

    entries = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return made


@pytest.mark.parametrize(
    "score",
    [
        lambda x: semdedup(x, num_clusters=2, seed=0),
        lambda x: d2(x, torch.ones(len(x)), num_neighbors=5),
        lambda x: k_center(x, seed=0, count=5),
        lambda x: prototypes.self_supervised(x, num_clusters=300, seed=0),
    ],
    ids=["semdedup", "d2", "k_center", "prototypes"],
)
def test_no_operation_makes_a_matrix_of_all_to_all(
    score: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 samples of 8 numbers, blocks of at most 20,000 entries: far from 1,000,000."""
    monkeypatch.setattr(prototypes, "_ENTRIES", 20_000)
    x = points(1000, 8)
    with Largest() as largest:
        score(x)
    assert 8000 <= largest.entries <= 20_000
