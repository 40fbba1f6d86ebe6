"""Adjusting a sparse state: its patterns change, and its values follow, in sparse space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemodel.errors import DensityError, MaskError
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.positions import find
from sparsemodel.runtime.state import Array, Entries, LayerEntries, SparseState

MANY, STRIDE = 1 << 16, 64  # `largest` looks at every STRIDE-th of so many scores first


def prune_and_grow(
    state: SparseState,
    candidates: Entries,
    counts: Mapping[str, int],
    *,
    keep: Mapping[str, NDArray[np.bool_]] | None = None,
) -> SparseState:
    """Exchange the smallest active weights for the pruned weights of largest gradient.

    In each layer of `candidates`, g = min(count, non-zero candidates, weights that may go)
    coordinates of largest |gradient| are grown and the g active weights of smallest magnitude are
    pruned, so its number of active weights stays. Ties go to the lower index on both sides. A
    weight that is grown here cannot be pruned in the same call; it starts at zero.
    Source: Huang et al. (ICDCS 2023), progressive pruning.

    Args:
        state: with patterns of the layers in `counts` and values of those in `candidates`.
        candidates: name -> (flat indices [k] of pruned weights; gradients [k]), in any order, for
            names in `counts`; a layer without any stays as it is.
        counts: name -> how many weights to exchange at most.
        keep: name -> bool [active weights]: which stay, however small; without a name none has to.

    Raises:
        MaskError: a state without patterns; names or lengths that do not fit; candidates that are
            active, repeated, out of range or NaN; weights that are NaN.

    >>> patterns = Patterns({"w": Pattern.from_positions((5,), np.array([0, 2, 3]))})
    >>> state = SparseState({"w": np.float32([3, -1, 2])}, patterns)
    >>> gradients = (np.array([1, 4]), np.float32([0.5, -0.7]))
    >>> prune_and_grow(state, {"w": gradients}, {"w": 1}).dense()["w"]
    array([3., 0., 0., 2., 0.], dtype=float32)
    """
    patterns = _patterns(state, counts)
    for name, count in counts.items():
        if count < 0:
            raise MaskError(f"{name!r}: expected a count >= 0, got {count}")
    if not candidates.keys() <= counts.keys():
        raise MaskError(f"candidates for {sorted(candidates)} but counts for {sorted(counts)}")
    changed: dict[str, Pattern] = {}
    values: dict[str, Array] = {}
    for name, entries in candidates.items():
        pattern, weights = patterns[name], _active_values(state, name)
        positions = pattern.positions()
        indices, magnitudes = _checked(name, pattern, positions, entries)
        smallness = -_magnitudes(name, weights)
        if keep is not None and name in keep:
            smallness = np.where(keep[name], -np.inf, smallness)
        num_grown = min(counts[name], len(indices), int((smallness > -np.inf).sum()))
        if num_grown == 0:
            continue
        grown = indices[largest(magnitudes, num_grown)]
        kept = ~largest(smallness, num_grown)
        remaining = positions[kept]
        places = np.searchsorted(remaining, grown)
        changed[name] = Pattern.from_positions(pattern.shape, np.insert(remaining, places, grown))
        values[name] = np.insert(weights[kept], places, 0)
    return SparseState({**state.values, **values}, patterns.replace(changed))


def carry(state: SparseState, patterns: Patterns) -> SparseState:
    """The values of a state under other patterns: kept weights stay, new ones are zero.

    A layer that is whole in `state`, as in a dense one, gives its values at the active places.
    Arrays of layers that do not change are passed on, not copied.

    Raises:
        MaskError: patterns of other layers than those of the state, or of another shape.
    """
    old = state.patterns
    if old is not None and old.shapes() != patterns.shapes():
        raise MaskError(f"the masks differ in layers: {old.shapes()} and {patterns.shapes()}")
    values: dict[str, Array] = {}
    for name, pattern in patterns.items():
        if name not in state.values:
            continue
        if old is None:
            values[name] = _gather(name, state.values[name], pattern)
        elif old[name] != pattern:
            places, kept = find(old[name].positions(), pattern.positions())
            weights = _active_values(state, name)
            values[name] = np.zeros(pattern.num_active, dtype=weights.dtype)
            values[name][kept] = weights[places[kept]]
    return SparseState({**state.values, **values}, patterns)


def select_largest(state: SparseState, counts: Mapping[str, int]) -> SparseState:
    """Keep exactly counts[name] active weights of largest magnitude in some layers.

    Of equal magnitudes the lower position stays. Everything else is passed on, not copied.

    Raises:
        MaskError: a state without patterns, names or lengths that do not fit, weights that are
            NaN.
        DensityError: a count outside [0, active weights].
    """
    patterns = _patterns(state, counts)
    changed: dict[str, Pattern] = {}
    values: dict[str, Array] = {}
    for name, count in counts.items():
        pattern, weights = patterns[name], _active_values(state, name)
        if not 0 <= count <= len(weights):
            raise DensityError(f"{name!r} has {len(weights)} active weights; cannot keep {count}")
        magnitudes = _magnitudes(name, weights)
        if count < len(weights):
            kept = largest(magnitudes, count)
            changed[name], values[name] = pattern.subset(kept), weights[kept]
    return SparseState({**state.values, **values}, patterns.replace(changed))


def prune_to_largest(state: SparseState, counts: Mapping[str, int]) -> SparseState:
    """A dense state pruned to counts[name] weights of largest magnitude in each named layer.

    Of equal magnitudes the lower position stays. Other tensors are passed on, not copied.

    Raises:
        MaskError: a state under patterns, a name that it lacks, weights that are NaN.
        DensityError: a count outside [0, weights].

    >>> pruned = prune_to_largest(SparseState({"w": np.float32([[3, -1], [0, 2]])}), {"w": 2})
    >>> pruned.values["w"]
    array([3., 2.], dtype=float32)
    """
    if state.patterns is not None:
        raise MaskError("the state is pruned already; use select_largest")
    patterns: dict[str, Pattern] = {}
    for name, count in counts.items():
        if name not in state.values:
            raise MaskError(f"no weights of {name!r}; got {list(state.values)}")
        weights = state.values[name]
        if not 0 <= count <= weights.size:
            raise DensityError(f"{name!r} has {weights.size} weights; cannot keep {count}")
        kept = np.flatnonzero(largest(_magnitudes(name, weights.reshape(-1)), count))
        patterns[name] = Pattern.from_positions(weights.shape, kept)
    return carry(state, Patterns(patterns))


def largest(scores: NDArray[np.floating[Any]], count: int) -> NDArray[np.bool_]:
    """Which `count` scores are the largest, the earlier one of equals: bool, shape [n].

    The scores must not be NaN, and 0 <= count <= n.

    >>> largest(np.array([2.0, 5.0, 2.0, 1.0]), 2)
    array([ True,  True, False, False])
    """
    assert 0 <= count <= len(scores)
    if count == 0:
        return np.zeros(len(scores), dtype=bool)
    threshold = _largest_of(_likely(scores, count), count)
    chosen: NDArray[np.bool_] = scores > threshold
    equal = np.flatnonzero(scores == threshold)
    chosen[equal[: count - np.count_nonzero(chosen)]] = True
    return chosen


def _largest_of(scores: NDArray[np.floating[Any]], rank: int) -> Any:
    """The score of this rank, 1 the largest."""
    return np.partition(scores, len(scores) - rank)[len(scores) - rank]


def _likely(scores: NDArray[np.floating[Any]], count: int) -> NDArray[np.floating[Any]]:
    """Scores among which the `count` largest of all are; of many scores as few as a sample tells.

    A partition of millions is slow, above all where most of them are equal.
    """
    if len(scores) < MANY:
        return scores
    sample = scores[::STRIDE]
    rank = int((count + 6 * np.sqrt(STRIDE * count)) / STRIDE) + 1  # six standard deviations more
    bound = _largest_of(sample, rank) if rank <= len(sample) else -np.inf
    high = scores[scores >= bound] if bound > -np.inf else scores[scores > -np.inf]
    return high if len(high) >= count else scores


def _checked(
    name: str, pattern: Pattern, positions: NDArray[np.int64], entries: LayerEntries
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Flat indices of the candidates that are not zero, ascending, and their magnitudes."""
    indices, gradients = entries
    if indices.ndim != 1 or indices.shape != gradients.shape:
        raise MaskError(
            f"candidates of {name!r}: expected indices and values of one shape [n], got "
            f"{indices.shape} and {gradients.shape}"
        )
    order = np.argsort(indices)
    indices, magnitudes = indices[order], np.abs(gradients[order])
    if len(indices) and (indices[0] < 0 or indices[-1] >= pattern.num_weights):
        raise MaskError(
            f"candidates of {name!r}: indices must be in [0, {pattern.num_weights}), got "
            f"{indices[0]} to {indices[-1]}"
        )
    if (np.diff(indices) == 0).any():
        raise MaskError(f"candidates of {name!r} name a coordinate twice; sum them first")
    if find(positions, indices)[1].any():
        raise MaskError(f"candidates of {name!r} hold active weights; were they of an older mask?")
    if np.isnan(magnitudes).any():
        raise MaskError(f"candidates of {name!r} hold NaN; leave out the client that sent it")
    return indices[magnitudes > 0], magnitudes[magnitudes > 0]


