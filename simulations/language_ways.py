"""Ways of pruning a language model in one shot, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparsemodel.masks.by_blocks import block_weights, prune_blocks
from sparsemodel.masks.calibrated import CALIBRATED
from sparsemodel.masks.criteria import Criterion
from sparsemodel.masks.distribution import n_of_m
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.prune import prune
from sparsemodel.pipeline.running import Pipeline
from sparsemodel.pipeline.stages import Bias, Dsnot, Perp, Stage, Units, Weights

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


def _in_stages(stages: Callable[[Task], Sequence[Stage]]) -> Way:
    return lambda model, task: Pipeline(
        model, stages(task), task.batches, seed=task.seed
    ).run()  # fmt: skip


def _wanda(task: Task) -> Weights:
    """Of a density, or of groups, which say it by themselves."""
    return Weights(None if n_of_m(task.within) else task.density, within=task.within)


NOT_IN_GROUPS = ("magnitude, all layers", "magnitude, all layers, a minimum each")
"""Ways that share weights out over layers, which N:M groups do not allow."""
WEIGHTS: Mapping[str, Way] = {
    "random": _by_blocks("random"),
    "magnitude": _by_blocks("magnitude"),
    **{name: _by_blocks(name) for name in CALIBRATED},
    "wanda, then DSnoT": _in_stages(lambda task: [_wanda(task), Dsnot()]),
    "wanda, then PERP": _in_stages(lambda task: [_wanda(task), Perp(steps=200)]),
    NOT_IN_GROUPS[0]: _globally("global"),
    NOT_IN_GROUPS[1]: _globally("global-minimum"),
}
"""Of single weights."""
UNITS: Mapping[str, Way] = {
    **{
        f"units, {name}": _in_stages(lambda task, name=name: [Units(task.density, name)])
        for name in ("random", "magnitude", "ifv", "wifv", "wifn", "amp", "minitron")
    },
    "units, FLAP without bias": _in_stages(lambda task: [Units(task.density)]),
    "units, FLAP": _in_stages(lambda task: [Units(task.density), Bias()]),
}
"""Of heads and channels."""
