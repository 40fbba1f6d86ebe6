"""The weighted mean: exact, independent of order, and refusing what is not a number."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.errors import ClientError
from fedprune.exchange.aggregate import MAX_TOTAL_WEIGHT, EntryMean, StateMean, WeightedMean
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import Entries, SparseState

floats = st.floats(-1000, 1000, width=32)


def test_weighted_mean_by_hand() -> None:
    """(1·2 + 3·6) / 4 = 5 and (1·0 + 3·(−4)) / 4 = −3."""
    mean = WeightedMean()
    mean.add({"w": np.float32([2.0, 0.0])}, weight=1)
    mean.add({"w": np.float32([6.0, -4.0])}, weight=3)
    assert mean.result()["w"].tolist() == [5.0, -3.0]
    assert (mean.total_weight, mean.num_replies) == (4, 2)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(floats, min_size=3, max_size=3), st.integers(1, 10_000)),
        min_size=2,
        max_size=4,
    )
)
def test_bits_do_not_depend_on_the_order_of_replies(
    replies: list[tuple[list[float], int]],
) -> None:
    results = set()
    for order in itertools.permutations(replies):
        mean = WeightedMean()
        for values, weight in order:
            mean.add({"w": np.float32(values)}, weight=weight)
        results.add(mean.result()["w"].tobytes())
    assert len(results) == 1


def test_sums_on_a_device_have_the_same_bits() -> None:
    """Sums by torch, which a GPU's kernels are held to, and those of numpy; of many chunks."""
    random = np.random.default_rng(0)
    replies = [
        {
            "w": np.float32(random.standard_normal((500, 300)) * 10.0**-k),
            "bn.running_mean": np.float32(random.standard_normal(7)),
            "bn.running_var": np.float32(random.random(7)),
        }
        for k in range(3)
    ]
    pairs = [("bn.running_mean", "bn.running_var")]
    means = WeightedMean(pairs), WeightedMean(pairs, device="cpu")
    for mean in means:
        for weight, reply in enumerate(replies, 1):
            mean.add(reply, weight=weight)
    ours, theirs = (mean.result() for mean in means)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(floats, st.integers(1, 100_000)), min_size=1, max_size=8))
def test_equals_the_float64_reference(pairs: list[tuple[float, int]]) -> None:
    mean = WeightedMean()
    for value, weight in pairs:
        mean.add({"w": np.float32([value])}, weight=weight)
    total = sum(weight for _, weight in pairs)
    expected = sum(value * weight for value, weight in pairs) / total
    assert mean.result()["w"].item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_one_reply_comes_back_unchanged() -> None:
    """A mean over one client is that client, bit by bit, down to small magnitudes."""
    value = np.float32(np.random.default_rng(0).standard_normal(1000) * 1e-3)
    mean = WeightedMean()
    mean.add({"w": value}, weight=37)
    assert np.array_equal(mean.result()["w"], value)


def test_variance_is_that_of_the_union() -> None:
    """Clients {1, 3} and {5, 5, 8, 10}: together mean 16/3 and variance 80/9.

    Averaging the clients' variances instead would give (1·2 + 4.5·4) / 6 = 10/3.
    """
    groups = [np.float32([1.0, 3.0]), np.float32([5.0, 5.0, 8.0, 10.0])]
    mean = WeightedMean([("m", "v")])
    for group in groups:
        statistics = {"m": group.mean(keepdims=True), "v": group.var(keepdims=True)}
        mean.add(statistics, weight=len(group))
    union = np.concatenate(groups)
    result = mean.result()
    assert result["m"].item() == pytest.approx(16 / 3, abs=1e-6)
    assert result["v"].item() == pytest.approx(80 / 9, abs=1e-5)
    assert result["v"].item() == pytest.approx(union.var(), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 2.0**20])
def test_refused_reply_leaves_the_mean_as_it_was(bad: float) -> None:
    mean = WeightedMean()
    mean.add({"a": np.float32([1.0]), "b": np.float32([2.0])}, weight=1)
    with pytest.raises(ClientError, match="'b'"):
        mean.add({"a": np.float32([5.0]), "b": np.float32([bad])}, weight=1)
    assert mean.result()["a"].item() == 1.0
    assert mean.total_weight == 1


def test_refuses_other_names_shapes_and_weights() -> None:
    mean = WeightedMean()
    mean.add({"a": np.zeros(2, np.float32)}, weight=1)
    with pytest.raises(ClientError, match="differ"):
        mean.add({"b": np.zeros(2, np.float32)}, weight=1)
    with pytest.raises(ClientError, match="shape"):
        mean.add({"a": np.zeros(3, np.float32)}, weight=1)
    for weight in (0, -1, MAX_TOTAL_WEIGHT):
        with pytest.raises(ClientError, match="weight"):
            mean.add({"a": np.zeros(2, np.float32)}, weight=weight)
    with pytest.raises(ClientError, match="no reply"):
        WeightedMean().result()


