"""Adjusting sparse states: equal to plain loops over masked dense tensors, and by hand."""

from __future__ import annotations

import dense_adjust as dense
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemodel.errors import DensityError, MaskError
from sparsemodel.masks.mask import Mask
from sparsemodel.runtime.adjust import carry, largest, prune_and_grow, select_largest
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import LayerEntries, SparseState

BIAS = np.ones(2, dtype=np.float32)


def state_of(active: dict[int, float], size: int) -> SparseState:
    """A layer "a" with those values, and a tensor "bias" that is whole."""
    positions = np.array(sorted(active), dtype=np.int64)
    patterns = Patterns({"a": Pattern.from_positions((size,), positions)})
    values = np.array([active[int(i)] for i in positions], dtype=np.float32)
    return SparseState({"a": values, "bias": BIAS}, patterns)


def active_of(state: SparseState) -> dict[int, float]:
    assert state.patterns is not None
    positions = state.patterns["a"].positions().tolist()
    return dict(zip(positions, state.values["a"].tolist(), strict=True))


def entries(indices: list[int], values: list[float]) -> LayerEntries:
    return np.array(indices, dtype=np.int64), np.array(values, dtype=np.float32)


def test_prune_and_grow_by_hand() -> None:
    """Active 0-3 with |w| 4, 1, 1, 3; candidates 5: -9, 6: 2, 7: 0, exchange up to 3.

    Index 7 has no gradient, so two are exchanged: 5 and 6 grow, 1 and 2 (the smallest) go.
    """
    state = state_of({0: 4.0, 1: -1.0, 2: 1.0, 3: 3.0}, 8)
    new = prune_and_grow(state, {"a": entries([7, 6, 5], [0.0, 2.0, -9.0])}, {"a": 3})
    assert active_of(new) == {0: 4.0, 3: 3.0, 5: 0.0, 6: 0.0}
    assert new.values["a"].dtype == np.float32
    assert new.values["bias"] is BIAS
    assert active_of(state) == {0: 4.0, 1: -1.0, 2: 1.0, 3: 3.0}


def test_what_is_to_be_kept_stays_however_small() -> None:
    """Of 4, 1, 1, ½ the first and the last stay: the second goes first, then the third."""
    state = state_of({0: 4.0, 1: -1.0, 2: 1.0, 3: 0.5}, 8)
    candidates = {"a": entries([5, 6, 7], [3.0, 2.0, 1.0])}
    keep = {"a": np.array([True, False, False, True])}
    one = prune_and_grow(state, candidates, {"a": 1}, keep=keep)
    assert active_of(one) == {0: 4.0, 2: 1.0, 3: 0.5, 5: 0.0}
    all_that_may = prune_and_grow(state, candidates, {"a": 3}, keep=keep)
    assert active_of(all_that_may) == {0: 4.0, 3: 0.5, 5: 0.0, 6: 0.0}


@pytest.mark.parametrize("kind", ["normal", "ties", "masked", "one", "sorted", "comb"])
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.01, 0.2, 0.9, 1.0])
def test_the_largest_of_many_are_those_of_a_stable_sort(kind: str, share: float) -> None:
    generator = np.random.default_rng(1)
    scores = generator.normal(size=200_000).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "masked":
        scores[generator.random(len(scores)) < 0.95] = -np.inf
    elif kind == "one":
        scores[:] = 2.5
    elif kind == "sorted":
        scores.sort()
    elif kind == "comb":  # what a strided sample sees says nothing of the others
        scores[::64] = 99
    count = round(share * len(scores))
    expected = np.zeros(len(scores), dtype=bool)
    expected[np.argsort(-scores, kind="stable")[:count]] = True
    assert np.array_equal(largest(scores, count), expected)


def test_ties_go_to_the_lower_index_on_both_sides() -> None:
    state = state_of({0: 1.0, 1: -1.0, 2: 1.0}, 6)
    new = prune_and_grow(state, {"a": entries([5, 3, 4], [1.0, -1.0, 1.0])}, {"a": 1})
    assert active_of(new) == {1: -1.0, 2: 1.0, 3: 0.0}


