"""Agreement of two tables of scores: ranks with ties, kept sets, refusals."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datapruning.errors import ScoreError
from datapruning.selection.agreement import agreement, spearman
from datapruning.selection.table import ScoreTable


def table(scores: list[float], *, ids: list[int] | None = None, data: str = "a") -> ScoreTable:
    names = torch.tensor(list(range(len(scores))) if ids is None else ids)
    return ScoreTable(names, torch.tensor(scores).double(), "el2n", "digits", data, 0)


def test_by_hand() -> None:
    """Ranks 1 2 3 4 against 2 1 4 3: ρ = 1 − 6 · 4 / (4 · 15) = .6. The upper half is {2, 3} in
    both, the best one 3 against 2; order of rows is no matter."""
    found = agreement(
        table([0.1, 0.2, 0.3, 0.4]),
        table([30.0, 40.0, 10.0, 20.0], ids=[3, 2, 1, 0]),
        keeps=[0.25, 0.5, 1.0],
    )
    assert found.spearman == pytest.approx(0.6)
    assert found.overlap == {0.25: 0.0, 0.5: 1.0, 1.0: 1.0}
    assert (found.num_samples, found.num_missing) == (4, 0)


def test_samples_without_a_score_are_left_out() -> None:
    found = agreement(
        table([0.1, math.nan, 0.3, 0.4]), table([1.0, 9.0, 2.0, math.nan]), keeps=[0.5]
    )
    assert (found.num_samples, found.num_missing) == (2, 2)
    assert found.spearman == pytest.approx(1.0)
    assert found.overlap == {0.5: 1.0}


def test_equal_scores_are_drawn_alike_for_both() -> None:
    """A table agrees with itself, whatever its ties; a constant one has no rank correlation."""
    ties = table([float(i % 3) for i in range(40)])
    for seed in range(5):
        assert set(agreement(ties, ties, seed=seed).overlap.values()) == {1.0}
    constant = agreement(ties, table([7.0] * 40))
    assert math.isnan(constant.spearman)
    assert math.isnan(agreement(table([1.0]), table([2.0])).spearman)
    assert math.isnan(spearman(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([1.0, 2.0, 3.0])))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=40))
def test_spearman_is_the_correlation_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    """The mean rank of a value: how many are smaller, and the middle of those that equal it."""
    columns = [list(column) for column in zip(*pairs, strict=True)]
    found = spearman(*(torch.tensor(column).double() for column in columns))
    if any(len(set(column)) == 1 for column in columns):
        assert math.isnan(found)
        return
    ranks = [
        [sum(v < value for v in column) + (column.count(value) + 1) / 2 for value in column]
        for column in columns
    ]
    assert found == pytest.approx(statistics.correlation(*ranks), abs=1e-9)


def test_refusals() -> None:
    scores = table([1.0, 2.0])
    with pytest.raises(ScoreError, match=r"different data: digits \(a\) and digits \(b\)"):
        agreement(scores, table([1.0, 2.0], data="b"))
    with pytest.raises(ScoreError, match=r"different samples \(2 and 3\)"):
        agreement(scores, table([1.0, 2.0, 3.0]))
    with pytest.raises(ScoreError, match="different samples"):
        agreement(scores, table([1.0, 2.0], ids=[0, 2]))
    with pytest.raises(ScoreError, match="none of 2 samples has a score in both"):
        agreement(scores, table([math.nan, math.nan]))
    for keep in (0.0, 1.5):
        with pytest.raises(ScoreError, match="kept fraction must be in"):
            agreement(scores, scores, keeps=[keep])
