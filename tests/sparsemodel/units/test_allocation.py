"""How many units stay: exact counts, ties, budgets by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_language import llama, opt
from torch import Tensor, nn

from sparsemodel.calibration.blocks import Block, describe
from sparsemodel.errors import DensityError, MaskError
from sparsemodel.units.allocation import (
    balanced,
    best,
    by_groups,
    by_shares,
    cfsp_shares,
    keep_blocks,
    pooled,
    ranked_in_groups,
    standardised,
    uniform,
)
from sparsemodel.units.masked import unit_mask
from sparsemodel.units.unit import Key, num_parameters

MODELS: dict[str, nn.Module] = {
    "llama": llama(groups=4), "grouped": llama(groups=2), "one key": llama(groups=1), "opt": opt(),
}  # fmt: skip
seeds = st.integers(0, 2**16)
densities = st.floats(0.3, 1.0)
networks = st.sampled_from(sorted(MODELS))


def drawn(model: nn.Module, seed: int, *, levels: int = 6) -> dict[Key, Tensor]:
    """Whole numbers, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (kind, block.name): torch.randint(0, levels, (size,), generator=generator).double()
        for block in describe(model)
        for kind, size in (("heads", 4), ("channels", 24))
    }


def all_equal(scores: dict[Key, Tensor]) -> dict[Key, Tensor]:
    return {key: torch.full_like(score, 0.1) for key, score in scores.items()}


