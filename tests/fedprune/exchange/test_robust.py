"""Robust aggregation against Flower's own strategies, and against plain float64 loops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, MultiKrum
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fedprune.errors import ClientError
from fedprune.exchange import robust
from fedprune.exchange.aggregate import EntryMean, StateMean
from fedprune.exchange.robust import Aggregation, TrimmedEntries
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

ROBUST = ("clipped", "trimmed-mean", "median", "multi-krum")
PATTERNS = Patterns({"a.weight": Pattern.from_positions((4, 10), np.arange(0, 40, 3))})
NORM = ("bn.running_mean", "bn.running_var")


def states(count: int, *, seed: int = 0, liars: int = 0, norms: bool = False) -> list[SparseState]:
    """Clients' states around one start; the last ones lie."""
    generator = np.random.default_rng(seed)
    start = generator.standard_normal(14)
    found = []
    for client in range(count):
        lie = client >= count - liars
        value = start + generator.standard_normal(14) * (50 if lie else 0.1)
        values = {"a.weight": value, "a.bias": generator.standard_normal(3)}
        if norms:
            values |= {NORM[0]: generator.standard_normal(3), NORM[1]: generator.random(3)}
            if lie:
                values |= {NORM[0]: np.full(3, 900.0), NORM[1]: np.full(3, 1e5)}
        as_float = {name: each.astype(np.float32) for name, each in values.items()}
        found.append(SparseState(as_float, PATTERNS))
    return found


def result(
    rule: Aggregation,
    given: Sequence[SparseState],
    *,
    weights: Sequence[int] = (),
    before: SparseState | None = None,
) -> SparseState:
    total = rule.states(before=before)
    for place, state in enumerate(given):
        total.add(state, weight=weights[place] if weights else 10 + place)
    return total.result()


