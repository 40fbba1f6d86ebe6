"""Swaps of DSnoT: by hand, against a plain loop, exact counts, and errors that never grow."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsemodel.calibration.statistics import Moments
from sparsemodel.errors import CalibrationError, MaskError
from sparsemodel.masks.structure import is_n_of_m, n_of_m_mask
from sparsemodel.recovery.dsnot import dsnot

SEEDS = st.integers(0, 2**16)


def problem(seed: int, *, rows: int, width: int) -> tuple[Tensor, Moments]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    weight[:, 0] = weight[:, 1]  # ties
    spread = torch.rand(width, generator=generator)
    spread[width // 2] = 0.0
    inputs = torch.randn(width, generator=generator) + spread * torch.randn(
        20, width, generator=generator
    )
    inputs[:, 1] = inputs[:, 0]
    return weight, Moments.of(inputs)


def smallest_kept(weight: Tensor, moments: Moments, keep: int) -> Tensor:
    """Wanda's mask: the same number in each row."""
    scores = weight.abs() * moments.norms
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order[:, :keep], True)


def errors(weight: Tensor, pattern: Tensor, moments: Moments) -> Tensor:
    return weight.double().masked_fill(pattern, 0.0) @ moments.mean


def plain(
    weight: Tensor,
    pattern: Tensor,
    moments: Moments,
    *,
    max_cycles: int,
    threshold: float,
    gamma: float,
    m: int | None,
) -> Tensor:
    """Row by row, swap by swap, in numbers of Python."""
    mean, variance, norms = (
        one.tolist() for one in (moments.mean, moments.variance, moments.norms)
    )
    refined = pattern.tolist()
    for row, kept in enumerate(refined):
        w = weight[row].tolist()
        group = m or len(w)
        effect = [a * b for a, b in zip(w, mean, strict=True)]
        error = sum(e for e, k in zip(effect, kept, strict=True) if not k)
        sign = 1 if error > 0 else -1
        out = [j for j, k in enumerate(kept) if not k and effect[j] * sign > 0]
        into = [j for j, k in enumerate(kept) if k and effect[j] * sign < 0]
        for _ in range(max_cycles):
            pairs = {
                j: min(near, key=lambda k: (abs(w[k]) * norms[k], k))
                for j in out
                if (near := [k for k in into if k // group == j // group])
            }
            if not pairs or abs(error) <= threshold:
                break

            def gain(j: int, effect: list[float] = effect) -> float:
                spread = variance[j] ** gamma
                return abs(effect[j]) / spread if spread else math.inf

            grown = max(pairs, key=lambda j: (gain(j), -j))
            pruned = pairs[grown]
            after = error + effect[pruned] - effect[grown]
            if after * sign < 0:
                break
            error = after
            kept[grown], kept[pruned] = True, False
            out.remove(grown)
            into.remove(pruned)
    return torch.tensor(refined)


def test_one_swap_by_hand() -> None:
    """Means (1, 1, 1, 1), variances (.25, .25, 0, 0); pruned 1 and 2, so ε = 3.

    Of equal variances the larger effect is grown, 2; of the active only −1 has the other sign.
    ε = 3 − 1 − 2 = 0, where the row is done.
    """
    weight = torch.tensor([[1.0, 2.0, -1.0, 4.0]])
    moments = Moments.of(torch.tensor([[0.5, 1.5, 1.0, 1.0], [1.5, 0.5, 1.0, 1.0]]))
    found = dsnot(weight, torch.tensor([[False, False, True, True]]), moments)
    assert found.tolist() == [[False, True, False, True]]
    assert errors(weight, found, moments).tolist() == [0.0]


def test_an_input_that_fluctuates_is_grown_later() -> None:
    """Effects 3 and 2 with variances 4 and 1: 3/4 < 2/1, but 3 > 2 with γ = 0."""
    weight = torch.tensor([[3.0, 2.0, -0.1, -0.1]])
    moments = Moments.of(torch.tensor([[-1.0, 0.0, 1.0, 1.0], [3.0, 2.0, 1.0, 1.0]]))
    pattern = torch.tensor([[False, False, True, False]])
    assert moments.variance.tolist() == [4.0, 1.0, 0.0, 0.0]
    assert dsnot(weight, pattern, moments)[0].tolist() == [False, True, False, False]
    assert dsnot(weight, pattern, moments, gamma=0.0)[0].tolist() == [True, False, False, False]


def test_of_active_weights_the_lowest_score_goes() -> None:
    """ε = 8. −1 and −2 have the other sign; .5 scores lowest of all but has ε's sign."""
    weight = torch.tensor([[8.0, -2.0, -1.0, 0.5]])
    moments = Moments.of(torch.ones(2, 4))
    pattern = torch.tensor([[False, True, True, True]])
    # 8 − 1 − 8 = −1 would pass zero: nothing is done.
    assert torch.equal(dsnot(weight, pattern, moments), pattern)
    weight[0, 0] = 6.0
    pattern = torch.tensor([[False, True, True, True, False]])
    weight = torch.cat([weight, torch.tensor([[4.0]])], 1)
    # ε = 10; 6 is grown and −1 pruned: 10 − 1 − 6 = 3. Next 4 for −2: 3 − 2 − 4 < 0, so no more.
    found = dsnot(weight, pattern, Moments.of(torch.ones(2, 5)))
    assert found.tolist() == [[True, True, False, True, False]]


def test_a_small_error_is_left_alone() -> None:
    weight = torch.tensor([[0.06, 0.03, -0.01, -0.01]])
    moments = Moments.of(torch.ones(2, 4))
    pattern = torch.tensor([[False, False, True, True]])
    assert torch.equal(dsnot(weight, pattern, moments, threshold=0.1), pattern)
    found = dsnot(weight, pattern, moments, threshold=0.05)
    assert found.tolist() == [[True, False, False, True]]
    assert torch.equal(dsnot(weight, pattern, moments, threshold=0.05, max_cycles=0), pattern)


@settings(deadline=None, max_examples=60)
@given(
    seed=SEEDS,
    width=st.sampled_from([8, 16, 64]),
    density=st.floats(0.1, 0.9),
    max_cycles=st.sampled_from([0, 1, 3, 50]),
    gamma=st.sampled_from([0.0, 1.0, 1.5]),
    m=st.sampled_from([None, 4, 8]),
)
def test_equals_a_plain_loop_keeps_counts_and_lets_no_error_grow(
    *, seed: int, width: int, density: float, max_cycles: int, gamma: float, m: int | None
) -> None:
    weight, moments = problem(seed, rows=6, width=width)
    pattern = torch.rand(6, width, generator=torch.Generator().manual_seed(seed)) < density
    found = dsnot(weight, pattern, moments, max_cycles=max_cycles, threshold=0.02, gamma=gamma, m=m)
    expected = plain(
        weight, pattern, moments, max_cycles=max_cycles, threshold=0.02, gamma=gamma, m=m
    )
    assert torch.equal(found, expected)
    group = m or width
    before, after = (one.view(6, -1, group).sum(2) for one in (pattern, found))
    assert torch.equal(before, after)
    assert ((found != pattern).sum(1) <= 2 * max_cycles).all()
    was, now = errors(weight, pattern, moments), errors(weight, found, moments)
    assert (now.abs() <= was.abs() * (1 + 1e-12) + 1e-12).all()
    assert (now * was >= -1e-9).all()  # nor passes zero


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([8, 16, 64]))
def test_permuted_rows_and_a_turned_sign_change_nothing(seed: int, width: int) -> None:
    weight, moments = problem(seed, rows=5, width=width)
    pattern = smallest_kept(weight, moments, width // 2)
    found = dsnot(weight, pattern, moments, threshold=0.0)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    permuted = dsnot(weight[order], pattern[order], moments, threshold=0.0)
    assert torch.equal(permuted, found[order])
    assert torch.equal(dsnot(-weight, pattern, moments, threshold=0.0), found)


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_n_of_m_stays_exact(seed: int) -> None:
    weight, moments = problem(seed, rows=5, width=16)
    pattern = n_of_m_mask({"w": weight.abs()})["w"]
    found = dsnot(weight, pattern, moments, threshold=0.0, m=4)
    assert is_n_of_m(found)
    assert int(found.sum()) == 5 * 8


def test_masks_get_better() -> None:
    """Planted: inputs with means, Wanda at 70 %; the mean output comes closer in most rows."""
    weight, moments = problem(3, rows=64, width=64)
    pattern = smallest_kept(weight, moments, 19)
    found = dsnot(weight, pattern, moments, threshold=0.0)
    was, now = (errors(weight, one, moments).abs() for one in (pattern, found))
    assert now.mean() < 0.5 * was.mean()
    assert (now < was).sum() > 40


def test_what_does_not_fit_is_refused() -> None:
    weight, moments = problem(0, rows=2, width=8)
    pattern = smallest_kept(weight, moments, 4)
    with pytest.raises(MaskError, match=r"rows of a multiple of 3 weights, these have 8"):
        dsnot(weight, pattern, moments, m=3)
    with pytest.raises(MaskError, match="groups of 0"):
        dsnot(weight, pattern, moments, m=0)
    with pytest.raises(MaskError, match="expected max_cycles, threshold and gamma >= 0"):
        dsnot(weight, pattern, moments, threshold=float("nan"))
    with pytest.raises(MaskError, match="NaN or infinity"):
        dsnot(weight.clone().fill_(float("nan")), pattern, moments)
    with pytest.raises(MaskError, match="pattern of shape"):
        dsnot(weight, pattern.T, moments)
    with pytest.raises(MaskError, match=r"expected the weight \[out, in\]"):
        dsnot(weight[0], pattern[0], moments)
    with pytest.raises(CalibrationError, match="moments are of 4"):
        dsnot(weight, pattern, Moments.of(torch.ones(2, 4)))
