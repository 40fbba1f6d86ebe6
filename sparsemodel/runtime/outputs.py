"""Outputs that keep a weight: rows of [out, in · k · k] none of which falls silent."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsemodel.errors import MaskError
from sparsemodel.runtime.adjust import carry, largest
from sparsemodel.runtime.pattern import Pattern
from sparsemodel.runtime.state import Array, SparseState


def largest_of_rows(pattern: Pattern, weights: Array) -> NDArray[np.bool_]:
    """Which active weights are the largest by magnitude of their output: bool, shape [active].

    One of each row of [out, in · k · k] that has any; of equals the earlier. Weights must not be
    NaN.

    >>> pattern = Pattern.from_positions((3, 2), np.array([0, 1, 5]))
    >>> largest_of_rows(pattern, np.float32([1, -2, 0]))
    array([False,  True,  True])
    """
    starts = pattern.row_ptr[:-1].astype(np.int64)
    lengths: NDArray[np.int64] = pattern.row_ptr[1:] - starts
    filled = lengths > 0
    row_largest = np.zeros(len(weights), dtype=bool)
    if filled.any():
        magnitudes = np.abs(weights)
        most = np.maximum.reduceat(magnitudes, starts[filled])
        rows = np.repeat(np.arange(len(most)), lengths[filled])
        at = np.flatnonzero(magnitudes == most[rows])
        row_largest[at[np.unique(rows[at], return_index=True)[1]]] = True
    return row_largest


def with_outputs(state: SparseState, source: SparseState) -> SparseState:
    """A state in which outputs without a weight have their largest of `source`.

    In each layer as many of the smallest active weights are pruned, none of them the largest of its
    output, so that its number stays. Where those do not suffice the outputs of larger weights go
    first; of equals the earlier. An output that has no weight in `source` stays as it is.

    Args:
        state: under patterns.
        source: a dense state, or one whose patterns hold those of `state`; all values are its own.

    Raises:
        MaskError: a dense state.

    >>> from sparsemodel.runtime.pattern import Patterns
    >>> dense = SparseState({"w": np.float32([[5, 4, 3], [1, 2, 0]])})
    >>> patterns = Patterns({"w": Pattern.from_positions((2, 3), np.array([0, 1]))})
    >>> with_outputs(carry(dense, patterns), dense).dense()["w"]
    array([[5., 0., 0.],
           [0., 2., 0.]], dtype=float32)
    """
    if state.patterns is None:
        raise MaskError("the state is dense: none of its outputs is silent")
    changed = {}
    for name, pattern in state.patterns.items():
        silent = np.flatnonzero(np.diff(pattern.row_ptr) == 0)
        if not len(silent):
            continue
        positions, weights = pattern.positions(), state.values[name]
        places, magnitudes = _largest_places(source, name)
        wanted = np.isin(places // pattern.row_length, silent)
        places, magnitudes = places[wanted], magnitudes[wanted]
        spare = np.flatnonzero(~largest_of_rows(pattern, weights))
        num_moved = min(len(places), len(spare))
        taken = places[largest(magnitudes, num_moved)]
        gone = spare[largest(-np.abs(weights[spare]), num_moved)]
        kept = np.union1d(np.delete(positions, gone), taken)
        changed[name] = Pattern.from_positions(pattern.shape, kept)
    return carry(source, state.patterns.replace(changed))


def _largest_places(source: SparseState, name: str) -> tuple[NDArray[np.int64], Array]:
    """Flat positions of the largest weight of each output, and their magnitudes."""
    weights = source.values[name].reshape(-1)
    pattern = source.pattern(name) or Pattern.full(source.values[name].shape)
    chosen = largest_of_rows(pattern, weights)
    return pattern.positions()[chosen], np.abs(weights[chosen])
