"""Schedules at points worked by hand, and the order in which blocks are visited."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sparsemodel.errors import SparseModelError
from sparsemodel.masks.schedule import (
    adjustment_counts,
    block_of_adjustment,
    cosine,
)


def test_cosine_at_points_worked_by_hand() -> None:
    """value/2 (1 + cos(π step/end)): cos is 1, 1/2, 0, −1/2, −1 at 0, 1/3, 1/2, 2/3 and 1."""
    expected = {0: 0.3, 20: 0.225, 30: 0.15, 40: 0.075, 60: 0.0, 61: 0.0}
    for step, value in expected.items():
        assert cosine(step, value=0.3, end=60) == pytest.approx(value)
    assert cosine(60, value=0.3, end=60) == 0.0


def test_cosine_stepped_by_rounds_decays_to_nothing() -> None:
    """Stepped by adjustments (every 10 rounds) it would still be near its start at the end."""
    rates = [cosine(r, value=0.3, end=100) for r in range(0, 100, 10)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.01


def test_adjustment_counts_by_hand() -> None:
    """⌊0.3 · 10⌋ = 3, ⌊0.3 · 9⌋ = 2, one pruned weight left, a full layer, a tiny one."""
    counts = {"a": 10, "b": 9, "c": 10, "d": 10, "e": 1}
    capacities = {"a": 99, "b": 99, "c": 11, "d": 10, "e": 99, "unused": 5}
    assert adjustment_counts(counts, capacities, rate=0.3) == {
        "a": 3,
        "b": 2,
        "c": 1,
        "d": 0,
        "e": 0,
    }


@given(st.integers(0, 1000), st.integers(0, 1000), st.floats(0, 1))
def test_adjustment_counts_stay_within_both_sides(active: int, pruned: int, rate: float) -> None:
    count = adjustment_counts({"a": active}, {"a": active + pruned}, rate=rate)["a"]
    assert 0 <= count <= min(active, pruned)


@pytest.mark.parametrize("num_blocks", [1, 4, 5, 10])
def test_every_block_is_visited_though_the_interval_shares_a_divisor(num_blocks: int) -> None:
    """Every 10 rounds, round % 4 would visit blocks 0 and 2 alone, round % 5 and % 10 one."""
    visited = [block_of_adjustment(r // 10, num_blocks) for r in range(0, 200, 10)]
    assert visited[:num_blocks] == list(range(num_blocks - 1, -1, -1))
    assert visited[num_blocks:] == visited[:-num_blocks]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(SparseModelError, match="end >= 1"):
        cosine(0, value=0.3, end=0)
    with pytest.raises(SparseModelError, match=r"\[0, 1\]"):
        adjustment_counts({"a": 1}, {"a": 2}, rate=float("nan"))
    with pytest.raises(SparseModelError, match="capacity 2"):
        adjustment_counts({"a": 3}, {"a": 2}, rate=0.1)
    with pytest.raises(SparseModelError, match="num_blocks"):
        block_of_adjustment(0, 0)
