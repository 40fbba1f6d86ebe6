"""Does the loss right after pruning foretell the loss after retraining?

Source: Feng et al., Is Oracle Pruning the True Oracle? (2024). Of many subsets of filters that are
kept, each is judged before and after its retraining, and Kendall's tau between the two says how
much the first is worth. The "oracle" keeps the subset that is best before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsemodel.errors import ProtocolError

Subset = tuple[int, ...]
"""Numbers of what is kept, ascending."""


@dataclass(frozen=True)
class RetrainCorrelation:
    """What losses before retraining say of losses after it.

    Attributes:
        tau: Kendall's tau-b, in [-1, 1]; NaN where all losses before, or all after, are equal.
        p: of no correlation, two-sided, by the normal approximation; NaN with `tau`.
        anomaly: share of subsets that end with a lower loss than `oracle`, in [0, 1).
        oracle: the subset of lowest loss before; of equal ones the first.
        best: the subset of lowest loss after; of equal ones the first.
    """

    tau: float
    p: float
    anomaly: float
    oracle: Subset
    best: Subset


def retrain_correlation(
    subsets: Sequence[Sequence[int]], before: ArrayLike, after: ArrayLike
) -> RetrainCorrelation:
    """Kendall's tau between losses before and after retraining, and how often the oracle is beaten.

    Args:
        subsets: what is kept, two of them at least, each once.
        before: loss of each right after pruning, low for good, [subsets]; infinity is a loss.
        after: loss of each after retraining, [subsets].

    Raises:
        ProtocolError: lengths that differ, fewer than two subsets, one that is there twice, or NaN.

    >>> found = retrain_correlation([(0,), (1,), (2,)], [1.0, 2.0, 3.0], [0.2, 0.1, 0.3])
    >>> round(found.tau, 3), round(found.anomaly, 3), found.oracle, found.best
    (0.333, 0.333, (0,), (1,))
    """
    kept = [tuple(subset) for subset in subsets]
    first, last = _losses("before", before, len(kept)), _losses("after", after, len(kept))
    if len({frozenset(subset) for subset in kept}) < len(kept):
        raise ProtocolError("a subset is there twice; give the mean over its repetitions, once")
    tau, p = kendall(first, last)
    oracle = int(first.argmin())
    return RetrainCorrelation(
        tau=tau,
        p=p,
        anomaly=float((last < last[oracle]).mean()),
        oracle=kept[oracle],
        best=kept[int(last.argmin())],
    )


def kendall(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """Kendall's tau-b, and its two-sided p value by the normal approximation.

    tau-b = S / √((pairs − pairs tied in x)(pairs − pairs tied in y)), S the pairs in the same order
    minus those in opposite orders. Under independence S has mean 0 and the variance below, with
    ties in it; no correction for continuity. The approximation is rough below ten values or so.
    Source: Kendall, Rank Correlation Methods (1970). O(n²) time, O(n) memory.

    Args:
        x, y: [n], n of two or more; infinities have their place in the order.

    Returns:
        tau, p; both NaN where all of x, or all of y, are equal.

    Raises:
        ProtocolError: lengths that differ, fewer than two values, or NaN.
    """
    size = np.size(x)
    (a, in_x), (b, in_y) = (_ranks(_losses(name, v, size)) for name, v in (("x", x), ("y", y)))
    same = sum(
        int((np.sign(a[i + 1 :] - a[i]) * np.sign(b[i + 1 :] - b[i])).sum()) for i in range(size)
    )
    pairs = size * (size - 1) // 2
    ties = [sum(t * (t - 1) // 2 for t in counts) for counts in (in_x, in_y)]
    if pairs in ties:
        return math.nan, math.nan
    tau = same / math.sqrt(pairs - ties[0]) / math.sqrt(pairs - ties[1])
    spread = math.sqrt(_variance(size, in_x, in_y))
    return max(-1.0, min(1.0, tau)), math.erfc(abs(same) / spread / math.sqrt(2))


def subsets(n: int, k: int, *, count: int | None = None, seed: int = 0) -> list[Subset]:
    """Subsets of k out of n, each once, in lexicographic order.

    Args:
        count: how many are drawn, all alike likely; None, or no fewer than there are: all of them.
        seed: of the draw.

    Raises:
        ProtocolError: k outside [1, n], or a count below 1.

    >>> subsets(3, 2)
    [(0, 1), (0, 2), (1, 2)]
    """
    if not 1 <= k <= n:
        raise ProtocolError(f"expected 1 <= k <= n, got subsets of {k} out of {n}")
    if count is not None and count < 1:
        raise ProtocolError(f"expected a count of 1 or more subsets, got {count}")
    total = math.comb(n, k)
    random = np.random.default_rng(seed)
    if count is None or 2 * count > total:
        every = list(itertools.combinations(range(n), k))
        if count is None or count >= total:
            return every
        return [every[i] for i in sorted(random.choice(total, count, replace=False).tolist())]
    drawn: set[Subset] = set()
    while len(drawn) < count:  # at most half of all are taken, so every second try is new
        drawn.add(tuple(sorted(random.choice(n, k, replace=False).tolist())))
    return sorted(drawn)


def _losses(name: str, values: ArrayLike, size: int) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (size,) or size < 2:
        raise ProtocolError(
            f"{name}: expected a value for each of {size}, two at least, got shape {array.shape}"
        )
    if np.isnan(array).any():
        raise ProtocolError(
            f"{name} holds NaN at {int(np.isnan(array).argmax())}; give infinity for a training "
            "that diverged"
        )
    return array


def _ranks(values: NDArray[np.float64]) -> tuple[NDArray[np.int64], list[int]]:
    """The place of each among the distinct values, and how often each of these is there."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return places.astype(np.int64), counts.tolist()


def _variance(n: int, x: Sequence[int], y: Sequence[int]) -> float:
    """Variance of S of independent rankings with ties of these sizes."""
    whole, a, b = (sum(t * (t - 1) * (2 * t + 5) for t in counts) for counts in ([n], x, y))
    variance = (whole - a - b) / 18
    a, b = (sum(t * (t - 1) for t in counts) for counts in (x, y))
    variance += a * b / (2 * n * (n - 1))
    a, b = (sum(t * (t - 1) * (t - 2) for t in counts) for counts in (x, y))
    # Of two values there are no three that tie.
    return variance + (a * b / (9 * n * (n - 1) * (n - 2)) if n > 2 else 0.0)
