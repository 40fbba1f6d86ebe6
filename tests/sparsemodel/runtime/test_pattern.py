"""Patterns against plain arrays of flags: subsets, equality, keys."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparsemodel.runtime.bound import full_batch, statistics_batches
from sparsemodel.runtime.pattern import Pattern, Patterns

SHAPES = [(3, 2, 2), (5, 4), (7,), (1, 6)]


@st.composite
def flagged(draw: st.DrawFn) -> tuple[tuple[int, ...], np.ndarray]:
    shape = draw(st.sampled_from(SHAPES))
    size = int(np.prod(shape))
    return shape, np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), bool)


@given(flagged(), st.randoms(use_true_random=False))
def test_a_subset_keeps_some_active_weights(
    drawn: tuple[tuple[int, ...], np.ndarray], random: np.random.Generator
) -> None:
    shape, active = drawn
    pattern = Pattern.from_positions(shape, np.flatnonzero(active))
    kept = np.array([random.random() < 0.5 for _ in range(pattern.num_active)], bool)
    subset = pattern.subset(kept)
    assert subset.positions().tolist() == np.flatnonzero(active)[kept].tolist()
    assert subset == Pattern.from_positions(shape, np.flatnonzero(active)[kept])
    assert subset.row_ptr.dtype == subset.cols.dtype == np.int32


@given(flagged(), flagged())
def test_equality_key_and_digest_agree(
    one: tuple[tuple[int, ...], np.ndarray], two: tuple[tuple[int, ...], np.ndarray]
) -> None:
    first, second = (
        Patterns({"a": Pattern.from_positions(shape, np.flatnonzero(active))})
        for shape, active in (one, two)
    )
    equal = one[0] == two[0] and bool((one[1] == two[1]).all())
    assert (first == second) is equal
    assert (first.digest() == second.digest()) is equal
    assert (first.key() == second.key()) is equal


def test_order_and_names_are_part_of_a_mask() -> None:
    a, b = (Pattern.from_positions((4,), np.array(at)) for at in ([1], [1, 2]))
    masks = [Patterns(m) for m in ({"a": a, "b": b}, {"b": b, "a": a}, {"a": b, "b": a}, {"a": a})]
    for number, mask in enumerate(masks):
        for other in masks[:number]:
            assert mask != other
            assert mask.key() != other.key()
            assert mask.digest() != other.digest()
    assert masks[3] != a
    assert hash(Patterns({"a": a})) == hash(masks[3])


@given(st.integers(1, 200), st.integers(1, 100))
def test_statistics_batches_cover_all_once_in_full_vectors(samples: int, most: int) -> None:
    parts = list(statistics_batches(samples, most))
    rows = [row for part in parts for row in range(part.start, part.stop)]
    assert rows == list(range(samples))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) <= full_batch(most) <= most
    assert all(size == full_batch(most) for size in sizes[:-2])
    assert full_batch(most) % 16 == 0 or most < 16
    assert 1 not in sizes or samples == 1 or most <= 2