def same(one: dict[Key, Tensor], other: dict[Key, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def in_order(score: Tensor) -> list[int]:
    return sorted(range(len(score)), key=lambda index: (-float(score[index]), index))


@settings(deadline=None, max_examples=40)
@given(seeds, st.floats(0.01, 1.0))
def test_uniform_is_the_best_of_a_plain_sort(seed: int, density: float) -> None:
    scores = drawn(MODELS["llama"], seed)
    for key, kept in uniform(scores, density).items():
        size = len(scores[key])
        expected = in_order(scores[key])[: max(1, round(density * size))]
        assert kept.nonzero().flatten().tolist() == sorted(expected)
    for key, kept in uniform(all_equal(scores), density).items():
        count = max(1, round(density * len(scores[key])))
        assert kept.tolist() == [True] * count + [False] * (len(kept) - count)


def plain_pool(
    model: nn.Module, blocks: list[Block], scores: dict[Key, Tensor], density: float
) -> dict[Key, Tensor]:
    """The same walk, in which costs are counted anew by the mask of every step."""
    order = [(float(s[i]), -n, -i, key) for n, (key, s) in enumerate(scores.items())
             for i in range(len(s))]  # fmt: skip
    kept = {key: torch.arange(len(s)) == in_order(s)[0] for key, s in scores.items()}
    whole = unit_mask(model, blocks, {k: torch.ones_like(v) for k, v in kept.items()}).num_active
    for _, _, index, key in sorted(order, key=lambda e: e[:3], reverse=True):
        grown = kept | {key: kept[key] | (torch.arange(len(kept[key])) == -index)}
        if unit_mask(model, blocks, grown).num_active > round(density * whole):
            break
        kept = grown
    return kept


@settings(deadline=None, max_examples=15)
@given(networks, seeds, densities, st.sampled_from(["heads", "groups", "channels"]))
def test_pooled_is_a_walk_with_counted_costs(
    name: str, seed: int, density: float, kind: str
) -> None:
    model = MODELS[name]
    blocks, scores = describe(model), drawn(model, seed)
    if kind == "groups":
        scores = by_groups(scores, blocks)
    if kind == "channels":
        scores = {key: score for key, score in scores.items() if key[0] == "channels"}
    try:
        found = pooled(model, blocks, scores, density)
    except DensityError:
        floor = {key: torch.arange(len(s)) == in_order(s)[0] for key, s in scores.items()}
        whole = {key: torch.ones(len(s), dtype=torch.bool) for key, s in scores.items()}
        budget = round(density * num_parameters(model, blocks, whole))
        assert num_parameters(model, blocks, floor) > budget
        return
    assert same(found, plain_pool(model, blocks, scores, density))
    assert all(bool(kept.any()) for kept in found.values())


@settings(deadline=None, max_examples=25)
@given(networks, seeds, densities)
def test_the_budget_is_met_by_less_than_one_unit(name: str, seed: int, density: float) -> None:
    model = MODELS[name]
    blocks = describe(model)
    density = max(density, 0.4)
    for scores in (drawn(model, seed), all_equal(drawn(model, seed))):
        found = pooled(model, blocks, standardised(scores), density)
        whole = {key: torch.ones_like(kept) for key, kept in found.items()}
        budget = round(density * num_parameters(model, blocks, whole))
        left = budget - num_parameters(model, blocks, found)
        assert 0 <= left < 268  # a head of OPT, its key and its value


def test_pooled_compares_layers_by_spread() -> None:
    """One layer's scores a thousand times larger take all channels, until standardised."""
    model = MODELS["llama"]
    blocks = describe(model)
    row = torch.arange(24).double()
    scores = {("channels", b.name): row * 1000.0**n for n, b in enumerate(blocks)}
    first, second = (("channels", b.name) for b in blocks)
    found = pooled(model, blocks, scores, 0.5)
    assert (int(found[first].sum()), int(found[second].sum())) == (1, 23)
    found = pooled(model, blocks, standardised(scores), 0.5)
    assert (int(found[first].sum()), int(found[second].sum())) == (12, 12)


@settings(deadline=None, max_examples=25)
@given(networks, seeds, st.integers(-20, 20))
def test_scaling_scores_changes_nothing(name: str, seed: int, power: int) -> None:
    model = MODELS[name]
    blocks, scores = describe(model), drawn(model, seed)
    scaled = {key: 2.0**power * score for key, score in scores.items()}
    for allocate in (
        lambda s: uniform(s, 0.5),
        lambda s: balanced(model, blocks, s, 0.5),
        lambda s: pooled(model, blocks, s, 0.6),
        lambda s: pooled(model, blocks, standardised(s), 0.6),
        lambda s: uniform(ranked_in_groups(s, blocks), 0.5),
    ):
        assert same(allocate(scores), allocate(scaled))
    # By layer it changes a pool alone, and not one that is standardised.
    factors = {key: 2.0 ** (3 * n) for n, key in enumerate(scores)}
    by_layer = {key: factors[key] * score for key, score in scores.items()}
    assert same(uniform(scores, 0.5), uniform(by_layer, 0.5))
    pools = [pooled(model, blocks, standardised(s), 0.6) for s in (scores, by_layer)]
    assert same(*pools)


@settings(deadline=None, max_examples=25)
@given(networks, seeds, st.floats(0.05, 1.0))
def test_balanced_makes_up_for_the_rounding_of_heads(name: str, seed: int, density: float) -> None:
    model = MODELS[name]
    blocks, scores = describe(model), drawn(model, seed)
    found = balanced(model, blocks, scores, density)
    plain = uniform(scores, density)
    for block in blocks:
        heads, channels = ("heads", block.name), ("channels", block.name)
        assert torch.equal(found[heads], plain[heads])
        own = {key: found[key] for key in (heads, channels)}
        whole = num_parameters(model, [block], {k: torch.ones_like(v) for k, v in own.items()})
        wanted = density * whole
        errors = [
            abs(num_parameters(model, [block], own | {channels: torch.arange(24) < count}) - wanted)
            for count in range(1, 25)
        ]
        missed = abs(num_parameters(model, [block], own) - wanted)
        assert missed == pytest.approx(min(errors))


def test_balanced_by_hand() -> None:
    """Of 4 · 256 + 24 · 48 parameters 60 % are 1305.6; two heads have 512, 17 channels 816."""
    model = MODELS["llama"]
    found = balanced(model, describe(model), drawn(model, 0), 0.6)
    assert [int(kept.sum()) for kept in found.values()] == [2, 17] * 2
    assert [int(kept.sum()) for kept in uniform(drawn(model, 0), 0.6).values()] == [2, 14] * 2


@pytest.mark.parametrize("name", MODELS)
def test_density_one_keeps_everything(name: str) -> None:
    model = MODELS[name]
    blocks, scores = describe(model), drawn(model, 3)
    for found in (
        uniform(scores, 1.0),
        balanced(model, blocks, scores, 1.0),
        pooled(model, blocks, scores, 1.0),
        pooled(model, blocks, by_groups(scores, blocks), 1.0),
    ):
        assert all(bool(kept.all()) for kept in found.values())


def test_groups_have_the_mean_of_their_heads() -> None:
    model = MODELS["grouped"]
    blocks = describe(model)
    scores = {("heads", blocks[0].name): torch.tensor([1.0, 2.0, 5.0, 0.0])}
    found = by_groups(scores, blocks)
    assert {key: score.tolist() for key, score in found.items()} == {
        ("groups", blocks[0].name): [1.5, 2.5]
    }
    mask = unit_mask(model, blocks, best(found, {("groups", blocks[0].name): 1}))
    rows = mask[f"{blocks[0].query}.weight"].any(1)
    assert rows.tolist() == [False] * 8 + [True] * 8


def test_heads_are_ranked_in_their_groups() -> None:
    model = MODELS["grouped"]
    blocks = describe(model)
    key = ("heads", blocks[0].name)
    scores = {key: torch.tensor([1.0, 2.0, 9.0, 8.0])}
    assert uniform(scores, 0.5)[key].tolist() == [False, False, True, True]
    ranked = ranked_in_groups(scores, blocks)
    assert uniform(ranked, 0.5)[key].tolist() == [False, True, True, False]
    ties = ranked_in_groups({key: torch.ones(4)}, blocks)
    assert uniform(ties, 0.5)[key].tolist() == [True, False, True, False]
    for density in (0.1, 0.5, 0.7, 1.0):
        kept = uniform(ranked, density, multiples={"heads": 2})[key].reshape(2, 2).sum(1)
        assert kept[0] == kept[1] > 0


def test_counts_are_multiples() -> None:
    scores = {("channels", "a"): torch.arange(24).double()}
    counts = [int(uniform(scores, d, multiples={"channels": 8})["channels", "a"].sum())
              for d in (0.01, 0.4, 0.55, 0.9, 1.0)]  # fmt: skip
    assert counts == [8, 8, 16, 24, 24]
    with pytest.raises(MaskError, match="24 channels, which is no multiple of 7"):
        uniform(scores, 0.5, multiples={"channels": 7})


def importance(angles: list[float]) -> dict[Key, Tensor]:
    return {("blocks", str(n)): torch.tensor([angle]) for n, angle in enumerate(angles)}


def test_shares_of_cfsp_by_hand() -> None:
    angles = [0.10, 0.12, 0.17]
    found = cfsp_shares(importance(angles), 0.5)
    raw = [1 / (1 + math.exp(-26.2144 * (angle - 0.13))) for angle in angles]
    expected = [0.5 * each / (sum(raw) / 3) for each in raw]
    assert max(expected) < 1
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)
    uniform_shares = cfsp_shares(importance(angles), 0.5, sharpness=0.0)
    assert list(uniform_shares.values()) == pytest.approx([0.5] * 3)
    # Drawn together: the largest would be above 1, and stops short of it.
    tight = cfsp_shares(importance(angles), 0.8)
    assert max(tight.values()) == pytest.approx(0.8 + 0.2 / 1.05)
    stretch = [0.8 * each / (sum(raw) / 3) - 0.8 for each in raw]
    factor = (0.2 / 1.05) / max(stretch)
    assert list(tight.values()) == pytest.approx([0.8 + factor * s for s in stretch], rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6),
    st.floats(0.05, 1.0),
    st.sampled_from([1, 2, 8]),
    seeds,
)
def test_shares_keep_the_density_and_the_order(
    angles: list[float], density: float, multiple: int, seed: int
) -> None:
    shares = cfsp_shares(importance(angles), density)
    assert sum(shares.values()) / len(shares) == pytest.approx(density)
    assert all(0 < share <= 1 for share in shares.values())
    values = list(shares.values())
    for a in range(len(angles)):
        for b in range(len(angles)):
            assert angles[a] >= angles[b] or values[a] <= values[b] + 1e-9
    generator = torch.Generator().manual_seed(seed)
    scores = {("channels", name): torch.randint(0, 5, (24,), generator=generator).double()
              for name in shares}  # fmt: skip
    total = round(math.fsum(share * 24 / multiple for share in values))
    if total < len(shares):
        with pytest.raises(DensityError, match="fewer than"):
            by_shares(scores, shares, multiple=multiple)
        return
    found = by_shares(scores, shares, multiple=multiple)
    counts = [int(kept.sum()) for kept in found.values()]
    assert sum(counts) == total * multiple
    assert all(count % multiple == 0 and count > 0 for count in counts)
    for key, kept in found.items():
        expected = in_order(scores[key])[: int(kept.sum())]
        assert kept.nonzero().flatten().tolist() == sorted(expected)


