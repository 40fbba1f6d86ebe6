"""Which units stay, of scores and a density. Every function returns (kind, block) -> bool [units].

Counts are exact: of equal scores the lower index stays, and every kind keeps at least one unit in
every block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsemodel.calibration.blocks import Block
from sparsemodel.errors import DensityError, MaskError
from sparsemodel.masks.distribution import apportion, score_array
from sparsemodel.runtime.adjust import largest
from sparsemodel.units.scores import standard_scores
from sparsemodel.units.unit import (
    BLOCKS,
    CHANNELS,
    GROUPS,
    HEADS,
    Costs,
    Kept,
    Key,
    Scores,
    check_units,
    costs,
    num_parameters,
)

TOKENS_OF_CFSP = 128 * 2048
"""Tokens of the authors' calibration, over which they add up angles before dividing by 10⁴."""


def best(scores: Scores, counts: Mapping[Key, int]) -> dict[Key, Tensor]:
    """The `counts[key]` units of highest score.

    Raises:
        MaskError: scores that are NaN, or keys that differ.
        DensityError: a count outside [0, units].

    >>> best({("heads", "0"): torch.tensor([1.0, 3.0, 1.0])}, {("heads", "0"): 2})
    {('heads', '0'): tensor([ True,  True, False])}
    """
    if scores.keys() != counts.keys():
        raise MaskError(f"scores of {list(scores)} but counts of {list(counts)}")
    _check_ordered(scores)
    for (kind, name), score in scores.items():
        if not 0 <= counts[kind, name] <= len(score):
            raise DensityError(
                f"{name!r} has {len(score)} {kind}; cannot keep {counts[kind, name]}"
            )
    return {
        key: torch.from_numpy(largest(score_array(score), counts[key]))
        for key, score in scores.items()
    }


def uniform(
    scores: Scores, density: float, *, multiples: Mapping[str, int] | None = None
) -> dict[Key, Tensor]:
    """round(density · units) of each kind in each block, at least one.

    Args:
        density: kept units over all, in (0, 1].
        multiples: kind -> what the counts of that kind are multiples of, rounded to the nearest:
            {"channels": 128} for kernels, {"heads": num_groups} for as many in each KV group of
            scores that are `ranked_in_groups`.

    Raises:
        DensityError: a density outside (0, 1].
        MaskError: scores that are NaN, or units that are no multiple.
    """
    _check_density(density)
    counts = {}
    for (kind, name), score in scores.items():
        multiple = (multiples or {}).get(kind, 1)
        if multiple < 1 or len(score) % multiple:
            raise MaskError(f"{name!r} has {len(score)} {kind}, which is no multiple of {multiple}")
        counts[kind, name] = multiple * max(1, round(density * len(score) / multiple))
    return best(scores, counts)


def balanced(
    model: nn.Module, blocks: Sequence[Block], scores: Scores, density: float
) -> dict[Key, Tensor]:
    """As `uniform`, but channels make up for what rounding the number of heads has moved.

    Each block keeps as nearly density · its parameters (of heads and channels) as whole channels
    allow, within one and all of them.
    Source: Mugnaini et al., AMP (2025). Departs from it in rounding to the nearest count.

    Raises:
        DensityError: a density outside (0, 1].
        MaskError: scores that are NaN, or not of heads (or groups) and channels of all blocks.
    """
    check_units(model, blocks, scores)
    kept = uniform(scores, density)
    for block in blocks:
        attention = next((key for key in _attention(block) if key in scores), None)
        channels = (CHANNELS, block.name)
        if attention is None or channels not in scores:
            raise MaskError(f"{block.name!r}: expected scores of heads or groups, and of channels")
        both: Kept = {key: torch.ones_like(kept[key]) for key in (attention, channels)}
        wanted = density * num_parameters(model, [block], both)
        wanted -= num_parameters(model, [block], {attention: kept[attention]})
        count = round(wanted / costs(model, block).channel)
        count = min(max(1, count), len(scores[channels]))
        kept |= best({channels: scores[channels]}, {channels: count})
    return kept


