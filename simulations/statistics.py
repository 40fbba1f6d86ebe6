"""What a few seeds say: intervals of paired differences, seeds needed, frontiers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from prunelab.pages.units import mean_and_spread

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with the interval that holds the true one in `LEVEL` of all samples.

    Attributes:
        half: half of the interval's width; infinite where one value tells no spread.
        spread: sample standard deviation; NaN of one value.
        count: values.
    """

    mean: float
    half: float
    spread: float
    count: int

    @property
    def verdict(self) -> str:
        """Whether the interval lies above zero, below it, or holds it."""
        if self.mean - self.half > 0:
            return "above"
        return "below" if self.mean + self.half < 0 else "not told apart"


def interval(values: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Student's interval for the mean of independent normal values.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> found.mean, round(found.half, 3)
    (2.0, 2.484)
    """
    count = len(values)
    if count < 2:
        return Interval(statistics.mean(values), math.inf, math.nan, count)
    spread = statistics.stdev(values)
    return Interval(statistics.mean(values), _half(spread, count, level), spread, count)


def told_values(values: Iterable[float], form: str) -> str:
    """Mean ± sample standard deviation; what is infinite, and what is not there, is said.

    >>> told_values([1.0, 3.0], ".1f"), told_values([1.0, math.inf], ".1f"), told_values([], ".1f")
    ('2.0 ± 1.4', 'infinite', '-')
    """
    each = list(values)
    if not each:
        return "-"
    return mean_and_spread(each, form) if all(map(math.isfinite, each)) else "infinite"


def told_ratio(ours: Mapping[int, float], theirs: Mapping[int, float], form: str) -> str:
    """ln(ours / theirs), paired by what both have finite, with its interval.

    >>> told_ratio({0: 2.0, 1: 2.0, 2: 5.0}, {0: 2.0, 1: 2.0, 3: 1.0}, ".1f")
    '+0.0 ± 0.0'
    """
    pairs = [
        math.log(ours[key] / theirs[key])
        for key in sorted(ours.keys() & theirs.keys())
        if math.isfinite(ours[key]) and math.isfinite(theirs[key])
    ]
    if not pairs:
        return "-"
    found = interval(pairs)
    return f"{found.mean:+{form}}" + (f" ± {found.half:{form}}" if found.count > 1 else "")


def seeds_needed(spread: float, *, width: float, level: float = LEVEL) -> int | None:
    """The fewest values of this standard deviation whose interval is narrower than `width`.

    None where the spread is not known.

    >>> seeds_needed(1.0, width=2.0)
    7
    """
    if math.isnan(spread):
        return None
    below, count = 1, 2
    while 2 * _half(spread, count, level) >= width:
        below, count = count, 2 * count
    while count - below > 1:
        middle = (below + count) // 2
        if 2 * _half(spread, middle, level) >= width:
            below = middle
        else:
            count = middle
    return count


def frontier(costs: Sequence[float], gains: Sequence[float]) -> list[bool]:
    """Which points no other one beats: none costs no more and gains no less, one of it truly.

    >>> frontier([1, 2, 3, 3], [5, 4, 9, 8])
    [True, False, True, False]
    """
    points = list(zip(costs, gains, strict=True))
    return [
        not any(
            other_cost <= cost and other_gain >= gain and (other_cost, other_gain) != (cost, gain)
            for other_cost, other_gain in points
        )
        for cost, gain in points
    ]


def _half(spread: float, count: int, level: float) -> float:
    """Half of the width of Student's interval."""
    return float(stdtrit(count - 1, (1 + level) / 2)) * spread / math.sqrt(count)
