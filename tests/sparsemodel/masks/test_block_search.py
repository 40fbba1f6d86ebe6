"""Block search: blocks and problems by hand, annealing against all choices, planted optima."""

from __future__ import annotations

from functools import partial
from itertools import product

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from sparsemodel.errors import MaskError
from sparsemodel.masks.block_search import (
    Solver,
    annealed,
    block_problem,
    doubtful_block,
    exhaustive,
    search_block,
)

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]


def random_block(n: int, generator: np.random.Generator) -> tuple[Array, Bools]:
    """A problem of a block of n weights, half of them pruned, with 2 n samples; and its start."""
    mask = generator.permutation(np.arange(n) < n // 2)
    gradient, samples = generator.standard_normal(n), generator.standard_normal((2 * n, n))
    weights = generator.standard_normal(n)
    return block_problem(weights, mask, gradient, samples, np.arange(n)), ~mask


def energy(problem: Array, x: Bools) -> float:
    return float(x @ problem @ x)


def test_a_block_takes_the_doubtful_of_both_sides() -> None:
    """Of 5 kept the ⌊.4 · 5⌋ = 2 best are frozen, of 4 pruned the ⌊.5 · 4⌋ = 2 worst."""
    scores = np.array([9.0, 5, 7, 6, 8, 4, 1, 3, 2])
    mask = np.array([True] * 5 + [False] * 4)

    def block(size: int, *tabu: NDArray[np.int64]) -> list[int]:
        found = doubtful_block(scores, mask, size, tabu=tabu, frozen_kept=0.4, frozen_pruned=0.5)
        return found.tolist()

    assert block(2) == [1, 5]
    assert block(4) == block(5) == [1, 3, 5, 7]
    assert block(100) == [1, 3, 5, 7]  # three kept are open, but only two pruned
    assert block(2, np.array([1, 5])) == [3, 7]
    assert block(4, np.array([1, 5])) == [3, 7]
    with pytest.raises(MaskError, match="1 kept and 0 pruned weights"):
        block(4, np.array([1, 5]), np.array([3, 7]))


def test_of_equal_scores_the_later_kept_and_the_earlier_pruned_are_doubtful() -> None:
    mask = np.array([True, False, True, False])
    found = doubtful_block(np.ones(4), mask, 2, frozen_kept=0, frozen_pruned=0)
    assert found.tolist() == [2, 1]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 2), st.floats(0, 1))
def test_a_problem_is_the_predicted_change_of_the_loss(
    seed: int, gradient_weight: float, ridge: float
) -> None:
    """μ gᵀΔ + ½ ΔᵀHΔ + λ ‖Δ‖² for every choice, less that of the mask as it is, which is 0.

    Δ is the whole change of the weights, and is 0 outside the block.
    """
    generator = np.random.default_rng(seed)
    n, block = 7, np.array([4, 0, 5, 2])
    weights, gradient = generator.standard_normal((2, n))
    samples, mask = generator.standard_normal((3, n)), generator.random(n) < 0.5
    problem = block_problem(
        weights, mask, gradient, samples, block, gradient_weight=gradient_weight, ridge=ridge
    )
    start = ~mask[block]
    for choice in product([False, True], repeat=4):
        x, after = np.array(choice), mask.copy()
        after[block] = ~x
        change = weights * after - weights * mask
        expected = gradient_weight * (gradient @ change) + ridge * (change @ change)
        expected += 0.5 * ((samples @ change) ** 2).mean()
        assert energy(problem, x) - energy(problem, start) == pytest.approx(expected, abs=1e-9)


def test_exhaustive_finds_the_best_and_stays_where_none_is_better() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        problem, start = random_block(6, generator)
        choices = [np.array(c) for c in product([False, True], repeat=6) if sum(c) == start.sum()]
        best = min(choices, key=partial(energy, problem))
        assert exhaustive(problem, start).tolist() == best.tolist()
    start = np.array([False, True, True])
    assert exhaustive(np.zeros((3, 3)), start).tolist() == start.tolist()
    none = np.zeros(2, dtype=bool)
    assert exhaustive(-np.eye(2), none).tolist() == none.tolist()
    with pytest.raises(MaskError, match="use annealed"):
        exhaustive(np.zeros((40, 40)), np.arange(40) < 20)


