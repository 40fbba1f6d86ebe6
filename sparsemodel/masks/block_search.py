"""Better masks of the same count: weights change places within one block after another.

A block is a few weights, as many kept as pruned, whose places are chosen together, so that
weights whose removals cancel are found. All arrays are flat: the weights of a set of layers, one
layer after the other.
Source: Rosenberg et al., Scalable iterative pruning of large language and vision models using
block coordinate descent (2024), iCBS.
Departs from it: the annealing is ours; and the published code drops every entry of a problem
below 1e-12, so all negative ones, where here all entries count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemodel.errors import MaskError

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
Solver = Callable[[Array, Bools], Bools]
"""(quadratic [n, n], start [n]) -> a choice x [n] of as many as start, for a low xᵀ quadratic x."""

MOST_CHOICES = 200_000  # that `exhaustive` looks at
COLDEST = 1e-2  # the last temperature of `annealed` over its first


def doubtful_block(
    scores: NDArray[np.floating],
    mask: Bools,
    size: int,
    *,
    tabu: Iterable[NDArray[np.int64]] = (),
    frozen_kept: float = 0.35,
    frozen_pruned: float = 0.42,
) -> NDArray[np.int64]:
    """The weights nearest to the other side: kept ones of low scores, pruned ones of high scores.

    size // 2 of each, or as many as both sides have that are neither tabu nor frozen. Of equal
    scores the lower index counts as the higher score.

    Args:
        scores: [n], high means keep.
        mask: bool [n], the weights that are active.
        size: of the block, at least 2.
        tabu: blocks whose weights are left out, those of the last steps say.
        frozen_kept: share of the kept weights, those of highest scores, that stay.
        frozen_pruned: share of the pruned weights, those of lowest scores, that stay.

    Returns:
        Flat indices, the kept ones first, the most doubtful first on either side.

    Raises:
        MaskError: arrays that do not fit, NaN, a size or share outside its range, or no weight
            left on one side.

    >>> scores, mask = np.array([9.0, 5.0, 7.0, 3.0]), np.array([True, True, False, False])
    >>> doubtful_block(scores, mask, 2, frozen_kept=0.0, frozen_pruned=0.0)
    array([1, 2])
    """
    if scores.shape != mask.shape or mask.ndim != 1 or np.isnan(scores).any():
        raise MaskError(
            f"expected scores without NaN and a mask of one shape [n], got {scores.shape} and "
            f"{mask.shape}"
        )
    if size < 2 or not (0 <= frozen_kept <= 1 and 0 <= frozen_pruned <= 1):
        raise MaskError(
            "expected a size of 2 or more and frozen shares in [0, 1], got "
            f"{size}, {frozen_kept} and {frozen_pruned}"
        )
    order = np.argsort(-scores, kind="stable")
    free = np.ones(len(mask), dtype=bool)
    for block in tabu:
        free[block] = False
    sides = []
    for side, frozen in (
        (order[mask[order]][::-1], frozen_kept),
        (order[~mask[order]], frozen_pruned),
    ):
        doubtful = side[: len(side) - math.floor(frozen * len(side))]
        sides.append(doubtful[free[doubtful]][: size // 2])
    half = min(map(len, sides))
    if not half:
        raise MaskError(
            f"no block: {len(sides[0])} kept and {len(sides[1])} pruned weights are neither tabu "
            "nor frozen; forget older blocks or freeze less"
        )
    return np.concatenate([side[:half] for side in sides])


def block_problem(
    weights: NDArray[np.floating],
    mask: Bools,
    gradient: NDArray[np.floating],
    sample_gradients: NDArray[np.floating],
    block: NDArray[np.int64],
    *,
    gradient_weight: float = 0.75,
    ridge: float = 1e-3,
) -> Array:
    """The quadratic form whose least xᵀQx at a fixed Σx says which weights of a block to prune.

    x is 1 for pruned. With Δ = (1 − x) w − mask w, the change of the weights, xᵀQx is
    μ gᵀΔ + ½ ΔᵀHΔ + λ ‖Δ‖² but for a constant, where H = GᵀG / N. Linear terms are on the
    diagonal, since x² = x.

    Args:
        weights: w [n], as they are without a mask.
        mask: bool [n].
        gradient: g [n], of the loss at the masked weights.
        sample_gradients: G [N, n], of the loss of each of N samples there.
        block: flat indices [b].
        gradient_weight: μ.
        ridge: λ.

    Returns:
        Q, symmetric, float64 [b, b].

    Raises:
        MaskError: arrays that do not fit, or values that are not finite.

    >>> weights, mask = np.array([2.0, 1.0]), np.array([True, False])
    >>> gradient, samples = np.array([0.0, -4.0]), np.eye(2)
    >>> block_problem(weights, mask, gradient, samples, np.array([0, 1]), ridge=0.0)
    array([[1.  , 0.  ],
           [0.  , 2.75]])
    """
    if not weights.shape == mask.shape == gradient.shape == sample_gradients.shape[1:]:
        raise MaskError(
            "expected weights, mask and gradient [n] and sample gradients [N, n], got "
            f"{weights.shape}, {mask.shape}, {gradient.shape} and {sample_gradients.shape}"
        )
    w, g, samples = (
        a[..., block].astype(np.float64) for a in (weights, gradient, sample_gradients)
    )
    curvature = samples.T @ samples / len(samples) + 2 * ridge * np.eye(len(block))
    grown = np.where(mask[block], 0.0, w)  # Δ = grown − x w
    quadratic = 0.5 * curvature * np.outer(w, w)
    quadratic -= np.diag(w * (gradient_weight * g + curvature @ grown))
    if not np.isfinite(quadratic).all():
        raise MaskError("weights or gradients of the block are not finite, or there is no sample")
    return quadratic


def search_block(
    weights: NDArray[np.floating],
    mask: Bools,
    gradient: NDArray[np.floating],
    sample_gradients: NDArray[np.floating],
    block: NDArray[np.int64],
    *,
    solver: Solver,
    gradient_weight: float = 0.75,
    ridge: float = 1e-3,
) -> Bools:
    """One step: the mask with a block's places given anew, of the same count.

    Gradients belong to a mask: between steps the caller computes them again.

    Args:
        solver: `exhaustive`, or partial(annealed, generator=...).
        weights, mask, gradient, sample_gradients, block, gradient_weight, ridge: of
            `block_problem`.

    Raises:
        MaskError: arrays that do not fit, values that are not finite, or a solver that changed
            the count.

    >>> weights, mask = np.array([2.0, 1.0]), np.array([True, False])
    >>> gradient, block = np.array([0.0, -4.0]), np.array([0, 1])
    >>> search_block(weights, mask, gradient, np.eye(2), block, solver=exhaustive)
    array([False,  True])
    """
    problem = block_problem(
        weights,
        mask,
        gradient,
        sample_gradients,
        block,
        gradient_weight=gradient_weight,
        ridge=ridge,
    )
    start = ~mask[block]
    pruned = solver(problem, start)
    if pruned.shape != start.shape or pruned.sum() != start.sum():
        raise MaskError(f"the solver chose {pruned.sum()} of a block, expected {start.sum()}")
    changed = mask.copy()
    changed[block] = ~pruned
    return changed


def exhaustive(quadratic: Array, start: Bools) -> Bools:
    """The best of all choices; `start` where none is better.

    Raises:
        MaskError: more than MOST_CHOICES choices.
    """
    n, count = len(start), int(start.sum())
    if math.comb(n, count) > MOST_CHOICES:
        raise MaskError(
            f"{count} of {n} are {math.comb(n, count)} choices, more than {MOST_CHOICES}; use "
            "annealed, or smaller blocks"
        )
    choices = np.zeros((math.comb(n, count), n), dtype=bool)
    for choice, chosen in zip(choices, combinations(range(n), count), strict=True):
        choice[list(chosen)] = True
    best = choices[np.einsum("ci,ij,cj->c", choices, quadratic, choices, optimize=True).argmin()]
    return _better(quadratic, best, start)


def annealed(
    quadratic: Array, start: Bools, *, generator: np.random.Generator, sweeps: int = 50
) -> Bools:
    """A good choice by simulated annealing over swaps; never worse than `start`.

    A step takes one chosen place and draws where it goes, to any free place or back, with the
    Boltzmann probabilities of the energies there (heat bath). Temperatures fall geometrically from
    about the largest energy of a swap. From the best choice on the way the best swaps are made as
    long as one helps.

    Args:
        quadratic: symmetric [n, n].
        start: bool [n].
        generator: decides everything.
        sweeps: steps over chosen places, at least 0; each is O(n).
    """
    x, count = start.copy(), int(start.sum())
    if count in (0, len(x)):
        return x
    coupling = 2 * quadratic
    np.fill_diagonal(coupling, 0.0)
    field = np.diag(quadratic) + coupling @ x  # what one more place costs, or a chosen one saves
    hottest = float(np.std(field) + np.abs(coupling).max())
    steps, level, lowest = sweeps * count if hottest else 0, 0.0, 0.0  # energies less the start's
    best = start
    for step in range(steps):
        temperature = hottest * COLDEST ** (step / steps)
        place = np.flatnonzero(x)[generator.integers(count)]
        energies = field - coupling[place]  # of each place once this one is free
        energies[x] = np.inf
        energies[place] = field[place]
        to = int(np.argmin(energies - temperature * generator.gumbel(size=len(x))))
        if to != place:
            level += energies[to] - energies[place]
            _swap(x, field, coupling, place, to)
            if level < lowest:
                lowest, best = level, x.copy()
    x = best.copy()
    field = np.diag(quadratic) + coupling @ x
    while True:
        ones, zeros = np.flatnonzero(x), np.flatnonzero(~x)
        costs = field[zeros] - field[ones, None] - coupling[np.ix_(ones, zeros)]
        i, j = np.unravel_index(costs.argmin(), costs.shape)
        if not costs[i, j] < -1e-12 * hottest:  # rounding would swap for ever
            return _better(quadratic, x, start)
        _swap(x, field, coupling, ones[i], zeros[j])


def _swap(x: Bools, field: Array, coupling: Array, place: Any, to: Any) -> None:
    """Move a chosen place, in place."""
    x[place], x[to] = False, True
    field += coupling[to] - coupling[place]


def _better(quadratic: Array, found: Bools, start: Bools) -> Bools:
    return found if found @ quadratic @ found < start @ quadratic @ start else start.copy()
