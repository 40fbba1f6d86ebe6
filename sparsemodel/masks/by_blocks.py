"""Pruning a transformer block by block, each by what the pruned blocks before it give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from sparsemodel.calibration.batches import Losses, next_token_losses
from sparsemodel.calibration.blocks import block_names, by_blocks
from sparsemodel.calibration.collect import GRADIENTS, calibrate
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.masks.criteria import Criterion
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.prune import prune
from sparsemodel.masks.registry import WeightCriterion, needs_of

Refine = Callable[[Mask, Calibration], Mask]


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
    refine: Refine = lambda mask, found: mask,
    after: Callable[[str], None] = lambda block: None,
) -> Mask:
    """Prune the linear layers of all blocks, each layer to the same density; the model changes.

    Statistics of a block's inputs are those behind the blocks pruned before it; gradients, where
    the criterion takes some, are the dense model's. One block's activations are held at a time.

    Args:
        density: of every layer, in (0, 1]; with `within` such as "2:4" what that gives.
        batches: as of `calibrate`; read once, or twice for gradients (then no iterator).
        criterion, within, seed: as of `prune`.
        losses: of a batch's sequences; for criteria of gradients.
        refine: is given a block's mask, before it is applied, and its statistics, and gives a
            better one.
        after: is told of each block when it has been pruned.

    Returns:
        The mask, which has been applied.

    Raises:
        MaskError, DensityError, CalibrationError: as `prune` and `calibrate`.
    """
    weights = block_weights(model)
    every = needs_of(criterion, [name for names in weights.values() for name in names])
    dense = Calibration()
    if GRADIENTS in every:
        dense = calibrate(model, batches, {GRADIENTS: every[GRADIENTS]}, losses=losses)
    patterns = {}
    places = {block: place for place, block in enumerate(weights)}

    def needs(block: str) -> Mapping[str, Iterable[str]]:
        found = needs_of(criterion, weights[block])
        return {kind: names for kind, names in found.items() if kind != GRADIENTS}

    def cut(block: str, found: Calibration) -> None:
        own = int(np.random.SeedSequence((seed, places[block])).generate_state(1)[0])
        mask = prune(
            model, density, criterion=criterion, within=within, names=weights[block], seed=own,
            calibration=dense.merge(found),
        )  # fmt: skip
        mask = refine(mask, found)
        mask.apply(model)
        patterns.update({name: mask[name] for name in mask})
        after(block)

    if every:
        by_blocks(model, batches, needs, cut)
    else:
        for block in weights:
            cut(block, Calibration())
    return Mask(patterns)
