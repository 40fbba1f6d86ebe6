"""Intervals, seeds needed and frontiers against closed forms and plain loops."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.statistics import Interval, frontier, interval, seeds_needed


@pytest.mark.parametrize(
    ("values", "quantile"),
    [
        # Student's quantile at p = .975 in closed form: tan(π(p − ½)) for one degree of freedom,
        # (2p − 1) · √(2 / (1 − (2p − 1)²)) for two; for nine 2.262157 (any printed table).
        ([1.0, 4.0], math.tan(0.475 * math.pi)),
        ([1.0, 4.0, 2.5], 0.95 * math.sqrt(2 / (1 - 0.95**2))),
        ([float(k) for k in range(10)], 2.262157),
    ],
)
def test_interval_is_students(values: list[float], quantile: float) -> None:
    found = interval(values)
    expected = quantile * statistics.stdev(values) / math.sqrt(len(values))
    assert found.half == pytest.approx(expected, rel=1e-6)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert (found.count, found.spread) == (len(values), statistics.stdev(values))


def test_verdicts() -> None:
    assert Interval(2.0, 1.9, 1.0, 3).verdict == "above"
    assert Interval(-2.0, 1.9, 1.0, 3).verdict == "below"
    assert Interval(2.0, 2.0, 1.0, 3).verdict == "not told apart"
    one = interval([5.0])
    assert (one.half, one.verdict, one.count) == (math.inf, "not told apart", 1)


@given(st.floats(0.01, 3), st.floats(0.5, 4))
def test_seeds_needed_are_the_fewest(spread: float, width: float) -> None:
    """Half of the width of n values is Student's quantile times spread over √n."""
    found = seeds_needed(spread, width=width)
    assert found is not None

    def is_narrow(count: int) -> bool:
        halves = [spread if k % 2 else -spread for k in range(count)]
        scale = spread / statistics.stdev(halves)
        return 2 * interval([scale * value for value in halves]).half < width

    assert is_narrow(found)
    assert found == 2 or not is_narrow(found - 1)
    assert seeds_needed(math.nan, width=width) is None


points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8)


@given(points)
def test_frontier_beats_everything_else(pairs: list[tuple[int, int]]) -> None:
    on = frontier([cost for cost, _ in pairs], [gain for _, gain in pairs])
    front = [pair for pair, is_on in zip(pairs, on, strict=True) if is_on]
    for (cost, gain), is_on in zip(pairs, on, strict=True):
        beaten = [(c, g) for c, g in front if c <= cost and g >= gain and (c, g) != (cost, gain)]
        assert bool(beaten) != is_on