def test_a_layer_without_candidates_stays() -> None:
    state = state_of({0: 1.0, 2: 1.0}, 4)
    for candidates in ({}, {"a": entries([], [])}, {"a": entries([1], [0.0])}):
        new = prune_and_grow(state, candidates, {"a": 1})
        assert new.patterns == state.patterns
        assert new.values["a"] is state.values["a"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 4), max_size=3).map(tuple),
    st.integers(0, 30),
    st.integers(0, 2**31),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_equal_to_plain_loops_over_dense_tensors(
    shape: tuple[int, ...], count: int, seed: int, density: float, offered: float
) -> None:
    """Two layers, one of them without candidates; weights and gradients of few different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mask = Mask(
        {n: torch.rand(s, generator=generator) < density for n, s in (("a", shape), ("b", (5,)))}
    )
    weights = {
        n: torch.randint(-3, 4, s, generator=generator) * mask[n].float()
        for n, s in mask.shapes().items()
    }
    pruned = mask.pruned("a")
    chosen = pruned[torch.rand(len(pruned), generator=generator) < offered]
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    gradients = torch.randint(-3, 4, chosen.shape, generator=generator).float()
    counts = {"b": 2, "a": count}

    expected_mask = dense.prune_and_grow(mask, weights, {"a": (chosen, gradients)}, counts)
    expected = dense.carry_weights(weights, old=mask, new=expected_mask)
    state = carry(SparseState({n: w.numpy() for n, w in weights.items()}), mask.csr())
    new = prune_and_grow(state, {"a": (chosen.numpy(), gradients.numpy())}, counts)

    assert new.patterns == expected_mask.csr()
    for name, value in new.dense().items():
        assert np.array_equal(value, expected[name].numpy())
        assert new.values[name].shape == (expected_mask.counts()[name],)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_carry_equals_that_of_dense_tensors(size: int, seed: int, old: float, new: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = [Mask({"a": torch.rand(size, generator=generator) < d}) for d in (old, new)]
    weight = torch.randn(size, generator=generator) * masks[0]["a"]
    state = carry(SparseState({"a": weight.numpy(), "bias": BIAS}), masks[0].csr())
    carried = carry(state, masks[1].csr())
    expected = dense.carry_weights({"a": weight}, old=masks[0], new=masks[1])["a"]
    assert carried.patterns == masks[1].csr()
    assert list(carried.values) == ["a", "bias"]
    assert np.array_equal(carried.dense_layer("a"), expected.numpy())
    assert carried.values["bias"] is BIAS


def test_carry_passes_on_what_does_not_change() -> None:
    state = state_of({0: 1.0, 2: float("nan")}, 4)
    assert carry(state, state_of({0: 0.0, 2: 0.0}, 4).patterns).values["a"] is state.values["a"]


def test_a_dense_state_gives_its_values_at_the_active_places() -> None:
    patterns = Patterns({"a": Pattern.from_positions((2, 2), np.array([1, 2]))})
    whole = np.array([[1, 2], [3, 4]], dtype=np.float32)
    assert carry(SparseState({"a": whole}), patterns).values["a"].tolist() == [2, 3]
    with pytest.raises(MaskError, match=r"mask of 'a' has shape \(2, 2\), its weight \(4,\)"):
        carry(SparseState({"a": whole.reshape(4)}), patterns)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), max_size=20), st.data())
def test_select_largest_equals_sorting(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    active = {3 * i + 1: value for i, value in enumerate(values)}
    kept = sorted(sorted(active, key=lambda i: (-abs(active[i]), i))[:count])
    state = state_of(active, 70)
    selected = select_largest(state, {"a": count})
    assert active_of(selected) == {i: active[i] for i in kept}
    assert selected.values["bias"] is BIAS
    assert active_of(select_largest(state, {})) == active


@given(st.lists(st.integers(-3, 3), max_size=20), st.data())
def test_largest_equals_sorting(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(scores)))
    chosen = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    found = largest(np.array(scores, dtype=np.float32), count)
    assert np.flatnonzero(found).tolist() == sorted(chosen)


@pytest.mark.parametrize(
    ("indices", "values", "counts", "message"),
    [
        ([0], [1.0], {"a": 1}, "hold active weights"),
        ([4], [1.0], {"a": 1}, r"must be in \[0, 4\), got 4 to 4"),
        ([3, -1, 2], [1.0, 1.0, 1.0], {"a": 1}, "got -1 to 3"),
        ([2, 3, 2], [1.0, 1.0, 1.0], {"a": 1}, "name a coordinate twice"),
        ([2], [float("nan")], {"a": 0}, "hold NaN"),
        ([2, 3], [1.0], {"a": 1}, r"of one shape \[n\]"),
        ([2], [1.0], {"a": -1}, "expected a count >= 0, got -1"),
        ([2], [1.0], {"b": 1}, "no layer 'b' in this mask"),
        ([2], [1.0], {}, r"candidates for \['a'\] but counts for \[\]"),
    ],
)
def test_candidates_and_counts_that_do_not_fit(
    indices: list[int], values: list[float], counts: dict[str, int], message: str
) -> None:
    state = state_of({0: 1.0, 1: 1.0}, 4)
    with pytest.raises(MaskError, match=message):
        prune_and_grow(state, {"a": entries(indices, values)}, counts)


def test_bad_states_are_refused() -> None:
    candidates, counts = {"a": entries([2], [1.0])}, {"a": 1}
    state = state_of({0: 1.0, 1: 1.0}, 4)
    diverged = state_of({0: float("nan"), 1: 1.0}, 4)
    missing = SparseState({"bias": BIAS}, state.patterns)
    long = state.replace({"a": np.ones(3, dtype=np.float32)})
    for bad, message in (
        (diverged, "hold NaN"),
        (missing, "no weights of 'a'"),
        (long, r"'a' has values of shape \(3,\), but its pattern 2 active weights"),
        (SparseState(state.values), "the state is dense"),
    ):
        with pytest.raises(MaskError, match=message):
            prune_and_grow(bad, candidates, counts)
        with pytest.raises(MaskError, match=message):
            select_largest(bad, {"a": 1})
    with pytest.raises(MaskError, match="no layer 'b'"):
        select_largest(state, {"b": 1})
    for count in (-1, 3):
        with pytest.raises(DensityError, match=f"2 active weights; cannot keep {count}"):
            select_largest(state, {"a": count})
    with pytest.raises(MaskError, match="differ in layers"):
        carry(state, state_of({0: 1.0}, 5).patterns)
