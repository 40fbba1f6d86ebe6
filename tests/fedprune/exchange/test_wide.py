"""Numbers of nearly any size through means that hold those below 2^20."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.errors import ClientError
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import Expected, Reply, Request
from fedprune.exchange.pooled import pooled
from fedprune.exchange.wide import PARTS, joined, parted

BOUND = 2.0**-22
SIZES = st.one_of(
    st.just(0.0),
    st.floats(2.0**-76, 2.0**59),
    st.sampled_from([2.0**-28, np.nextafter(2.0**-28, 0), 2.0**20, np.nextafter(2.0**20, 0)]),
)
CLIENTS = st.lists(st.tuples(SIZES, st.integers(1, 10**6)), min_size=1, max_size=8)


def mean_of(values: list[tuple[float, int]]) -> float:
    """By the sums of a run, each reply through its gate."""
    expected = Expected(tensors={part: ["a"] for part in PARTS}, shapes={"a": (1,)})
    replies = []
    for client, (value, weight) in enumerate(values):
        reply = Reply(weight, tensors=parted({"a": np.array([value])}))
        check_parts(reply, Request("ask", expected=expected))
        replies.append((client, reply))
    found = joined(pooled(replies, expected).tensors)["a"]
    return float(found[0])


@given(CLIENTS)
def test_means_are_as_exact_as_promised(values: list[tuple[float, int]]) -> None:
    """Against exact fractions; numbers in all three parts at once."""
    weight = sum(weight for _, weight in values)
    exact = sum((Fraction(value) * weight for value, weight in values), Fraction(0)) / weight
    assert abs(Fraction(mean_of(values)) - exact) <= Fraction(BOUND) * exact + Fraction(2.0**-99)


@given(CLIENTS, st.randoms())
def test_the_order_of_answers_changes_no_bit(
    values: list[tuple[float, int]], random: np.random.Generator
) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[arg-type]
    assert mean_of(shuffled) == mean_of(values)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (2.0**-76, "small"),
        (np.nextafter(np.float32(2.0**-28), np.float32(0)), "small"),
        (2.0**-28, "middle"),
        (1.0, "middle"),
        (np.nextafter(np.float32(2.0**20), np.float32(0)), "middle"),
        (np.nextafter(2.0**20, 0), "large"),  # of which float32 makes 2^20
        (2.0**20, "large"),
        (2.0**59, "large"),
    ],
)
def test_each_number_is_in_one_part(value: float, part: str) -> None:
    found = parted({"a": np.array([value])})
    assert [name for name in PARTS if found[name]["a"].any()] == [part]
    assert all(some["a"].dtype == np.float32 for some in found.values())
    assert all(abs(some["a"]).max() < 2.0**20 for some in found.values())
    assert joined(found)["a"].tolist() == [float(np.float32(value))]


@pytest.mark.parametrize("value", [-1.0, -1e-30, math.nan, math.inf, 2.0**60, 1e300])
def test_what_no_sum_of_squares_is_is_refused(value: float) -> None:
    with pytest.raises(ClientError, match="'a' holds numbers below 0"):
        parted({"a": np.array([1.0, value])})
