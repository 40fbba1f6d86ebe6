"""Ways of pruning a language model in one shot, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparsemodel.calibration.blocks import Block, describe
from sparsemodel.calibration.collect import INPUTS, calibrate
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.masks.by_blocks import block_weights, prune_blocks
from sparsemodel.masks.criteria import Criterion
from sparsemodel.masks.distribution import n_of_m
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.prune import prune
from sparsemodel.masks.registry import CALIBRATED
from sparsemodel.recovery.bias import prune_into_bias
from sparsemodel.recovery.dsnot import dsnot
from sparsemodel.recovery.reconstruction import reconstruct
from sparsemodel.units import scores as unit_scores
from sparsemodel.units.allocation import pooled, uniform
from sparsemodel.units.masked import unit_mask
from sparsemodel.units.registry import UNIT_CRITERIA
from sparsemodel.units.registry import needs_of as units_needs

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Task:
    """What a way of pruning is asked for.

    Attributes:
        batches: for calibration.
        within: "row", or such as "2:4".
    """

    batches: Batches
    density: float
    within: str
    seed: int


Way = Callable[[nn.Module, Task], Mask]
"""Prunes the model; gives the mask, which has been applied."""


def _by_blocks(criterion: str | Criterion) -> Way:
    def prune_it(model: nn.Module, task: Task) -> Mask:
        return prune_blocks(
            model, task.density, task.batches, criterion=criterion, within=task.within,
            seed=task.seed,
        )  # fmt: skip

    return prune_it


def _globally(distribution: str) -> Way:
    def prune_it(model: nn.Module, task: Task) -> Mask:
        names = [name for block in block_weights(model).values() for name in block]
        mask = prune(model, task.density, distribution=distribution, names=names)
        mask.apply(model)
        return mask

    return prune_it


def _mended(model: nn.Module, task: Task) -> Mask:
    """Wanda's masks, each moved by DSnoT before the next block is looked at."""
    groups = n_of_m(task.within)

    def moved(mask: Mask, found: Calibration) -> Mask:
        return Mask({
            name: dsnot(
                model.get_parameter(name).detach(),
                pattern,
                found.moments(INPUTS, name.removesuffix(".weight")),
                m=groups[1] if groups else None,
            )
            for name, pattern in mask.items()
        })  # fmt: skip

    return prune_blocks(model, task.density, task.batches, within=task.within, refine=moved)


def _reconstructed(model: nn.Module, task: Task) -> Mask:
    """Wanda's mask, and PERP: norms and MaskLoRA trained for what the dense blocks gave."""
    mask = _by_blocks("wanda")(copy.deepcopy(model), task)
    reconstruct(
        model, mask, task.batches, parts=("norms", "mask-lora"), steps=200, lr=3e-3, seed=task.seed
    )
    return mask


def _units(name: str) -> Way:
    """Heads and channels by a criterion of units, the same share of each in every block."""

    def prune_it(model: nn.Module, task: Task) -> Mask:
        blocks = describe(model)
        found = _calibrated(name, model, blocks, task)
        if name == "random":
            scores = unit_scores.random(model, blocks, seed=task.seed)
        else:
            scores = UNIT_CRITERIA[name].score(model, blocks, found)
        mask = unit_mask(model, blocks, uniform(scores, task.density))
        mask.apply(model)
        return mask

    return prune_it


def _flap(*, with_bias: bool) -> Way:
    """FLAP: one ranking over all blocks, and biases for what was removed."""

    def prune_it(model: nn.Module, task: Task) -> Mask:
        blocks = describe(model)
        found = _calibrated("wifv", model, blocks, task)
        scores = unit_scores.wifv(model, blocks, found, standard=True)
        mask = unit_mask(model, blocks, pooled(model, blocks, scores, task.density))
        outputs = [name for block in blocks for name in (block.attention_out, block.down)]
        for name in outputs if with_bias else []:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear), "a block is described by its linear layers"
            prune_into_bias(layer, mask[f"{name}.weight"], found.moments(INPUTS, name))
        mask.apply(model)
        return mask

    return prune_it


def _calibrated(name: str, model: nn.Module, blocks: Sequence[Block], task: Task) -> Calibration:
    needs = units_needs([name], blocks)
    if not needs:
        return Calibration()
    return calibrate(model, task.batches, needs, num_heads=blocks[0].num_heads)


NOT_IN_GROUPS = ("magnitude, all layers", "magnitude, all layers, a minimum each")
"""Ways that share weights out over layers, which N:M groups do not allow."""
WEIGHTS: Mapping[str, Way] = {
    "random": _by_blocks("random"),
    "magnitude": _by_blocks("magnitude"),
    **{name: _by_blocks(name) for name in CALIBRATED},
    "wanda, then DSnoT": _mended,
    "wanda, then PERP": _reconstructed,
    NOT_IN_GROUPS[0]: _globally("global"),
    NOT_IN_GROUPS[1]: _globally("global-minimum"),
}
"""Of single weights."""
UNITS: Mapping[str, Way] = {
    **{
        f"units, {name}": _units(name)
        for name in ("random", "magnitude", "ifv", "wifv", "wifn", "amp", "minitron")
    },
    "units, FLAP without bias": _flap(with_bias=False),
    "units, FLAP": _flap(with_bias=True),
}
"""Of heads and channels."""
