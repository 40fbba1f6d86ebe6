"""A residual between messages: the same mask, another one, none."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedprune.local.residual import keep, recall
from sparsemodel.codec import encode_mask
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

SHAPES = {"a": (4, 5), "b": (30,)}
POSITIONS = st.sets(st.integers(0, 19), min_size=1)


def masked(a: set[int], b: set[int]) -> Patterns:
    kept = {"a": a, "b": b}
    return Patterns(
        {n: Pattern.from_positions(SHAPES[n], np.array(sorted(kept[n]), np.int64)) for n in kept}
    )


def of(patterns: Patterns, seed: int) -> SparseState:
    random = np.random.default_rng(seed)
    sizes = {name: pattern.num_active for name, pattern in patterns.items()} | {"bias": 3}
    values = {n: random.standard_normal(k).astype(np.float32) for n, k in sizes.items()}
    return SparseState(values, patterns)


def model(patterns: Patterns) -> SparseState:
    """As a message brings it, with statistics, which have no residual."""
    some = of(patterns, 0)
    return SparseState({**some.values, "n.running_var": np.ones(2, np.float32)}, patterns)


@given(POSITIONS, POSITIONS, POSITIONS, POSITIONS)
def test_a_residual_follows_the_weights_that_stay(
    a: set[int], b: set[int], new_a: set[int], new_b: set[int]
) -> None:
    """Compared with dense arrays: kept where both masks have a weight, zero at those grown."""
    old, new = masked(a, b), masked(new_a, new_b)
    residual, kept = of(old, 1), {"another": b"thing"}
    assert recall(kept, model(old)) is None
    keep(kept, residual)
    back = recall(kept, model(new))
    assert back is not None
    assert back.patterns == new
    assert list(back.values) == ["a", "b", "bias"]
    assert back.values["bias"].tobytes() == residual.values["bias"].tobytes()
    for name in SHAPES:
        before, expected = residual.dense_layer(name).reshape(-1), np.zeros(0, np.float32)
        at = new[name].positions()
        expected = np.where(np.isin(at, old[name].positions()), before[at], np.float32(0))
        assert back.values[name].tobytes() == expected.astype(np.float32).tobytes()
    # Kept again, it is under the new mask, and the old one is gone.
    keep(kept, back)
    assert len(kept) == 3
    again = recall(kept, model(new))
    assert again is not None
    assert all(again.values[n].tobytes() == v.tobytes() for n, v in back.values.items())


def test_what_it_takes_is_a_float_a_weight_and_the_mask() -> None:
    patterns = masked(set(range(0, 20, 2)), set(range(5)))
    kept: dict[str, bytes] = {}
    for seed in range(3):
        keep(kept, of(patterns, seed))
    assert sum(map(len, kept.values())) <= 4 * (10 + 5 + 3) + 30 + len(encode_mask(patterns))


def test_of_a_dense_model_no_mask_is_kept() -> None:
    dense = SparseState({"w": np.float32([[1, 2]])})
    kept: dict[str, bytes] = {}
    keep(kept, dense)
    back = recall(kept, dense)
    assert len(kept) == 1
    assert back is not None
    assert back.values["w"].tolist() == [[1, 2]]


def test_of_a_model_that_was_dense_the_weights_stay_that_do() -> None:
    """A mask that is made while clients train: their residuals are those of dense models before."""
    random = np.random.default_rng(1)
    dense = {n: random.standard_normal(shape).astype(np.float32) for n, shape in SHAPES.items()}
    kept: dict[str, bytes] = {}
    keep(kept, SparseState({**dense, "bias": np.ones(3, np.float32)}))
    patterns = masked({1, 7}, {0, 29})
    back = recall(kept, model(patterns))
    assert back is not None
    assert back.patterns == patterns
    for name, pattern in patterns.items():
        assert np.array_equal(back.values[name], dense[name].reshape(-1)[pattern.positions()])
