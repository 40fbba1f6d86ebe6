"""How sparse values are before anything is pruned, and how many of them that says may go.

The indices are of |values|, in [0, 1], and do not change when values are scaled or moved about:
0 for equal values, 1 − k/d for k equal non-zeros of d by `gini`. Values that are all zero have
index 1, as no values left. All is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.masks.distribution import score_array
from sparsemodel.runtime.adjust import largest

Array = NDArray[np.float64]

SCOPES = ("neuron", "layer", "global")


def pq_index(values: Any, *, p: float = 0.5, q: float = 1.0) -> float:
    """PQ index: 1 − d^(1/q − 1/p) ‖w‖_p / ‖w‖_q of d values.

    Source: Diao et al., Pruning Deep Neural Networks from a Sparsity Perspective (ICLR 2023).

    Args:
        values: array or tensor of any shape, not empty.
        p, q: of the norms, 0 < p < q.

    Raises:
        SparseModelError: p or q outside its range.
        MaskError: no values, or some that are not finite.

    >>> round(pq_index(np.array([4.0, 3.0, 2.0, 1.0])), 8), pq_index(np.ones(7))
    (0.05558586, 0.0)
    """
    _check_norms(p, q)
    magnitudes = _magnitudes(values)
    stay = _effective(magnitudes, p, q) / len(magnitudes)
    return max(0.0, 1 - math.pow(stay, 1 / p - 1 / q))


def pq_bound(values: Any, *, p: float = 0.5, q: float = 1.0, eta: float = 0.0) -> float:
    """How many of the values have to stay: d (1 + η)^(−q/(q−p)) (1 − I)^(pq/(q−p)).

    If the r largest stay and Σ|pruned|^p is at most η Σ|kept|^p, then r is this number or more.
    I is the PQ index; written by sums, d and the roots cancel, so that k equal non-zeros give
    exactly k where η = 0. Source: Diao et al. (ICLR 2023).

    Args:
        values: array or tensor of any shape, not empty.
        p, q: of the norms, 0 < p < q.
        eta: η, what may be lost, >= 0.

    Raises:
        SparseModelError: p, q or eta outside its range.
        MaskError: no values, or some that are not finite.

    >>> pq_bound(np.array([0.0, 3.0, 0.0, -3.0, 3.0]))
    3.0
    """
    _check_norms(p, q)
    if not eta >= 0:
        raise SparseModelError(f"expected eta >= 0, got {eta}")
    return float(_effective(_magnitudes(values), p, q) * (1 + eta) ** (-q / (q - p)))


def gini(values: Any) -> float:
    """Gini index of |values|: 0 for equal ones, 1 − k/d for k equal non-zeros of d.

    Source: Hurley and Rickard, Comparing Measures of Sparsity (2009).

    Raises:
        MaskError: no values, or some that are not finite.

    >>> gini(np.array([0.0, 0.0, 2.0, 2.0]))
    0.5
    """
    magnitudes = np.sort(_magnitudes(values))
    total, d = math.fsum(magnitudes), len(magnitudes)
    if total == 0:
        return 1.0
    ranks = np.arange(d, 0, -1) - 0.5  # d − k + 1/2 for k = 1, ..., d
    return max(0.0, 1 - 2 * float(magnitudes @ ranks) / (d * total))


def pq_counts(
    weights: Mapping[str, Any],
    mask: Mapping[str, Any] | None = None,
    *,
    scope: str = "layer",
    p: float = 0.5,
    q: float = 1.0,
    eta: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
) -> dict[str, NDArray[np.int64]]:
    """How many active weights SAP prunes next: ⌊d min(γ (1 − m/d), β)⌋ of d, the smallest.

    m is `pq_bound` of the d active weights of a neuron, a layer or the whole model. A model's
    number is divided over its layers by one threshold over |w|, of equal weights the later ones
    first. Source: Diao et al. (ICLR 2023).

    Args:
        weights: name -> weight [out, ...], an array or a tensor.
        mask: name -> which weights are active, bool of the same shape; None: all.
        scope: "neuron", "layer" or "global".
        p, q, eta: of `pq_bound`.
        gamma: γ, how much of what the bound lets go does go, >= 0.
        beta: β, the share that goes at most, in [0, 1].

    Returns:
        Name -> numbers: [out] for neurons, otherwise [1].

    Raises:
        SparseModelError: an unknown scope, or a number outside its range.
        MaskError: no weights, some that are not finite, or a mask that does not fit.

    >>> weights = {"w": np.array([[4.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])}
    >>> pq_counts(weights, scope="neuron"), pq_counts(weights, scope="layer")
    ({'w': array([2, 0])}, {'w': array([2])})
    """
    if not weights:
        raise MaskError("expected one weight or more")
    if scope not in SCOPES:
        raise SparseModelError(f"unknown scope {scope!r}; known: {', '.join(SCOPES)}")
    if not (gamma >= 0 and 0 <= beta <= 1):
        raise SparseModelError(f"expected gamma >= 0 and beta in [0, 1], got {gamma} and {beta}")

    def number(active: Array) -> int:
        if not len(active):
            return 0
        spare = len(active) - pq_bound(active, p=p, q=q, eta=eta)
        return math.floor(max(0.0, min(gamma * spare, beta * len(active))))

    rows = {name: _active_rows(name, weights[name], mask, scope == "neuron") for name in weights}
    if scope != "global":
        return {name: np.array([number(row) for row in of]) for name, of in rows.items()}
    everything = np.concatenate([row for of in rows.values() for row in of])
    kept = largest(everything, len(everything) - number(everything))
    ends = np.cumsum([len(row) for of in rows.values() for row in of])
    parts = np.split(~kept, ends[:-1])
    return {name: np.array([part.sum()]) for name, part in zip(rows, parts, strict=True)}


def _active_rows(
    name: str, weight: Any, mask: Mapping[str, Any] | None, by_neuron: bool
) -> list[Array]:
    """|active weights| of each output neuron, or of the whole layer."""
    num_rows = weight.shape[0] if by_neuron else 1
    rows = _magnitudes(weight, name).reshape(num_rows, -1)
    if mask is None:
        return list(rows)
    if name not in mask or tuple(mask[name].shape) != tuple(weight.shape):
        found = tuple(mask[name].shape) if name in mask else "nothing"
        raise MaskError(f"mask of {name!r}: expected shape {tuple(weight.shape)}, got {found}")
    active = score_array(mask[name]).astype(bool).reshape(rows.shape)
    return [row[kept] for row, kept in zip(rows, active, strict=True)]


def _effective(magnitudes: Array, p: float, q: float) -> float:
    """S_p^(q/(q−p)) / S_q^(p/(q−p)), S_r = Σ|w|^r: k for k equal non-zeros, else fewer."""
    highest = magnitudes.max()
    if highest == 0:
        return 0.0
    scaled = magnitudes / highest
    low, high = float((scaled**p).sum()), float((scaled**q).sum())
    return float(low * (low / high) ** (p / (q - p)))


def _magnitudes(values: Any, name: str = "values") -> Array:
    """|values|, flat, checked."""
    magnitudes = np.abs(score_array(values).astype(np.float64))
    if not len(magnitudes):
        raise MaskError(f"{name}: expected one value or more")
    if not np.isfinite(magnitudes).all():
        raise MaskError(f"{name}: some values are infinite or NaN")
    return magnitudes


def _check_norms(p: float, q: float) -> None:
    if not 0 < p < q < math.inf:
        raise SparseModelError(f"expected 0 < p < q, both finite, got p = {p} and q = {q}")
