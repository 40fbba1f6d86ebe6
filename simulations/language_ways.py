"""Ways of pruning a language model in one shot, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsemodel.calibration.batches import next_token_losses
from sparsemodel.calibration.collect import calibrate
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.masks.block_search import annealed, doubtful_block, search_block
from sparsemodel.masks.by_blocks import block_weights, prune_blocks
from sparsemodel.masks.calibrated import wanda
from sparsemodel.masks.distribution import n_of_m
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.probe import probing
from sparsemodel.masks.prune import prune
from sparsemodel.masks.registry import CALIBRATED, CRITERIA, WeightCriterion, needs_of
from sparsemodel.pipeline.running import Pipeline
from sparsemodel.pipeline.stages import Bias, Dsnot, Perp, Stage, Units, Weights
from sparsemodel.units.unit import CHANNELS

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Task:
    """What a way of pruning is asked for.

    Attributes:
        batches: for calibration.
        within: "row", or such as "2:4".
        steps: of training for each block, where a way trains.
    """

    batches: Batches
    density: float
    within: str
    seed: int
    steps: int = 200


Way = Callable[[nn.Module, Task], Mask]
"""Prunes the model; gives the mask, which has been applied."""


def _by_blocks(criterion: str | WeightCriterion) -> Way:
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


SEARCHES, SEARCHED, TABU = 8, 256, 3
"""Steps of iCBS; weights of each layer that may change places in one, a sixteenth of the layer at
most; and steps for which they may not do so again."""


def _searched(model: nn.Module, task: Task) -> Mask:
    """Wanda's mask by layers, and iCBS on one block of weights of every layer in each step.

    Departs from the paper in that a step changes all layers, since gradients of all cost one pass
    over the sequences.
    """
    names = [name for block in block_weights(model).values() for name in block]
    found = calibrate(model, task.batches, needs_of("wanda", names))
    mask = prune(
        model, task.density, criterion=wanda, within="layer", calibration=found, names=names
    )
    scores = {n: s.numpy().ravel() for n, s in wanda(model, names, calibration=found).items()}
    dense = {name: model.get_parameter(name).detach().clone() for name in names}
    solver = partial(annealed, generator=np.random.default_rng(task.seed))
    known: dict[str, list[NDArray[np.int64]]] = {name: [] for name in names}
    mask.apply(model)
    for _ in range(SEARCHES):
        blocks = {
            name: doubtful_block(
                scores[name],
                mask[name].numpy().ravel(),
                min(SEARCHED, mask[name].numel() // 16),
                tabu=tabu[-TABU:],
            )
            for name, tabu in known.items()
        }
        samples = _sample_gradients(model, blocks, task.batches)
        patterns = {}
        for name, block in blocks.items():
            known[name].append(block)
            flat, own = mask[name].numpy().ravel().copy(), samples[name]
            flat[block] = search_block(
                dense[name].numpy().ravel()[block], flat[block], own.mean(0), own,
                np.arange(len(block)), solver=solver,
            )  # fmt: skip
            patterns[name] = torch.from_numpy(flat).view_as(mask[name])
        mask = Mask(patterns)
        with torch.no_grad():
            for name, weight in dense.items():
                model.get_parameter(name).copy_(weight * mask[name])
    return mask


def _sample_gradients(
    model: nn.Module, places: Mapping[str, NDArray[np.int64]], batches: Batches
) -> dict[str, NDArray[np.float32]]:
    """Of each sequence's loss, at some places of some weights: float32 [sequences, places]."""
    rows: dict[str, list[Tensor]] = {name: [] for name in places}
    at = {name: torch.from_numpy(own) for name, own in places.items()}
    weights = [model.get_parameter(name) for name in places]
    with probing(model):
        model.eval()
        for tokens in (row for batch in batches for row in batch["input_ids"]):
            loss = next_token_losses(model, {"input_ids": tokens[None]}).sum()
            for name, found in zip(at, torch.autograd.grad(loss, weights), strict=True):
                rows[name].append(found.flatten()[at[name]])
    return {name: torch.stack(found).numpy() for name, found in rows.items()}


def _least_first(
    model: nn.Module, names: Sequence[str], calibration: Calibration
) -> dict[str, Tensor]:
    return {name: -score for name, score in wanda(model, names, calibration).items()}


_REVERSED = replace(CRITERIA["wanda"], score=_least_first)
NOT_IN_GROUPS = (
    "wanda by layers, then iCBS",
    "magnitude, all layers",
    "magnitude, all layers, a minimum each",
)
"""Ways that rank or exchange weights over whole layers, which N:M groups do not allow."""
WEIGHTS: Mapping[str, Way] = {
    "random": _by_blocks("random"),
    "magnitude": _by_blocks("magnitude"),
    **{name: _by_blocks(name) for name in CALIBRATED},
    "wanda, reversed": _by_blocks(_REVERSED),
    "wanda, then DSnoT": _in_stages(lambda task: [_wanda(task), Dsnot()]),
    "wanda, then PERP": _in_stages(lambda task: [_wanda(task), Perp(steps=task.steps)]),
    NOT_IN_GROUPS[0]: _searched,
    NOT_IN_GROUPS[1]: _globally("global"),
    NOT_IN_GROUPS[2]: _globally("global-minimum"),
}
"""Of single weights."""
UNITS: Mapping[str, Way] = {
    **{
        f"units, {name}": _in_stages(lambda task, name=name: [Units(task.density, name)])
        for name in ("random", "magnitude", "ifv", "wifv", "wifn", "amp", "minitron")
    },
    "units, FLAP without bias": _in_stages(lambda task: [Units(task.density)]),
    "units, FLAP": _in_stages(lambda task: [Units(task.density), Bias()]),
    "channels, magnitude": _in_stages(lambda task: [Units(task.density, "magnitude", (CHANNELS,))]),
    "channels, CFSP": _in_stages(lambda task: [Units(task.density, "cfsp", (CHANNELS,))]),
}
"""Of heads and channels."""
