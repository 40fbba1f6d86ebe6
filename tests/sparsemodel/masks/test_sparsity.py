"""PQ and Gini indices in closed form, the bound against its definition, and SAP's numbers."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.sparsity import SCOPES, gini, pq_bound, pq_counts, pq_index

NORMS = [(0.5, 1.0), (1.0, 2.0), (0.3, 1.7)]
values_strategy = st.lists(st.integers(-5, 5), min_size=1, max_size=20).map(
    lambda values: np.array(values, dtype=np.float64)
)


def flat(k: int, d: int) -> NDArray[np.float64]:
    """k equal non-zeros among d values, of a size whose powers are no round numbers."""
    return np.where(np.arange(d) % d < k, -0.3, 0.0)


@pytest.mark.parametrize(("p", "q", "expected"), [(0.5, 1, 0.05558586), (1, 2, 0.08712907)])
def test_pq_index_of_four_values(p: float, q: float, expected: float) -> None:
    assert pq_index(np.array([4.0, -3, 2, 1]), p=p, q=q) == pytest.approx(expected, abs=5e-9)
    assert pq_index(torch.tensor([[2.0, 1], [4, 3]]).bfloat16(), p=p, q=q) == pytest.approx(
        expected, abs=5e-9
    )


@pytest.mark.parametrize(("p", "q"), NORMS)
def test_equal_non_zeros_in_closed_form(p: float, q: float) -> None:
    """I = 1 − (k/d)^(1/p − 1/q), the bound exactly k, and Gini 1 − k/d."""
    for d in (1, 7, 1000):
        for k in {1, (d + 1) // 2, d}:
            expected = 1 - (k / d) ** (1 / p - 1 / q)
            assert pq_index(flat(k, d), p=p, q=q) == pytest.approx(expected, abs=1e-14)
            assert pq_bound(flat(k, d), p=p, q=q) == k
            assert gini(flat(k, d)) == pytest.approx(1 - k / d, abs=1e-14)
    zeros = np.zeros(5)
    assert (pq_index(zeros), pq_bound(zeros), gini(zeros)) == (1.0, 0.0, 1.0)


@given(values_strategy, st.sampled_from(NORMS), st.floats(0, 3))
def test_index_and_bound_are_those_of_the_published_formulas(
    values: NDArray[np.float64], norms: tuple[float, float], eta: float
) -> None:
    p, q = norms
    values[0] = 1.0
    d, norm = len(values), {r: float((np.abs(values) ** r).sum()) ** (1 / r) for r in norms}
    index = 1 - d ** (1 / q - 1 / p) * norm[p] / norm[q]
    bound = d * (1 + eta) ** (-q / (q - p)) * (1 - index) ** (p * q / (q - p))
    assert pq_index(values, p=p, q=q) == pytest.approx(index, abs=1e-12)
    assert pq_bound(values, p=p, q=q, eta=eta) == pytest.approx(bound)


@given(values_strategy, st.sampled_from(NORMS))
def test_no_fewer_than_the_bound_can_stay(
    values: NDArray[np.float64], norms: tuple[float, float]
) -> None:
    """Of the r largest, with η the share that the others have of their sum of powers."""
    p, q = norms
    powers = np.sort(np.abs(values))[::-1] ** p
    for r in range(1, len(values) + 1):
        if powers[:r].sum() > 0:
            eta = powers[r:].sum() / powers[:r].sum()
            assert pq_bound(values, p=p, q=q, eta=eta) <= r + 1e-9


@given(values_strategy, st.floats(1e-3, 1e3), st.integers(0, 99))
def test_indices_ignore_scale_and_order(
    values: NDArray[np.float64], scale: float, seed: int
) -> None:
    moved = np.random.default_rng(seed).permutation(values) * scale
    for index in (pq_index, gini, pq_bound):
        assert index(moved) == pytest.approx(index(values), abs=1e-12)  # type: ignore[operator]
        assert 0 <= index(moved) <= (len(values) if index is pq_bound else 1)  # type: ignore[operator]


@given(values_strategy)
def test_gini_is_half_the_mean_difference_over_the_mean(values: NDArray[np.float64]) -> None:
    magnitudes = np.abs(values)
    if magnitudes.any():
        differences = np.abs(magnitudes[:, None] - magnitudes).mean()
        assert gini(values) == pytest.approx(differences / (2 * magnitudes.mean()), abs=1e-12)


def test_counts_by_hand() -> None:
    """Rows of 10 with 4 and 10 equal non-zeros, 9 of which may go at most.

    By rows 6 and 0 go. Together Σ√|w| = 4 · 3 + 10 and Σ|w| = 4 · 9 + 10, so that 484/46 = 10.52
    of 20 stay and 9 go, the zeros first and then the last of the ones.
    """
    rows = np.concatenate([flat(4, 10) * 30, np.ones(10)]).reshape(2, 10)
    for name, expected in {"neuron": [6, 0], "layer": [9], "global": [9]}.items():
        assert pq_counts({"w": rows}, scope=name)["w"].tolist() == expected
    split = {"a": rows[:1], "b": rows[1:]}
    assert {n: c.tolist() for n, c in pq_counts(split, scope="layer").items()} == {
        "a": [6],
        "b": [0],
    }
    assert {n: c.tolist() for n, c in pq_counts(split, scope="global").items()} == {
        "a": [6],
        "b": [3],
    }


def test_gamma_scales_the_number_and_beta_bounds_it() -> None:
    """60 of 100 may go: γ = .5 takes 30, γ = 2 would take 120 and β leaves 10, or 50."""
    weights = {"w": flat(40, 100)}
    options = [{}, {"gamma": 0.5}, {"gamma": 2.0}, {"gamma": 2.0, "beta": 0.5}, {"gamma": 0.0}]
    assert [int(pq_counts(weights, **o)["w"][0]) for o in options] == [60, 30, 90, 50, 0]  # type: ignore[arg-type]
    assert pq_counts(weights, eta=1.0)["w"] == [90]  # 40 / 2² have to stay


def test_rounding_makes_no_number_negative() -> None:
    """Of two nearly equal values 2.0000000000000004 would have to stay."""
    nearly = 1 - np.array([3.0, 2.0]) * 2.0**-53
    assert pq_bound(nearly, p=1, q=2) > 2
    assert pq_counts({"w": nearly}, p=1, q=2)["w"] == [0]


@pytest.mark.parametrize("scope", SCOPES)
def test_pruned_weights_count_no_more(scope: str) -> None:
    """The numbers under a mask are those of the active weights alone, and of none 0."""
    generator = np.random.default_rng(0)
    whole, active = generator.standard_normal((3, 40)), np.zeros((3, 40), dtype=bool)
    active[:, ::3] = True
    expected = pq_counts({"w": whole[:, ::3]}, scope=scope)["w"]
    mask = Mask({"w": torch.from_numpy(active)})
    found = pq_counts({"w": torch.from_numpy(whole)}, mask, scope=scope)["w"]
    assert found.tolist() == expected.tolist()
    assert found.sum() > 0
    empty = pq_counts({"w": whole}, {"w": np.zeros_like(active)}, scope=scope)["w"]
    assert not empty.any()


@settings(max_examples=60, deadline=None)
@given(st.lists(values_strategy, min_size=1, max_size=3), st.floats(0, 2), st.floats(0, 1))
def test_global_numbers_are_those_of_a_plain_loop(
    layers: list[NDArray[np.float64]], gamma: float, beta: float
) -> None:
    """The smallest over all layers, of equal ones the last first; never more than ⌊β d⌋."""
    everything = np.concatenate(layers)
    d = len(everything)
    number = math.floor(min(gamma * max(0.0, d - pq_bound(everything)), beta * d))
    ranked = sorted((abs(v), -i, -j) for i, layer in enumerate(layers) for j, v in enumerate(layer))
    expected = [sum(-e[1] == i for e in ranked[:number]) for i in range(len(layers))]
    weights = {str(i): layer for i, layer in enumerate(layers)}
    found = pq_counts(weights, scope="global", gamma=gamma, beta=beta)
    assert [int(count[0]) for count in found.values()] == expected


def test_iterating_finds_the_planted_support() -> None:
    """10 of 200 weights are 1 or −1, the others noise of 1e-4.

    Pruning stops with the 10 and one more: a little above 10 have to stay, so that of 11 less
    than one may go.
    """
    generator = np.random.default_rng(1)
    weights = 1e-4 * generator.standard_normal(200)
    support = np.sort(generator.choice(200, 10, replace=False))
    weights[support] = generator.choice([-1, 1], 10)
    active = np.ones(200, dtype=bool)
    while number := int(pq_counts({"w": weights}, {"w": active})["w"][0]):
        smallest = np.argsort(np.where(active, np.abs(weights), np.inf), kind="stable")[:number]
        active[smallest] = False
    assert active.sum() == 11
    assert active[support].all()


def test_bad_arguments_are_refused() -> None:
    ones = np.ones(3)
    for p, q in ((0.0, 1.0), (1.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(SparseModelError, match="0 < p < q"):
            pq_index(ones, p=p, q=q)
    with pytest.raises(SparseModelError, match="eta"):
        pq_bound(ones, eta=-0.1)
    with pytest.raises(MaskError, match="one value"):
        gini(np.array([]))
    with pytest.raises(MaskError, match="NaN"):
        pq_index(np.array([1.0, np.nan]))
    with pytest.raises(SparseModelError, match="known: neuron, layer, global"):
        pq_counts({"w": ones}, scope="channel")
    with pytest.raises(SparseModelError, match="beta"):
        pq_counts({"w": ones}, beta=1.1)
    with pytest.raises(MaskError, match="one weight"):
        pq_counts({})
    with pytest.raises(MaskError, match=r"mask of 'w': expected shape \(3,\), got nothing"):
        pq_counts({"w": ones}, {"v": ones > 0})
