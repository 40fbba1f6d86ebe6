"""Distributions of active weights over layers: exact totals and hand-worked cases."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sparsemodel.errors import DensityError, MaskError
from sparsemodel.masks.distribution import (
    erk,
    erk_conv,
    global_ranking,
    minimum_threshold,
    noise_uniform,
    uniform,
)

Shapes = dict[str, tuple[int, ...]]

shapes_strategy = st.lists(
    st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6
).map(lambda shapes: {f"layer{i}": shape for i, shape in enumerate(shapes)})


def sizes(shapes: Shapes) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


def draw_density(shapes: Shapes, fraction: float) -> float:
    """A density between the lowest possible one and 1."""
    lowest = len(shapes) / sum(sizes(shapes).values())
    return lowest + fraction * (1 - lowest)


def test_uniform_gives_the_remainder_to_the_largest_fractions() -> None:
    """0.5 of 3, 5 and 6 is 1.5, 2.5 and 3, total 7: floors give 6, the first fraction gets one."""
    assert uniform({"a": (3,), "b": (5,), "c": (6,)}, 0.5) == {"a": 2, "b": 2, "c": 3}


def test_uniform_takes_the_weight_of_a_starved_layer_from_the_others() -> None:
    """0.1 of 2 and 98 is 0.2 and 9.8, total 10; the small layer must have 1, so the big has 9."""
    assert uniform({"a": (2,), "b": (98,)}, 0.1) == {"a": 1, "b": 9}


def test_uniform_takes_from_the_smallest_fraction() -> None:
    """0.1 of 1, 1, 48 and 50 is 0.1, 0.1, 4.8 and 5.0; ones and floors make 11 of 10.

    The layer that is 0.0 above its floor gives one back, not the one that is 0.8 above it.
    """
    shapes: Shapes = {"a": (1,), "b": (1,), "c": (48,), "d": (50,)}
    assert uniform(shapes, 0.1) == {"a": 1, "b": 1, "c": 4, "d": 4}


def test_erk_by_hand() -> None:
    """4x6 and 10x10x3x3 at 100 active: 10 ε + 26 ε = 100 gives ε = 2.78, so 27.8 > 24.

    The first saturates at 24 and the second takes the other 76.
    """
    shapes: Shapes = {"fc": (4, 6), "conv": (10, 10, 3, 3)}
    assert erk(shapes, 100 / 924) == {"fc": 24, "conv": 76}


def test_erk_without_saturation_is_proportional_to_the_sum_of_dimensions() -> None:
    """Sums 20 and 40, 30 active weights: 10 and 20."""
    assert erk({"a": (10, 10), "b": (20, 20)}, 30 / 500) == {"a": 10, "b": 20}


def test_erk_counts_the_dimensions_of_the_kernel() -> None:
    """10 + 10 + 3 + 3 = 13 + 13, so both get the same."""
    counts = erk({"conv": (10, 10, 3, 3), "fc": (13, 13)}, 100 / 1069)
    assert counts == {"conv": 50, "fc": 50}


def test_erk_splits_the_excess_of_a_full_layer_in_proportion() -> None:
    """Sums 51, 20, 40 and 200 active: 51/111 of 200 is 92 > 50, and 150 split 1 : 2."""
    counts = erk({"a": (1, 50), "b": (10, 10), "c": (20, 20)}, 200 / 550)
    assert counts == {"a": 50, "b": 50, "c": 100}


def test_erk_saturates_layers_one_after_another() -> None:
    """Sums 2, 4, 200 over 1, 4 and 10000 weights: the first two fill up one after the other."""
    counts = erk({"a": (1, 1), "b": (2, 2), "c": (100, 100)}, 0.05)
    assert counts == {"a": 1, "b": 4, "c": 495}


def test_erk_of_a_perceptron() -> None:
    """784·300, 300·100 and 100·10 at .1: ε · sums of dimensions, once the last is full."""
    shapes: Shapes = {"a": (300, 784), "b": (100, 300), "c": (10, 100)}
    counts = erk(shapes, 0.1)
    densities = [counts[name] / math.prod(shape) for name, shape in shapes.items()]
    assert densities == pytest.approx([0.079568, 0.230189, 1], abs=5e-5)
    assert counts == {"a": 18714, "b": 6906, "c": 1000}


def test_erk_conv_leaves_matrices_the_density_of_the_whole() -> None:
    """52 of 520 weights: the matrix keeps 4 of its 40; sums 15 and 25 split the other 48 as 3 : 5.

    Without a convolution it is uniform.
    """
    shapes: Shapes = {"fc": (10, 4), "one": (5, 8, 1, 1), "two": (10, 11, 2, 2)}
    counts = erk_conv(shapes, 0.1)
    assert counts == {"fc": 4, "one": 18, "two": 30}
    matrices: Shapes = {"a": (10, 10), "b": (3, 50)}
    assert erk_conv(matrices, 0.1) == uniform(matrices, 0.1)


@settings(max_examples=100, deadline=None)
@given(shapes_strategy, st.floats(0, 1))
def test_uniform_and_erk_meet_the_total_exactly(shapes: Shapes, fraction: float) -> None:
    density = draw_density(shapes, fraction)
    capacities = sizes(shapes)
    for distribution in (uniform, erk, erk_conv):
        counts = distribution(shapes, density)
        assert list(counts) == list(shapes)
        assert sum(counts.values()) == round(density * sum(capacities.values()))
        assert all(1 <= counts[name] <= capacities[name] for name in shapes)


@settings(max_examples=60, deadline=None)
@given(shapes_strategy, st.floats(0, 1), st.integers(0, 99))
def test_noise_uniform_is_near_the_density_or_exact(
    shapes: Shapes, fraction: float, seed: int
) -> None:
    density = draw_density(shapes, fraction)
    generator = np.random.default_rng(seed)
    counts = noise_uniform(shapes, density, generator=generator, max_draws=3)
    capacities = sizes(shapes)
    wanted = density * sum(capacities.values())
    total = sum(counts.values())
    assert abs(total - wanted) <= 0.02 * wanted or total == round(wanted)
    assert all(1 <= counts[name] <= capacities[name] for name in shapes)


def test_noise_uniform_spreads_layer_densities_over_half_to_one_and_a_half() -> None:
    shapes: Shapes = {f"layer{i}": (100, 100) for i in range(20)}
    generator = np.random.default_rng(0)
    densities = [
        count / 10_000
        for _ in range(20)
        for count in noise_uniform(shapes, 0.1, generator=generator).values()
    ]
    assert 0.05 <= min(densities) < 0.055
    assert 0.145 < max(densities) <= 0.15


def test_noise_uniform_is_decided_by_its_generator() -> None:
    shapes: Shapes = {"a": (50, 50), "b": (30, 30)}

    def draw(seed: int) -> dict[str, int]:
        return noise_uniform(shapes, 0.2, generator=np.random.default_rng(seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_noise_uniform_at_density_one_is_dense() -> None:
    counts = noise_uniform(
        {"a": (5,), "b": (7,)}, 1.0, generator=np.random.default_rng(0), max_draws=5
    )
    assert counts == {"a": 5, "b": 7}


def test_global_ranking_uses_one_threshold() -> None:
    """The best 4 of 8: 9, 8, 7 of a and 6 of b."""
    scores = {"a": torch.tensor([9.0, 8.0, 7.0, 1.0]), "b": torch.tensor([[6.0, 5.0], [4.0, 3.0]])}
    assert global_ranking(scores, 0.5) == {"a": 3, "b": 1}


def test_global_ranking_breaks_ties_in_order_and_keeps_every_layer() -> None:
    """All equal, 3 of 6: b's best is forced, the other two places go to a, which comes first."""
    scores = {"a": torch.ones(4), "b": torch.ones(2)}
    assert global_ranking(scores, 0.5) == {"a": 2, "b": 1}
    assert global_ranking({"a": torch.ones(4), "b": torch.zeros(2)}, 2 / 6) == {"a": 1, "b": 1}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(-4, 4), min_size=1, max_size=8), min_size=1, max_size=4),
    st.floats(0, 1),
)
def test_global_ranking_equals_a_plain_loop(layers: list[list[int]], fraction: float) -> None:
    scores = {f"layer{i}": torch.tensor(layer) for i, layer in enumerate(layers)}
    density = draw_density({name: tuple(s.shape) for name, s in scores.items()}, fraction)
    ranked = sorted((-v, i, j) for i, layer in enumerate(layers) for j, v in enumerate(layer))
    kept = {min(entry for entry in ranked if entry[1] == i) for i in range(len(layers))}
    for entry in ranked:
        if len(kept) < round(density * len(ranked)):
            kept.add(entry)
    expected = {name: sum(e[1] == i for e in kept) for i, name in enumerate(scores)}
    assert global_ranking(scores, density) == expected


