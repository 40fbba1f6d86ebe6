"""Schedules at points worked by hand, and the order in which blocks are visited."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sparsemodel.errors import DensityError, SparseModelError
from sparsemodel.masks.schedule import (
    adjustment_counts,
    average_density,
    block_of_adjustment,
    cosine,
    cubic,
    linear,
)


def test_the_cubic_from_dense_to_a_tenth_in_ten_steps() -> None:
    """Sparsities .9 (1 − (1 − t/10)³), as Zhu and Gupta have them."""
    published = [0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9]
    found = [1 - cubic(step, start=0, end=10, final=0.1) for step in range(11)]
    assert found == pytest.approx(published, abs=1e-12)


@pytest.mark.parametrize("schedule", [cubic, linear])
def test_schedules_rest_before_and_after_their_window(schedule: Any) -> None:
    """And half of a window of 4 from .8 to .4 is .4 + .4 · .5³, or .4 + .4 · .5."""
    densities = [schedule(t, start=2, end=6, initial=0.8, final=0.4) for t in (0, 2, 4, 6, 9)]
    middle = 0.45 if schedule is cubic else 0.6
    assert densities == [0.8, 0.8, pytest.approx(middle), 0.4, 0.4]


@pytest.mark.parametrize(("schedule", "factor"), [(cubic, 0.625), (linear, 0.5)])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_average_density_of_a_window_in_steps(
    schedule: Any, factor: float, sparsity: float
) -> None:
    """Over the middle half the sparsity averages 3/4 or 1/2 of its end, over the last fourth all.

    A sum over whole steps is s/2 steps above that integral.
    """
    steps = 10_000
    found = average_density(
        lambda t: schedule(t, start=steps // 4, end=3 * steps // 4, final=1 - sparsity), steps
    )
    assert found == pytest.approx(1 - factor * sparsity + sparsity / 2 / steps, abs=1e-7)


@pytest.mark.parametrize(("sparsity", "mean"), [(0.8, 0.3206), (0.5, 0.6307)])
def test_average_density_of_a_window_in_compute(sparsity: float, mean: float) -> None:
    steps = 10_000
    found = average_density(
        lambda t: cubic(t, start=steps // 4, end=3 * steps // 4, final=1 - sparsity),
        steps,
        of_compute=True,
    )
    assert found == pytest.approx(mean, abs=1e-4)


def test_cosine_to_a_lowest_value() -> None:
    """GraNet's regeneration: from .5 by (.5 + .005) / 2 in the middle to .005, and no lower."""
    rates = [cosine(step, value=0.5, end=40, lowest=0.005) for step in (0, 20, 40, 70)]
    assert rates == pytest.approx([0.5, 0.2525, 0.005, 0.005])


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
    with pytest.raises(SparseModelError, match="start < end"):
        cubic(0, start=5, end=5, final=0.1)
    with pytest.raises(SparseModelError, match="step >= 0"):
        linear(-1, start=0, end=5, final=0.1)
    for final in (0.0, 1.1, float("nan")):
        with pytest.raises(DensityError, match=r"\(0, 1\]"):
            cubic(0, start=0, end=5, final=final)
    with pytest.raises(SparseModelError, match="one step"):
        average_density(lambda _: 1.0, 0)
    with pytest.raises(SparseModelError, match=r"\[0, 1\]"):
        adjustment_counts({"a": 1}, {"a": 2}, rate=float("nan"))
    with pytest.raises(SparseModelError, match="capacity 2"):
        adjustment_counts({"a": 3}, {"a": 2}, rate=0.1)
    with pytest.raises(SparseModelError, match="num_blocks"):
        block_of_adjustment(0, 0)