def test_blocks_are_kept_by_score_over_the_whole_network() -> None:
    scores = importance([0.3, 0.1, 0.3, 0.2])
    for count, expected in ((1, [1, 0, 0, 0]), (2, [1, 0, 1, 0]), (3, [1, 0, 1, 1]), (4, [1] * 4)):
        found = keep_blocks(scores, count)
        assert [kept.tolist() for kept in found.values()] == [[bool(e)] for e in expected]


def test_what_cannot_be_is_refused() -> None:
    model = MODELS["grouped"]
    blocks, scores = describe(model), drawn(MODELS["grouped"], 0)
    key = ("heads", blocks[0].name)
    nan = scores | {key: torch.full((4,), torch.nan)}
    for density in (0.0, 1.1, float("nan")):
        for call in (
            lambda d: uniform(scores, d),
            lambda d: balanced(model, blocks, scores, d),
            lambda d: pooled(model, blocks, scores, d),
            lambda d: cfsp_shares(importance([0.5]), d),
        ):
            with pytest.raises(DensityError, match="density must be in"):
                call(density)
    for refused in (lambda: uniform(nan, 0.5), lambda: pooled(model, blocks, nan, 0.5)):
        with pytest.raises(MaskError, match="NaN"):
            refused()
    with pytest.raises(DensityError, match="the lowest density possible is"):
        pooled(model, blocks, scores, 0.05)
    with pytest.raises(MaskError, match="keep_blocks"):
        pooled(model, blocks, {("blocks", blocks[0].name): torch.ones(1)}, 0.5)
    with pytest.raises(MaskError, match=r"expected 4, got \(3,\)"):
        pooled(model, blocks, scores | {key: torch.ones(3)}, 0.5)
    with pytest.raises(MaskError, match="heads or groups, and of channels"):
        balanced(model, blocks, {key: scores[key]}, 0.5)
    with pytest.raises(MaskError, match="counts of"):
        best(scores, {key: 1})
    with pytest.raises(DensityError, match="cannot keep 5"):
        best({key: scores[key]}, {key: 5})
    with pytest.raises(DensityError, match="a share must be in"):
        by_shares({("channels", "0"): torch.ones(4)}, {"0": 1.5})
    with pytest.raises(MaskError, match="no multiple of 3"):
        by_shares({("channels", "0"): torch.ones(4)}, {"0": 0.5}, multiple=3)
    with pytest.raises(MaskError, match="shares of"):
        by_shares({("channels", "0"): torch.ones(4)}, {"1": 0.5})
    with pytest.raises(DensityError, match="got 0"):
        keep_blocks(importance([0.5]), 0)