def pooled(
    model: nn.Module, blocks: Sequence[Block], scores: Scores, density: float
) -> dict[Key, Tensor]:
    """Heads (or groups) and channels of all blocks in one ranking, down to a share of parameters.

    The best unit of each kind and block stays. The others follow by score, whatever they cost, and
    the walk ends before the first that would bring their parameters above round(density · all
    parameters of scored units). A head whose KV group has none yet brings the group's key and
    value along. Equal scores stay in the order of `scores`, then of the index.
    Source: An et al., FLAP (AAAI 2024), AL-AM; scores of `wifv` and its like with `standard=True`,
    of others by `standardised`. Departs from its code in costs, which are counted instead of 512/3
    channels a head, and in that no block is emptied and the budget is never passed.

    Raises:
        DensityError: a density outside (0, 1], or too low for one unit of each kind and block.
        MaskError: scores that are NaN, or of other units.
    """
    _check_density(density)
    check_units(model, blocks, scores)
    _check_ordered(scores)
    if any(kind == BLOCKS for kind, _ in scores):
        raise MaskError("blocks are not ranked among their own heads and channels: keep_blocks")
    kept = best(scores, dict.fromkeys(scores, 1))
    whole = num_parameters(model, blocks, {k: torch.ones_like(v) for k, v in kept.items()})
    budget, spent = round(density * whole), num_parameters(model, blocks, kept)
    if spent > budget:
        raise DensityError(
            f"density {density:g} keeps {budget} of {whole} parameters, but one unit of each kind "
            f"in every block has {spent}; the lowest density possible is {spent / whole:.6g}"
        )
    chosen = {key: values.tolist() for key, values in kept.items()}
    prices = {block.name: (block, costs(model, block)) for block in blocks}
    places = [(key, index) for key, score in scores.items() for index in range(len(score))]
    joint = torch.cat([score.double() for score in scores.values()])
    for place in torch.argsort(joint, descending=True, stable=True).tolist():
        key, index = places[place]
        if chosen[key][index]:
            continue
        spent += _price(key, index, chosen[key], *prices[key[1]])
        if spent > budget:
            break
        chosen[key][index] = True
    return {key: torch.tensor(values, device="cpu") for key, values in chosen.items()}


def standardised(scores: Scores) -> dict[Key, Tensor]:
    """Scores of each kind and block with mean 0 and standard deviation 1, to be pooled."""
    return {key: standard_scores(score) for key, score in scores.items()}


def by_groups(scores: Scores, blocks: Sequence[Block]) -> dict[Key, Tensor]:
    """Scores of KV groups instead of heads: the mean of their heads."""
    sizes = {block.name: block.num_groups for block in blocks}
    return {
        (GROUPS, name) if kind == HEADS else (kind, name): (
            score.reshape(sizes[name], -1).mean(1) if kind == HEADS else score
        )
        for (kind, name), score in scores.items()
    }


def ranked_in_groups(scores: Scores, blocks: Sequence[Block]) -> dict[Key, Tensor]:
    """Heads by their place in their own KV group: the best of each before the second of any.

    Source: Muralidharan et al., Compact Language Models (NeurIPS 2024): every group keeps as many
    heads, so that what is left is grouped too; see `multiples` of `uniform`.
    """
    ranked = dict(scores)
    for block in blocks:
        key = (HEADS, block.name)
        if key in scores:
            groups = scores[key].double().reshape(block.num_groups, -1)
            places = groups.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            ranked[key] = -places.reshape(-1).double()
    return ranked