def test_annealing_finds_most_optima() -> None:
    """120 blocks of 10: nine of ten optima at least, where random choices would have 1 of 252."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(120):
        problem, start = random_block(10, generator)
        best = energy(problem, exhaustive(problem, start))
        found = energy(problem, annealed(problem, start, generator=generator))
        assert found >= best - 1e-9
        hits += found <= best + 1e-9
    assert hits >= 108


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.floats(0, 1), st.integers(0, 3))
def test_annealing_keeps_the_count_and_never_worsens_the_start(
    seed: int, n: int, share: float, sweeps: int
) -> None:
    generator = np.random.default_rng(seed)
    problem = generator.integers(-3, 4, (n, n)).astype(float)  # many ties
    problem += problem.T
    start = generator.random(n) < share
    before = problem.copy(), start.copy()
    found = annealed(problem, start, generator=np.random.default_rng(seed), sweeps=sweeps)
    assert found.sum() == start.sum()
    assert energy(problem, found) <= energy(problem, start)
    again = annealed(problem, start, generator=np.random.default_rng(seed), sweeps=sweeps)
    assert found.tolist() == again.tolist()
    assert np.array_equal(problem, before[0])
    assert np.array_equal(start, before[1])


def test_annealing_ends_where_no_swap_helps() -> None:
    generator = np.random.default_rng(2)
    problem, start = random_block(40, generator)
    found = annealed(problem, start, generator=generator, sweeps=2)
    for i in np.flatnonzero(found):
        for j in np.flatnonzero(~found):
            swapped = found.copy()
            swapped[i], swapped[j] = False, True
            assert energy(problem, swapped) >= energy(problem, found) - 1e-9


def test_without_negative_entries_the_optimum_is_another() -> None:
    """The published code drops all entries up to 1e-12, negative ones with them.

    That changes the best choice in more than a third of random blocks of 6, 3 of them pruned.
    """
    generator = np.random.default_rng(0)
    changed = 0
    for _ in range(100):
        problem, start = random_block(6, generator)
        cut = exhaustive(np.where(problem <= 1e-12, 0.0, problem), start)
        changed += energy(problem, cut) > energy(problem, exhaustive(problem, start)) + 1e-9
    assert changed > 33


def squared_loss(inputs: Array, weights: Array, mask: Bools) -> tuple[float, Array]:
    """Half the mean squared difference to the dense linear model's outputs, and its gradient."""
    residual = inputs @ (weights * mask - weights)
    return float(0.5 * (residual**2).mean()), residual @ inputs / len(inputs)


@pytest.mark.parametrize(
    "solver", [exhaustive, partial(annealed, generator=np.random.default_rng(0), sweeps=100)]
)
def test_large_weights_that_cancel_are_found(solver: Solver) -> None:
    """Weights 5 and −5 of equal inputs do nothing together; magnitude keeps them, the search not.

    Four such weights and four of 1 with inputs of their own, density one half: the loss of
    magnitude's mask is that of all that matters, the loss of the planted one 0. The rows of the
    inputs stand for the gradients of single samples: their Gram matrix is the curvature.
    """
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((200, 6))[:, [0, 0, 1, 1, 2, 3, 4, 5]]
    weights = np.array([5.0, -5, 5, -5, 1, 1, 1, 1])
    mask = np.abs(weights) > 2
    loss, gradient = squared_loss(inputs, weights, mask)
    assert loss > 1
    block = doubtful_block(np.abs(weights), mask, 8, frozen_kept=0, frozen_pruned=0)
    found = search_block(weights, mask, gradient, inputs, block, solver=solver)
    assert found.tolist() == [False] * 4 + [True] * 4


def test_steps_of_small_blocks_descend_and_keep_the_count() -> None:
    """On a quadratic loss, with μ = 1 and λ = 0, a problem is the loss: no step raises it.

    Twelve blocks of 8 among 60 correlated weights, those of the last two steps tabu.
    """
    generator = np.random.default_rng(3)
    inputs = generator.standard_normal((90, 20)) @ generator.standard_normal((20, 60))
    weights = generator.standard_normal(60)
    mask = np.abs(weights) >= np.sort(np.abs(weights))[-20]
    solver = partial(annealed, generator=generator)
    losses, blocks = [squared_loss(inputs, weights, mask)[0]], []
    for _ in range(12):
        loss, gradient = squared_loss(inputs, weights, mask)
        block = doubtful_block(np.abs(weights), mask, 8, tabu=blocks[-2:])
        assert not set(block) & {i for old in blocks[-2:] for i in old}
        mask = search_block(
            weights, mask, gradient, inputs, block, solver=solver, gradient_weight=1, ridge=0
        )
        blocks.append(block)
        losses.append(squared_loss(inputs, weights, mask)[0])
        assert mask.sum() == 20
        assert losses[-1] <= loss + 1e-9
    assert losses[-1] < 0.8 * losses[0]


def test_what_is_outside_the_block_stays() -> None:
    generator = np.random.default_rng(0)
    weights, gradient = generator.standard_normal((2, 30))
    samples, mask = generator.standard_normal((5, 30)), np.arange(30) % 3 == 0
    block = doubtful_block(np.abs(weights), mask, 6)
    found = search_block(weights, mask, gradient, samples, block, solver=exhaustive)
    assert set(np.flatnonzero(found != mask)) <= set(block)
    assert (found != mask).any()
    assert np.array_equal(mask, np.arange(30) % 3 == 0)


def test_bad_arguments_are_refused() -> None:
    ones, mask, block = np.ones(4), np.array([True, True, False, False]), np.arange(4)
    with pytest.raises(MaskError, match="without NaN"):
        doubtful_block(np.full(4, np.nan), mask, 2)
    with pytest.raises(MaskError, match="size of 2 or more"):
        doubtful_block(ones, mask, 1)
    with pytest.raises(MaskError, match="frozen shares"):
        doubtful_block(ones, mask, 2, frozen_kept=1.5)
    with pytest.raises(MaskError, match="forget older blocks or freeze less"):
        doubtful_block(ones, mask, 2, frozen_kept=1.0)
    with pytest.raises(MaskError, match=r"\[N, n\]"):
        block_problem(ones, mask, ones, np.ones((2, 3)), block)
    with pytest.raises(MaskError, match="not finite"):
        block_problem(ones, mask, ones * np.inf, np.ones((2, 4)), block)
    with pytest.raises(MaskError, match="the solver chose 0 of a block, expected 2"):
        search_block(ones, mask, ones, np.eye(4), block, solver=lambda _, start: start & ~start)