def flowers(strategy: FedTrimmedAvg | FedMedian | MultiKrum, given: Sequence[SparseState]) -> dict:
    """What a strategy of Flower's makes of the same values, laid out dense."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    replies = []
    for place, state in enumerate(given):
        arrays = ArrayRecord({name: Array(value) for name, value in state.dense().items()})
        metrics = MetricRecord({"num-examples": 10 + place})
        question = Message(RecordDict(), place + 1, "train")
        content = RecordDict({"arrays": arrays, "metrics": metrics})
        replies.append(Message(content, reply_to=question))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return {name: array.numpy() for name, array in arrays.items()}


@pytest.mark.parametrize("count", [3, 4, 10, 11])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.45])
def test_a_trimmed_mean_is_that_of_flower_on_dense_arrays(count: int, share: float) -> None:
    given = states(count, liars=int(share * count))
    ours = result(Aggregation("trimmed-mean", byzantine=share), given, before=given[0])
    for name, value in flowers(FedTrimmedAvg(beta=share), given).items():
        np.testing.assert_allclose(ours.dense()[name], value, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_a_median_has_the_bits_of_flower_s(count: int) -> None:
    given = states(count, liars=count // 3)
    ours = result(Aggregation("median"), given, before=given[0]).dense()
    for name, value in flowers(FedMedian(), given).items():
        assert np.array_equal(ours[name], value)


@pytest.mark.parametrize("count", [5, 7, 10])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.3])
def test_multi_krum_chooses_and_weighs_as_flower_does(count: int, share: float) -> None:
    liars = int(share * count)
    given = states(count, seed=count, liars=liars)
    rule = Aggregation("multi-krum", byzantine=share)
    strategy = MultiKrum(num_malicious_nodes=liars, num_nodes_to_select=count - liars)
    ours = result(rule, given, before=given[0]).dense()
    for name, value in flowers(strategy, given).items():
        np.testing.assert_allclose(ours[name], value, rtol=2e-6, atol=2e-6)


def test_krum_scores_of_points_on_a_line() -> None:
    """0, 1, 3, 10 with one liar: the one closest other counts, 1, 1, 4 and 49."""
    points = np.array([0.0, 1.0, 3.0, 10.0])
    distances = (points[:, None] - points) ** 2
    assert robust.krum_scores(distances, 1).tolist() == [1, 1, 4, 49]
    rows = [{"w": np.float32([p])} for p in points]
    assert np.array_equal(robust.squared_distances(rows, ["w"]), distances)


@pytest.mark.parametrize("clip", [0.0, 0.05, 0.5, 1e9])
def test_clipped_is_the_weighted_mean_of_shortened_updates(clip: float) -> None:
    start, *given = states(6, liars=2)
    weights = [3, 1, 4, 1, 5]
    ours = result(Aggregation("clipped", clip=clip), given, weights=weights, before=start)
    flat = [np.concatenate([s.values[n].ravel() for n in s.values]) for s in (start, *given)]
    updates = [each.astype(np.float64) - flat[0] for each in flat[1:]]
    bound = clip or sorted(np.linalg.norm(u) for u in updates)[2]
    expected = flat[0] + sum(
        w * u * min(1, bound / np.linalg.norm(u)) for w, u in zip(weights, updates, strict=True)
    ) / sum(weights)
    found = np.concatenate([ours.values[n].ravel() for n in start.values])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    if clip == 1e9:  # nothing is cut: the plain mean, to the bit
        plain = result(Aggregation(), given, weights=weights)
        assert all(np.array_equal(plain.values[n], ours.values[n]) for n in plain.values)


@pytest.mark.parametrize("kind", ROBUST)
def test_statistics_of_liars_are_cut_off(kind: str) -> None:
    given = states(10, liars=3, norms=True)
    found = result(Aggregation(kind, byzantine=0.3), given, before=given[0]).values
    assert np.abs(found[NORM[0]]).max() < 3
    assert 0 < found[NORM[1]].min() <= found[NORM[1]].max() < 9
    assert np.isfinite(found["a.weight"]).all()


def test_a_variance_about_the_mean_that_is_taken() -> None:
    """Where nothing is cut, of clients that count the same: that of the union of their data."""
    given = states(5, norms=True)
    found = result(Aggregation("trimmed-mean", byzantine=0.0), given).values
    pooled = result(Aggregation(), given, weights=[7] * 5).values
    np.testing.assert_allclose(found[NORM[1]], pooled[NORM[1]], rtol=1e-5)
    by_hand = Aggregation("median")
    one = [
        SparseState({NORM[0]: np.float32([m]), NORM[1]: np.float32([v])})
        for m, v in ((0, 1), (1, 2), (5, 3))
    ]
    # The median mean is 1; 1 + 1, 2 + 0 and 3 + 16 have the median 2.
    assert result(by_hand, one).values[NORM[1]].tolist() == [2.0]


@given(st.permutations(range(7)), st.sampled_from(ROBUST), st.booleans())
def test_the_same_bits_in_every_order_of_replies(order: list[int], kind: str, equal: bool) -> None:
    given = states(7, liars=1, norms=True)
    if equal:  # every score is tied
        given = [given[0]] * 3 + [given[1]] * 4
    rule, weights = Aggregation(kind, byzantine=0.3), [10 + place for place in range(7)]
    one = result(rule, given, before=given[0], weights=weights)
    other = result(
        rule,
        [given[place] for place in order],
        before=given[0],
        weights=[weights[place] for place in order],
    )
    assert list(one.values) == list(other.values)
    assert all(np.array_equal(one.values[n], other.values[n]) for n in one.values)


@pytest.mark.parametrize("kind", ROBUST)
def test_pieces_change_nothing_but_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = states(6, liars=1, norms=True)
    whole = result(Aggregation(kind), given, before=given[0])
    monkeypatch.setattr(robust, "CHUNK", 7)
    small = result(Aggregation(kind), given, before=given[0])
    for name, value in whole.values.items():
        np.testing.assert_allclose(small.values[name], value, rtol=1e-6)


@pytest.mark.parametrize("kind", ROBUST)
def test_states_that_do_not_fit_are_refused(kind: str) -> None:
    first, second = states(2)
    total = Aggregation(kind).states(before=first)
    total.add(first, weight=1)
    moved = Patterns({"a.weight": Pattern.from_positions((4, 10), np.arange(1, 40, 3)[:13])})
    nan = second.replace({"a.bias": np.float32([np.nan, 0, 0])})
    for state in (SparseState(second.values, moved), SparseState({}, PATTERNS), nan):
        with pytest.raises(ClientError):
            total.add(state, weight=1)
    with pytest.raises(ClientError, match="weight 0"):
        total.add(second, weight=0)
    assert total.num_replies == 1


def test_growth_is_the_trimmed_mean_with_zeros_for_what_was_not_sent() -> None:
    generator = np.random.default_rng(3)
    uploads = []
    for _ in range(7):
        indices = np.sort(generator.choice(30, size=12, replace=False))
        uploads.append({"a": (indices, generator.standard_normal(12).astype(np.float32))})
    uploads[2] = {}
    total = TrimmedEntries(0.2)
    for upload in uploads:
        total.add(upload, weight=1)
    indices, values = total.result()["a"]
    dense = np.zeros((7, 30))
    for row, upload in enumerate(uploads):
        if upload:
            dense[row, upload["a"][0]] = upload["a"][1]
    expected = [sorted(column)[1:6] for column in dense.T]
    np.testing.assert_allclose(values, np.mean(expected, axis=1)[indices], rtol=1e-6)
    assert set(indices) == set(np.flatnonzero(dense.any(axis=0)))


def test_a_place_that_liars_alone_send_does_not_grow() -> None:
    honest = {"a": (np.array([1, 4]), np.float32([0.5, -0.2]))}
    lie = {"a": (np.array([7]), np.float32([1e5]))}
    rule = Aggregation("median", byzantine=0.3)
    robust_sum, plain = rule.entries(), EntryMean()
    for entries in [honest] * 7 + [lie] * 3:
        robust_sum.add(entries, weight=10)
        plain.add(entries, weight=10)
    found = dict(zip(*robust_sum.result()["a"], strict=True))
    assert found[7] == 0
    assert found[1] > 0 > found[4]
    assert plain.result()["a"][1].argmax() == 2
    with pytest.raises(ClientError, match="NaN"):
        robust_sum.add({"a": (np.array([1]), np.float32([np.nan]))}, weight=1)


def test_losses_for_a_sample() -> None:
    sums, samples = [2.0, 8.0, 9.0, 1e12], [1, 2, 3, 1]
    of = {kind: Aggregation(kind, byzantine=0.25) for kind in ("mean", "trimmed-mean", "median")}
    plain = of["mean"].mean_of(sums, samples=samples, weights=[1, 2, 3, 0])
    assert plain == pytest.approx(19 / 6)
    assert of["trimmed-mean"].mean_of(sums, samples=samples, weights=samples) == 3.5
    assert of["median"].mean_of(sums, samples=samples, weights=samples) == 3.5


def test_the_mean_is_the_running_sum() -> None:
    assert isinstance(Aggregation().states(), StateMean)
    assert isinstance(Aggregation().entries(), EntryMean)
