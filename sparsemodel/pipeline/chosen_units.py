"""Heads and channels of a transformer chosen by a criterion, by the allocation of its paper."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

from sparsemodel.calibration.blocks import describe
from sparsemodel.calibration.collect import calibrate
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.units import depth, scores
from sparsemodel.units.allocation import balanced, by_shares, cfsp_shares, pooled, uniform
from sparsemodel.units.registry import UNIT_CRITERIA, needs_of
from sparsemodel.units.unit import CHANNELS, HEADS, Key

FLAP, CFSP, RANDOM = "flap", "cfsp", "random"
UNIT_CHOICES = (FLAP, "wifv", "ifv", "wifn", "amp", "minitron", CFSP, "magnitude", RANDOM)
"""Criteria of heads and channels: those of UNIT_CRITERIA, and FLAP's with its allocation."""
KINDS = (HEADS, CHANNELS)
_LOOKED_AT = {FLAP: ("wifv",), CFSP: (CFSP, "cfsp-blocks")}


def chosen_units(
    model: nn.Module,
    batches: Iterable[Any],
    density: float,
    *,
    criterion: str = FLAP,
    kinds: Collection[str] = KINDS,
    seed: int = 0,
) -> dict[Key, Tensor]:
    """Which heads and channels stay; (kind, block) -> bool [units].

    `flap` ranks the units of all blocks together, `cfsp` gives every block its own share of
    channels; by all others every block keeps the same share, in which channels make up for the
    rounding of heads (`balanced`).

    Args:
        batches: as of `calibrate`; read once.
        density: kept share of the parameters of these units, in (0, 1], as nearly as whole units
            allow; of all blocks with `flap` and `cfsp`, of each with the others.
        criterion: one of UNIT_CHOICES.
        kinds: "heads", "channels" or both; `cfsp` has channels alone.
        seed: of `random`.

    Raises:
        CalibrationError: a network that is not described by its names, or no data.
        DensityError: a density outside (0, 1], or too low for a unit of each kind and block.
    """
    blocks = describe(model)
    needs = needs_of(_LOOKED_AT.get(criterion, (criterion,)), blocks)
    found = Calibration()
    if needs:
        found = calibrate(model, batches, needs, num_heads=blocks[0].num_heads)
    if criterion == FLAP:
        scored = scores.wifv(model, blocks, found, standard=True)
    elif criterion == RANDOM:
        scored = scores.random(model, blocks, seed=seed)
    else:
        scored = UNIT_CRITERIA[criterion].score(model, blocks, found)
    scored = {key: score for key, score in scored.items() if key[0] in kinds}
    if criterion == FLAP:
        return pooled(model, blocks, scored, density)
    if criterion == CFSP:
        return by_shares(scored, cfsp_shares(depth.cfsp_blocks(model, blocks, found), density))
    if len(kinds) == 1:
        return uniform(scored, density)
    return balanced(model, blocks, scored, density)
