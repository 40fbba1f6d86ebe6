"""Pruning a transformer block by block, each by what the pruned blocks before it give."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsemodel.calibration.batches import Losses, next_token_losses
from sparsemodel.calibration.blocks import block_names, by_blocks
from sparsemodel.calibration.collect import GRADIENTS, calibrate
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.errors import DensityError
from sparsemodel.masks.criteria import Criterion
from sparsemodel.masks.distribution import apportion, n_of_m, uniform
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.prune import prune
from sparsemodel.masks.registry import WeightCriterion, criterion_of, needs_of


def block_weights(model: nn.Module) -> dict[str, list[str]]:
    """Block -> names of the weights of its linear layers: what is usually pruned of a transformer.

    Raises:
        CalibrationError: the model has no list of equal blocks.
    """
    found = {}
    for name in block_names(model):
        layers = model.get_submodule(name).named_modules()
        found[name] = [f"{name}.{n}.weight" for n, m in layers if isinstance(m, nn.Linear)]
    return found


def prune_blocks(
    model: nn.Module,
    density: float,
    batches: Iterable[Any] = (),
    *,
    criterion: str | Criterion | WeightCriterion = "wanda",
    within: str = "row",
    losses: Losses = next_token_losses,
    seed: int = 0,
    inside: Mask | None = None,
    after: Callable[[str], None] = lambda block: None,
) -> Mask:
    """Prune the linear layers of all blocks, each layer to the same density; the model changes.

    Of all their N weights together round(density · N) stay. Where an earlier mask has pruned some,
    each layer keeps the same share of what that left, so that the total is the same; N:M groups
    keep the best n of what is left of them, or all of it.

    Statistics of a block's inputs are those behind the blocks pruned before it; gradients, where
    the criterion takes some, are the dense model's. One block's activations are held at a time.

    Args:
        density: kept of all weights, in (0, 1]; with `within` such as "2:4" what that gives.
        batches: as of `calibrate`; read once, or twice for gradients (then no iterator).
        criterion, within, seed: as of `prune`.
        losses: of a batch's sequences; for criteria of gradients.
        inside: an earlier mask, which has been applied: no other weights stay.
        after: is told of each block when it has been pruned.

    Returns:
        The mask, which has been applied.

    Raises:
        MaskError, DensityError, CalibrationError: as `prune` and `calibrate`; or fewer weights are
            left than are to stay.
    """
    weights = block_weights(model)
    names = [name for block in weights.values() for name in block]
    entry = criterion_of(criterion)
    every = needs_of(entry, names)
    if inside is not None:
        entry = replace(entry, score=_inside(entry.score, inside))
    counts = {} if n_of_m(within) else _counts(model, names, density, inside)
    dense = Calibration()
    if GRADIENTS in every:
        dense = calibrate(model, batches, {GRADIENTS: every[GRADIENTS]}, losses=losses)
    patterns = {}
    places = {block: place for place, block in enumerate(weights)}

    def needs(block: str) -> Mapping[str, Iterable[str]]:
        found = needs_of(entry, weights[block])
        return {kind: names for kind, names in found.items() if kind != GRADIENTS}

    def cut(block: str, found: Calibration) -> None:
        own = int(np.random.SeedSequence((seed, places[block])).generate_state(1)[0])
        mask = prune(
            model, density, criterion=entry, within=within, names=weights[block], seed=own,
            calibration=dense.merge(found),
            distribution=lambda shapes: {name: counts[name] for name in shapes},
        )  # fmt: skip
        if inside is not None:  # groups of which less than n was left
            mask = Mask({name: mask[name] & inside[name] for name in mask})
        mask.apply(model)
        patterns.update({name: mask[name] for name in mask})
        after(block)

    if every:
        by_blocks(model, batches, needs, cut)
    else:
        for block in weights:
            cut(block, Calibration())
    return Mask(patterns)


def _counts(
    model: nn.Module, names: list[str], density: float, inside: Mask | None
) -> dict[str, int]:
    """How many weights of each layer stay."""
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    counts = uniform(shapes, density)
    if inside is None:
        return counts
    left = {name: int(inside[name].sum()) for name in names}
    total, most = sum(counts.values()), sum(left.values())
    if total > most:
        raise DensityError(
            f"density {density:g} keeps {total} weights, but the mask before has left {most}, a "
            f"density of {inside.density:.6g}: ask for a lower one"
        )
    return apportion({name: float(count) for name, count in left.items()}, left, total)


def _inside(score: Criterion, mask: Mask) -> Criterion:
    """A criterion to which what a mask has pruned is worth less than anything."""

    @functools.wraps(score)
    def scored(**given: Any) -> dict[str, Tensor]:
        found = score(**given)
        return {
            name: each.masked_fill(~mask[name].to(each.device), -torch.inf)
            for name, each in found.items()
        }

    return scored