def _patterns(state: SparseState, names: Mapping[str, int]) -> Patterns:
    """The patterns of a state, which hold all the names."""
    if state.patterns is None:
        raise MaskError("the state is dense: it has no mask that could change")
    for name in names:
        if name not in state.patterns:
            raise MaskError(f"no layer {name!r} in this mask; it has {list(state.patterns)}")
    return state.patterns


def _active_values(state: SparseState, name: str) -> Array:
    if name not in state.values:
        raise MaskError(f"no weights of {name!r}; got {list(state.values)}")
    weights, pattern = state.values[name], state.pattern(name)
    assert pattern is not None
    if weights.shape != (pattern.num_active,):
        raise MaskError(
            f"{name!r} has values of shape {weights.shape}, but its pattern "
            f"{pattern.num_active} active weights"
        )
    return weights


def _magnitudes(name: str, weights: Array) -> Array:
    magnitudes: Array = np.abs(weights)
    if np.isnan(magnitudes).any():
        raise MaskError(f"weights of {name!r} hold NaN; has training diverged?")
    return magnitudes


def _gather(name: str, whole: Array, pattern: Pattern) -> Array:
    if whole.shape != pattern.shape:
        raise MaskError(f"mask of {name!r} has shape {pattern.shape}, its weight {whole.shape}")
    active: Array = whole.reshape(-1)[pattern.positions()]
    return active