def test_minimum_threshold_by_hand() -> None:
    """5 of 10 at a minimum of 2: the layer of one weight stays dense, b keeps 2, a the other 2.

    One threshold alone would give a 3 and b 1, as the best of every layer is kept anyway.
    """
    scores = {
        "a": torch.tensor([9.0, 8.0, 7.0, 6.0]),
        "b": torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]),
        "c": torch.tensor([0.0]),
    }
    assert minimum_threshold(scores, 0.5, share=0.2) == {"a": 2, "b": 2, "c": 1}
    assert global_ranking(scores, 0.5) == {"a": 3, "b": 1, "c": 1}


def test_minimum_threshold_keeps_a_share_of_all_weights_by_default() -> None:
    """0.0005 of 20,000 is 10: the layer of low scores keeps 10, that of 8 weights all, and no more.

    At a density of 28 of 20,000 the minimum is all that there is.
    """
    scores = {"low": np.zeros(9_992), "small": np.zeros(8), "high": np.arange(1.0, 10_001.0)}
    counts = {"low": 10, "small": 8, "high": 982}
    assert minimum_threshold(scores, 0.05) == counts
    assert minimum_threshold(scores, 28 / 20_000) == {"low": 10, "small": 8, "high": 10}
    with pytest.raises(DensityError, match=r"fewer than 28: 10 a layer, or all; .* is 0\.0014$"):
        minimum_threshold(scores, 27 / 20_000)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(-4, 4), min_size=1, max_size=8), min_size=1, max_size=4),
    st.floats(0, 0.5),
    st.floats(0, 1),
)
def test_minimum_threshold_equals_plain_water_filling(
    layers: list[list[int]], share: float, fraction: float
) -> None:
    """Rank all; layers that get too few are given their minimum and left out; rank the others.

    Scores have many ties, and where all are equal the count is exact too.
    """
    num_weights = sum(map(len, layers))
    least = max(1, round(share * num_weights))
    floors = [min(least, len(layer)) for layer in layers]
    total = round(sum(floors) + fraction * (num_weights - sum(floors)))
    fixed: dict[int, int] = {}
    while True:
        ranked = sorted(
            (-v, i, j)
            for i, layer in enumerate(layers)
            for j, v in enumerate(layer)
            if i not in fixed
        )[: total - sum(fixed.values())]
        counts = [fixed.get(i, sum(e[1] == i for e in ranked)) for i in range(len(layers))]
        few = {i: floor for i, floor in enumerate(floors) if counts[i] < floor}
        if not few:
            break
        fixed |= few
    scores = {f"layer{i}": np.array(layer) for i, layer in enumerate(layers)}
    found = minimum_threshold(scores, total / num_weights, share=share)
    assert found == {f"layer{i}": count for i, count in enumerate(counts)}
    assert sum(found.values()) == total


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan"), float("inf")])
def test_densities_outside_the_range_are_refused(density: float) -> None:
    shapes: Shapes = {"a": (10, 10)}
    with pytest.raises(DensityError, match=r"\(0, 1\]"):
        uniform(shapes, density)
    with pytest.raises(DensityError):
        erk(shapes, density)
    with pytest.raises(DensityError):
        noise_uniform(shapes, density, generator=np.random.default_rng(0))
    with pytest.raises(DensityError):
        global_ranking({"a": torch.ones(10)}, density)


def test_a_density_too_low_for_all_layers_names_the_lowest_possible() -> None:
    """3 layers of 100 weights need 3 of 300, density 0.01; and that density works."""
    shapes: Shapes = dict.fromkeys("abc", (10, 10))
    with pytest.raises(DensityError, match=r"lowest density possible for this model is 0\.01$"):
        uniform(shapes, 0.005)
    assert uniform(shapes, 0.01) == {"a": 1, "b": 1, "c": 1}


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(DensityError, match="one layer or more"):
        uniform({}, 0.5)
    with pytest.raises(DensityError, match="empty"):
        erk({"a": (0, 3)}, 0.5)
    with pytest.raises(DensityError, match="spread"):
        noise_uniform({"a": (9,)}, 0.5, generator=np.random.default_rng(0), spread=1.5)
    with pytest.raises(DensityError, match="share"):
        minimum_threshold({"a": torch.ones(9)}, 0.5, share=float("nan"))
    with pytest.raises(MaskError, match="NaN"):
        global_ranking({"a": torch.tensor([float("nan"), 1.0])}, 0.5)
