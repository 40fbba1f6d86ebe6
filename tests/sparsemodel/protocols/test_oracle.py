"""Kendall's tau against scipy and by hand; subsets counted; what the oracle is worth, planted."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy import stats

from sparsemodel.errors import ProtocolError
from sparsemodel.protocols.oracle import kendall, retrain_correlation, subsets

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=40)


@given(PAIRS)
def test_tau_and_p_are_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    x, y = zip(*pairs, strict=True)
    tau, p = kendall(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(tau)
        assert math.isnan(p)
        return
    if len(pairs) > 2:  # of two scipy divides by zero
        expected = stats.kendalltau(x, y, method="asymptotic")
        assert tau == pytest.approx(expected.statistic, abs=1e-12)
        assert p == pytest.approx(expected.pvalue, rel=1e-9)
    assert kendall(y, x) == pytest.approx((tau, p))
    assert kendall(x, [-value for value in y]) == pytest.approx((-tau, p))


@pytest.mark.parametrize("ties", [False, True])
def test_of_many_values_too(ties: bool) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=500)
    y = x + 3 * random.normal(size=500)
    if ties:
        x, y = x.round(), y.round(1)
    expected = stats.kendalltau(x, y, method="asymptotic")
    assert kendall(x, y) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)


def test_by_hand() -> None:
    """Of six pairs five are in order and one is not: tau 4/6; S has variance 4 · 3 · 13 / 18."""
    tau, p = kendall([1, 2, 3, 4], [1, 2, 4, 3])
    assert tau == pytest.approx(2 / 3)
    assert p == pytest.approx(math.erfc(4 / math.sqrt(2 * 4 * 3 * 13 / 18)))
    assert kendall([1, 2], [5, 6]) == pytest.approx((1.0, math.erfc(math.sqrt(0.5))))
    assert kendall([1.0, 2.0, math.inf], [0.0, 1.0, 2.0])[0] == 1.0


def test_an_oracle_that_is_one_and_one_that_misleads() -> None:
    every = subsets(6, 3)
    loss = np.random.default_rng(1).permutation(len(every)).astype(float)
    right = retrain_correlation(every, loss, np.exp(loss / 20))
    assert (right.tau, right.anomaly, right.oracle) == (1.0, 0.0, right.best)
    assert right.p < 1e-8
    wrong = retrain_correlation(every, loss, -loss)
    assert (wrong.tau, wrong.anomaly) == (-1.0, 19 / 20)
    assert wrong.oracle == right.oracle == every[int(loss.argmin())]
    assert wrong.best == every[int(loss.argmax())]


def test_chance_is_not_called_a_correlation() -> None:
    """Of 400 independent pairs about 5 % have p < .05: within four deviations of 20, ± 17.4."""
    random = np.random.default_rng(2)
    ps = [kendall(random.normal(size=30), random.normal(size=30))[1] for _ in range(400)]
    assert 3 <= sum(p < 0.05 for p in ps) <= 37


def test_ties_go_to_the_first_and_are_no_anomaly() -> None:
    found = retrain_correlation([[2], [0], [1]], [1, 1, 2], [3, 3, 3])
    assert (found.oracle, found.best, found.anomaly) == ((2,), (2,), 0.0)
    assert math.isnan(found.tau)


@given(st.integers(1, 8), st.data())
def test_subsets_are_distinct_and_as_many_as_asked_for(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    count = data.draw(st.integers(1, math.comb(n, k) + 2))
    every = list(combinations(range(n), k))
    assert subsets(n, k) == every
    drawn = subsets(n, k, count=count, seed=3)
    assert len(drawn) == min(count, len(every))
    assert set(drawn) <= set(every)
    assert drawn == sorted(set(drawn)) == subsets(n, k, count=count, seed=3)


@pytest.mark.parametrize("count", [2, 7])
def test_all_subsets_are_alike_likely(count: int) -> None:
    """1,000 draws of `count` of 10 subsets: each is in 100 · count; five deviations are allowed."""
    seen = Counter(one for seed in range(1000) for one in subsets(5, 2, count=count, seed=seed))
    share = count / 10
    most = 5 * math.sqrt(1000 * share * (1 - share))
    assert len(seen) == 10
    assert all(abs(times - 1000 * share) < most for times in seen.values())


def test_many_subsets_need_no_list_of_all() -> None:
    assert len(subsets(200, 100, count=5)) == 5


def test_what_cannot_be_judged_is_told() -> None:
    two = [(0,), (1,)]
    for given_subsets, before, after, reason in (
        (two, [1, 2, 3], [1, 2], r"before: .* each of 2, two at least, got shape \(3,\)"),
        (two, [1, 2], [[1, 2]], "after: .* got shape"),
        (two[:1], [1], [1], "two at least"),
        (two, [1, 2], [1, math.nan], "after holds NaN at 1; give infinity"),
        ([(0, 1), (1, 0)], [1, 2], [1, 2], "a subset is there twice"),
    ):
        with pytest.raises(ProtocolError, match=reason):
            retrain_correlation(given_subsets, before, after)
    for n, k, count, reason in (
        (3, 0, None, "1 <= k <= n"), (3, 4, None, "1 <= k <= n"), (3, 2, 0, "a count of 1 or more"),
    ):  # fmt: skip
        with pytest.raises(ProtocolError, match=reason):
            subsets(n, k, count=count)