def test_no_overflow_at_the_limits() -> None:
    """The largest value at the largest total weight still comes back exactly."""
    value = -(2.0**20) + 1
    mean = WeightedMean()
    mean.add({"a": np.float32([value])}, weight=MAX_TOTAL_WEIGHT)
    assert mean.result()["a"].item() == value


def entries(indices: list[int], values: list[float]) -> Entries:
    return {"w": (np.array(indices, np.int64), np.array(values, np.float32))}


def test_entry_mean_counts_missing_as_zero() -> None:
    """Weights 1 and 3: index 2 has (1·4 + 3·8)/4 = 7, index 0 only 1·2/4, index 5 only 3·(−4)/4."""
    mean = EntryMean()
    mean.add(entries([0, 2], [2.0, 4.0]), weight=1)
    mean.add(entries([2, 5], [8.0, -4.0]), weight=3)
    indices, values = mean.result()["w"]
    assert indices.tolist() == [0, 2, 5]
    assert values.tolist() == [0.5, 7.0, -3.0]
    assert (indices.dtype, values.dtype) == (np.int64, np.float32)


def test_entry_mean_of_a_silent_layer() -> None:
    """A client that sends nothing for a layer still counts in the total weight."""
    mean = EntryMean()
    mean.add(entries([1], [2.0]), weight=1)
    mean.add({}, weight=1)
    assert mean.result()["w"][1].tolist() == [1.0]


def test_entry_mean_refuses_nan() -> None:
    with pytest.raises(ClientError, match="NaN"):
        EntryMean().add(entries([1], [float("nan")]), weight=1)


def test_entry_mean_refuses_more_weight_than_its_sums_hold() -> None:
    mean = EntryMean()
    mean.add(entries([1], [2.0]), weight=MAX_TOTAL_WEIGHT)
    with pytest.raises(ClientError, match="weight 1"):
        mean.add(entries([1], [2.0]), weight=1)
    assert mean.result()["w"][1].tolist() == [2.0]


def state(values: list[float], *, mean: float, variance: float, at: list[int]) -> SparseState:
    """A layer of four weights with some of them, and a batch norm's statistics."""
    patterns = Patterns({"w": Pattern.from_positions((2, 2), np.array(at))})
    arrays = {"w": values, "bn.running_mean": [mean], "bn.running_var": [variance]}
    return SparseState({n: np.array(v, np.float32) for n, v in arrays.items()}, patterns)


def test_mean_of_states_by_hand() -> None:
    """Weights 1 and 3: (1·2 + 3·6)/4 = 5; clients {1, 1} and {5, 5, 5, 5, 5, 5} have together
    the mean 4 and the variance (1·1 + 3·25)/4 − 16 = 3, though each has none.
    """
    mean = StateMean()
    assert mean.num_replies == 0
    mean.add(state([2.0, 0.0], mean=1.0, variance=0.0, at=[0, 3]), weight=1)
    mean.add(state([6.0, -4.0], mean=5.0, variance=0.0, at=[0, 3]), weight=3)
    result = mean.result()
    assert mean.num_replies == 2
    assert result.patterns is not None
    assert result.patterns["w"].positions().tolist() == [0, 3]
    assert {name: value.tolist() for name, value in result.values.items()} == {
        "w": [5.0, -3.0],
        "bn.running_mean": [4.0],
        "bn.running_var": [3.0],
    }
    assert all(value.dtype == np.float32 for value in result.values.values())


def test_a_state_under_another_mask_is_refused_and_leaves_the_mean_as_it_was() -> None:
    mean = StateMean()
    first = state([1.0, 2.0], mean=0.0, variance=1.0, at=[0, 3])
    mean.add(first, weight=1)
    for other in (
        state([1.0, 2.0], mean=0.0, variance=1.0, at=[0, 2]),
        SparseState(first.values),
        state([1.0, float("nan")], mean=0.0, variance=1.0, at=[0, 3]),
    ):
        with pytest.raises(ClientError):
            mean.add(other, weight=1)
    assert mean.num_replies == 1
    assert mean.result().values["w"].tolist() == [1.0, 2.0]


def test_no_state_has_no_mean() -> None:
    mean = StateMean()
    with pytest.raises(ClientError, match="NaN"):
        mean.add(state([float("nan"), 0.0], mean=0.0, variance=1.0, at=[0, 3]), weight=1)
    with pytest.raises(ClientError, match="no reply"):
        mean.result()
    # What was refused binds nobody.
    mean.add(state([3.0], mean=0.0, variance=1.0, at=[1]), weight=1)
    assert mean.result().values["w"].tolist() == [3.0]
