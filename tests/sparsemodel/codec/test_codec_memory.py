"""What coding holds beside its arguments and its result goes by active weights, not by all."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest

from sparsemodel.codec import (
    decode_entries,
    decode_mask,
    decode_mask_delta,
    decode_state,
    encode_entries,
    encode_mask,
    encode_mask_delta,
    encode_state,
)
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

MIB = 2**20
# 11.8 million weights, as a ResNet-18 has: a byte for each would be 11 MiB, 2.3 a layer.
SHAPES = {f"layer{index}": (512, 512, 3, 3) for index in range(5)}
T = TypeVar("T")


def make_patterns(density: float, seed: int) -> Patterns:
    rng = np.random.default_rng(seed)
    patterns = {}
    for name, shape in SHAPES.items():
        total = math.prod(shape)
        chosen = rng.choice(total, int(density * total), replace=False, shuffle=False)
        patterns[name] = Pattern.from_positions(shape, np.sort(chosen))
    return Patterns(patterns)


def beside_result(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` returns, and the most MiB that it held beside that at any time."""
    tracemalloc.start()
    try:
        result = work()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return result, (peak - held) / MIB


@pytest.fixture(scope="module")
def sparse() -> tuple[Patterns, Patterns]:
    """Two patterns of density 0.01, their digests known."""
    pair = make_patterns(0.01, 0), make_patterns(0.01, 1)
    for patterns in pair:
        patterns.digest()
    return pair


def test_masks_of_density_one_hundredth(sparse: tuple[Patterns, Patterns]) -> None:
    """118,000 active weights: 0.5 MiB of columns."""
    frame, encoding = beside_result(lambda: encode_mask(sparse[0]))
    decoded, decoding = beside_result(lambda: decode_mask(frame))
    assert decoded == sparse[0]
    assert encoding < 3
    assert decoding < 3


def test_mask_deltas_of_density_one_hundredth(sparse: tuple[Patterns, Patterns]) -> None:
    base, new = sparse
    frame, encoding = beside_result(lambda: encode_mask_delta(base, new))
    decoded, decoding = beside_result(lambda: decode_mask_delta(frame, base=base))
    assert decoded == new
    assert encoding < 4
    assert decoding < 4


def test_entries_of_density_one_hundredth(sparse: tuple[Patterns, Patterns]) -> None:
    """1,000 entries a layer."""
    patterns, _ = sparse
    entries = {}
    for name, pattern in patterns.items():
        free = np.setdiff1d(np.arange(0, pattern.num_weights, 2000), pattern.positions())
        entries[name] = (free[:1000], np.ones(1000, dtype=np.float32))
    frame, encoding = beside_result(lambda: encode_entries(entries, patterns=patterns))
    decoded, decoding = beside_result(lambda: decode_entries(frame, patterns=patterns))
    assert all(np.array_equal(decoded[name][0], entries[name][0]) for name in entries)
    assert encoding < 2
    assert decoding < 2


def test_states_are_copied_once() -> None:
    """8 MiB of values: one copy is the frame, or the arrays that are read from it."""
    state = SparseState({"w": np.ones((1024, 2048), dtype=np.float32)})
    frame, encoding = beside_result(lambda: encode_state(state))
    _, decoding = beside_result(
        lambda: decode_state(frame, shapes={"w": (1024, 2048)}, patterns=None)
    )
    assert encoding < 1
    assert decoding < 1


def test_a_dense_layer_is_coded_by_its_pruned_weights() -> None:
    """0.99 of a layer of 2.36 million: the codes take little, the positions 8 bytes each."""
    shape = (512, 512, 3, 3)
    pruned = np.arange(0, math.prod(shape), 100)
    active = np.delete(np.arange(math.prod(shape)), pruned)
    patterns = Patterns({"w": Pattern.from_positions(shape, active)})
    frame, encoding = beside_result(lambda: encode_mask(patterns))
    decoded, decoding = beside_result(lambda: decode_mask(frame))
    assert decoded == patterns
    assert len(frame) < 30_000
    assert encoding < 60
    assert decoding < 60
