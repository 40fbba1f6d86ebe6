"""Ranks and metrics against plain loops, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datapruning.errors import ScoreError
from datapruning.recommend.metrics import ranking_metrics, target_ranks
from datapruning.recommend.ragged import Ragged


def plain_ranks(scores: list[list[float]], targets: list[list[int]]) -> list[int]:
    """Sort each row with the targets last among equals, and look the targets up."""
    ranks = []
    for row, wanted in zip(scores, targets, strict=True):

        def key(
            item: int, row: list[float] = row, wanted: list[int] = wanted
        ) -> tuple[float, bool]:
            value = row[item - 1]
            if math.isnan(value):
                value = -math.inf if item in wanted else math.inf
            return (-value, item in wanted)

        order = sorted(range(1, len(row) + 1), key=key)
        ranks += [order.index(item) + 1 for item in wanted]
    return ranks


def plain_metrics(ranks: list[list[int]], k: int) -> list[tuple[float, float, float]]:
    found = []
    for row in ranks:
        hits = [rank for rank in row if rank <= k]
        gain = sum(1 / math.log2(rank + 1) for rank in hits)
        best = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(row)) + 1))
        found.append((len(hits) / len(row), gain / best, 1 / min(row)))
    return found


@st.composite
def rankings(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]]]:
    num_items, num_rows = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    value = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 0.5, 2.0, math.nan])
    scores = [
        draw(st.lists(value, min_size=num_items, max_size=num_items)) for _ in range(num_rows)
    ]
    item = st.integers(1, num_items)
    targets = [draw(st.lists(item, min_size=1, max_size=num_items, unique=True)) for _ in scores]
    return scores, targets


@settings(max_examples=150, deadline=None)
@given(rankings())
def test_ranks_are_those_of_a_sorted_list(
    problem: tuple[list[list[float]], list[list[int]]],
) -> None:
    scores, targets = problem
    found = target_ranks(torch.tensor(scores), Ragged.of(targets))
    # Which of several equal targets comes first does not matter to any metric.
    expected, start = plain_ranks(scores, targets), 0
    for row in targets:
        stop = start + len(row)
        assert sorted(found[start:stop].tolist()) == sorted(expected[start:stop])
        start = stop


@settings(max_examples=60, deadline=None)
@given(rankings(), st.integers(1, 10))
def test_metrics_are_those_of_a_loop(
    problem: tuple[list[list[float]], list[list[int]]], k: int
) -> None:
    scores, targets = problem
    rows = Ragged.of(targets)
    ranks = target_ranks(torch.tensor(scores), rows)
    found = ranking_metrics(ranks, rows, cutoffs=[k])
    by_row = Ragged(ranks, rows.starts)
    expected = plain_metrics([by_row[row].tolist() for row in range(len(rows))], k)
    got = torch.stack([found[f"recall@{k}"], found[f"ndcg@{k}"], found["mrr"]], dim=1)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_a_constant_recommender_gets_the_worst_place() -> None:
    ranks = target_ranks(torch.zeros(2, 7), Ragged.of([[3], [1, 7]]))
    assert sorted(ranks.tolist()) == [6, 7, 7]


def test_by_hand() -> None:
    """Targets at places 2 and 5 of 6: NDCG@5 = (1/log₂3 + 1/log₂6) / (1 + 1/log₂3)."""
    targets = Ragged.of([[4, 2]])
    ranks = target_ranks(torch.tensor([[0.9, 0.2, 0.5, 0.8, 0.4, 0.1]]), targets)
    assert ranks.tolist() == [2, 5]
    found = ranking_metrics(ranks, targets, cutoffs=[5])
    expected = (1 / math.log2(3) + 1 / math.log2(6)) / (1 + 1 / math.log2(3))
    assert found["ndcg@5"].item() == pytest.approx(expected)
    assert found["mrr"].item() == 0.5


def test_items_without_a_score_are_refused() -> None:
    with pytest.raises(ScoreError, match="1 to 3"):
        target_ranks(torch.zeros(1, 3), Ragged.of([[4]]))
    with pytest.raises(ScoreError, match="2 rows of scores for 1"):
        target_ranks(torch.zeros(2, 3), Ragged.of([[1]]))