def cfsp_shares(importance: Scores, density: float, *, sharpness: float = 1.0) -> dict[str, float]:
    """Which share of its channels each block keeps: more where it turns its input more.

    Proportional to σ(a (I − mean I) · 26.2144) and density in the mean. Where a share would pass
    1, all are drawn towards the mean until the largest is density + (1 − density) / 1.05.
    Source: Wang et al., CFSP (COLING 2025), and its code. Departs from the code in taking the mean
    angle of a token, not the sum over tokens, so that the constant is the authors' data's size,
    128 · 2,048 / 10⁴.

    Args:
        importance: of blocks, as `depth.cfsp_blocks`.
        density: mean share, in (0, 1].
        sharpness: a; 0 is uniform.

    Raises:
        DensityError: a density outside (0, 1].
    """
    _check_density(density)
    angles = torch.cat([score.double() for score in importance.values()])
    weights = torch.sigmoid(sharpness * (angles - angles.mean()) * TOKENS_OF_CFSP / 1e4)
    shares = density * weights / weights.mean()
    if (top := float(shares.max())) >= 1.0 and top > density:
        shares = density + (shares - density) * ((1.0 - density) / (top - density) / 1.05)
    return dict(zip((name for _, name in importance), shares.tolist(), strict=True))


def by_shares(
    scores: Scores, shares: Mapping[str, float], *, multiple: int = 1
) -> dict[Key, Tensor]:
    """The best channels of each block, by the block's share.

    In all round(Σ share · channels / multiple) · multiple stay; what rounding leaves over goes to
    the largest remainders.

    Args:
        scores: of channels alone.
        shares: block -> share of its channels, in (0, 1].
        multiple: of which the counts are multiples.

    Raises:
        DensityError: a share outside (0, 1], or too few channels for every block.
        MaskError: scores that are NaN or of other blocks, or channels that are no multiple.
    """
    if {(CHANNELS, name) for name in shares} != scores.keys():
        raise MaskError(f"shares of {list(shares)} but scores of {list(scores)}")
    sizes = {name: len(scores[CHANNELS, name]) for name in shares}
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise DensityError(f"{name!r}: a share must be in (0, 1], got {share}")
        if multiple < 1 or sizes[name] % multiple:
            raise MaskError(
                f"{name!r} has {sizes[name]} channels, which is no multiple of {multiple}"
            )
    quotas = {name: share * sizes[name] / multiple for name, share in shares.items()}
    total = round(math.fsum(quotas.values()))
    if total < len(shares):
        raise DensityError(
            f"these shares keep {total * multiple} channels, fewer than {multiple} in each of "
            f"{len(shares)} blocks"
        )
    counts = apportion(quotas, {n: size // multiple for n, size in sizes.items()}, total)
    return best(scores, {(CHANNELS, name): multiple * count for name, count in counts.items()})


def keep_blocks(scores: Scores, num_blocks: int) -> dict[Key, Tensor]:
    """The blocks of highest score in the whole network.

    Args:
        scores: of blocks alone.
        num_blocks: how many stay, in [1, blocks].

    Raises:
        DensityError: another number.
        MaskError: scores that are NaN.
    """
    _check_ordered(scores)
    if not 1 <= num_blocks <= len(scores):
        raise DensityError(f"of {len(scores)} blocks 1 or more can stay, got {num_blocks}")
    joint = torch.cat([score.double() for score in scores.values()])
    chosen = torch.from_numpy(largest(score_array(joint), num_blocks))
    return dict(zip(scores, chosen.split(1), strict=True))


def _attention(block: Block) -> tuple[Key, Key]:
    return (HEADS, block.name), (GROUPS, block.name)


def _price(key: Key, index: int, kept: list[bool], block: Block, price: Costs) -> int:
    """What one more unit of a block adds."""
    if key[0] == CHANNELS:
        return price.channel
    per_group = block.num_heads // block.num_groups
    if key[0] == GROUPS:
        return per_group * price.head + price.shared
    first = index - index % per_group
    alone = not any(kept[first : first + per_group])
    return price.head + (price.shared if alone else 0)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:  # NaN fails both comparisons
        raise DensityError(f"density must be in (0, 1], got {density}")


def _check_ordered(scores: Scores) -> None:
    for (kind, name), score in scores.items():
        if torch.isnan(score).any():
            raise MaskError(f"scores of {kind} of {name!r} hold NaN: no order can be made of them")
