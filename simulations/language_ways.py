"""Ways of pruning a language model in one shot, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsemodel.calibration.batches import next_token_losses
from sparsemodel.calibration.blocks import Block, describe
from sparsemodel.calibration.collect import INPUTS, calibrate
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.masks.block_search import annealed, doubtful_block, search_block
from sparsemodel.masks.by_blocks import block_weights, prune_blocks
from sparsemodel.masks.calibrated import wanda
from sparsemodel.masks.criteria import Criterion
from sparsemodel.masks.distribution import n_of_m
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.probe import probing
from sparsemodel.masks.prune import prune
from sparsemodel.masks.registry import CALIBRATED, needs_of
from sparsemodel.recovery.bias import prune_into_bias
from sparsemodel.recovery.dsnot import dsnot
from sparsemodel.recovery.reconstruction import reconstruct
from sparsemodel.units import scores as unit_scores
from sparsemodel.units.allocation import by_shares, cfsp_shares, pooled, uniform
from sparsemodel.units.depth import cfsp_blocks
from sparsemodel.units.masked import unit_mask
from sparsemodel.units.registry import UNIT_CRITERIA
from sparsemodel.units.registry import needs_of as units_needs
from sparsemodel.units.unit import CHANNELS, HEADS

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
        model, mask, task.batches, parts=("norms", "mask-lora"), steps=task.steps, lr=3e-3,
        seed=task.seed,
    )  # fmt: skip
    return mask


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
    for step in range(SEARCHES + 1):
        with torch.no_grad():
            for name, weight in dense.items():
                model.get_parameter(name).copy_(weight * mask[name])
        if step == SEARCHES:
            return mask
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
    raise AssertionError("the last step returns")


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


def _units(name: str, kinds: Collection[str] = (HEADS, CHANNELS)) -> Way:
    """Heads and channels by a criterion of units, the same share of each in every block."""

    def prune_it(model: nn.Module, task: Task) -> Mask:
        blocks = describe(model)
        found = _calibrated(name, model, blocks, task)
        if name == "random":
            scores = unit_scores.random(model, blocks, seed=task.seed)
        else:
            scores = UNIT_CRITERIA[name].score(model, blocks, found)
        scores = {key: score for key, score in scores.items() if key[0] in kinds}
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


def _cfsp(model: nn.Module, task: Task) -> Mask:
    """CFSP: channels alone, more of them in blocks that turn their input more."""
    blocks = describe(model)
    found = calibrate(model, task.batches, units_needs(["cfsp", "cfsp-blocks"], blocks))
    shares = cfsp_shares(cfsp_blocks(model, blocks, found), task.density)
    mask = unit_mask(model, blocks, by_shares(unit_scores.cfsp(model, blocks, found), shares))
    mask.apply(model)
    return mask


def _calibrated(name: str, model: nn.Module, blocks: Sequence[Block], task: Task) -> Calibration:
    needs = units_needs([name], blocks)
    if not needs:
        return Calibration()
    return calibrate(model, task.batches, needs, num_heads=blocks[0].num_heads)


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
    "wanda, then DSnoT": _mended,
    "wanda, then PERP": _reconstructed,
    NOT_IN_GROUPS[0]: _searched,
    NOT_IN_GROUPS[1]: _globally("global"),
    NOT_IN_GROUPS[2]: _globally("global-minimum"),
}
"""Of single weights."""
UNITS: Mapping[str, Way] = {
    **{
        f"units, {name}": _units(name)
        for name in ("random", "magnitude", "ifv", "wifv", "wifn", "amp", "minitron")
    },
    "units, FLAP without bias": _flap(with_bias=False),
    "units, FLAP": _flap(with_bias=True),
    "channels, magnitude": _units("magnitude", [CHANNELS]),
    "channels, CFSP": _cfsp,
}
"""Of heads and channels."""
