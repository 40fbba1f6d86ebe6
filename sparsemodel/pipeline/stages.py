"""The stages of a pipeline: what prunes a transformer, and what mends it.

Each is a frozen dataclass with a `name`; `run` changes the model of a `Work` and gives its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from sparsemodel.calibration.blocks import by_blocks, describe
from sparsemodel.calibration.collect import INPUTS
from sparsemodel.calibration.statistics import Calibration, Moments
from sparsemodel.errors import DensityError, MaskError
from sparsemodel.masks.by_blocks import block_weights, prune_blocks
from sparsemodel.masks.distribution import n_of_m
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.registry import CALIBRATED
from sparsemodel.pipeline.chosen_units import CFSP, FLAP, KINDS, UNIT_CHOICES, chosen_units
from sparsemodel.recovery.bias import prune_into_bias
from sparsemodel.recovery.dsnot import dsnot
from sparsemodel.recovery.perp import USUAL
from sparsemodel.recovery.reconstruction import reconstruct
from sparsemodel.units.masked import unit_mask
from sparsemodel.units.unit import CHANNELS

CONTROLS = ("magnitude", "random")
"""Criteria that any other has to beat."""
CHOICES = (*CALIBRATED, *CONTROLS)
"""Criteria of weights."""


@dataclass
class Work:
    """What stages work on.

    Attributes:
        model: under the last mask; changes.
        dense: the same before any stage; stays. It is the model itself where no stage asks for it.
        batches: for calibration, read by every stage.
        masks: of all linear layers of the blocks: of ones, and after each stage.
        after: is told of each block whose weights have been ranked.
    """

    model: nn.Module
    dense: nn.Module
    batches: Sequence[Any]
    stages: Sequence[Stage]
    seed: int
    masks: list[Mask]
    after: Callable[[str], None] = field(default=lambda block: None)


@dataclass(frozen=True)
class Units:
    """Heads and channels are removed, by `chosen_units`.

    Attributes:
        density: kept share of their parameters, in (0, 1], as nearly as whole units allow.
        criterion: one of UNIT_CHOICES.
        kinds: "heads", "channels" or both.
    """

    density: float
    criterion: str = FLAP
    kinds: tuple[str, ...] = KINDS

    name: ClassVar = "units"

    def __post_init__(self) -> None:
        _check_known(self.criterion, UNIT_CHOICES, "criterion of units")
        _check_density(self.density)
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise MaskError(f"kinds of units: expected some of {KINDS}, got {self.kinds}")
        if self.criterion == CFSP and self.kinds != (CHANNELS,):
            raise MaskError("cfsp scores channels alone: take these units (--unit-kind channels)")

    @property
    def told(self) -> str:
        """What it does, in few words."""
        what = "units" if len(self.kinds) == len(KINDS) else self.kinds[0]
        return f"{what} to {self.density:g} by {self.criterion}"

    def run(self, work: Work) -> Mask:
        """Set the weights of removed units to zero; their biases reach nothing, and stay."""
        kept = chosen_units(
            work.model, work.batches, self.density, criterion=self.criterion, kinds=self.kinds,
            seed=work.seed,
        )  # fmt: skip
        cut = unit_mask(work.model, describe(work.model), kept, biases=False)
        mask = work.masks[-1].replace({name: work.masks[-1][name] & cut[name] for name in cut})
        mask.apply(work.model)
        return mask


@dataclass(frozen=True)
class Weights:
    """Single weights are removed, block by block (`prune_blocks`).

    Attributes:
        density: kept share of all weights in the blocks' linear layers, those that earlier stages
            removed included, in (0, 1]: of N, round(density · N) stay. None: .5, or what N:M groups
            give, which are asked for no other.
        criterion: one of CHOICES.
        within: where weights are ranked against each other: "row", "layer", or such as "2:4".
    """

    density: float | None = None
    criterion: str = "wanda"
    within: str = "row"

    name: ClassVar = "weights"

    def __post_init__(self) -> None:
        _check_known(self.criterion, CHOICES, "criterion")
        groups = n_of_m(self.within)
        if self.within not in {"row", "layer"} and groups is None:
            raise MaskError(
                f"pattern: expected 'row', 'layer' or such as '2:4', got {self.within!r}"
            )
        _check_density(self.share)
        if groups and self.share not in {1.0, groups[0] / groups[1]}:
            raise DensityError(
                f"{self.within!r} keeps {groups[0] / groups[1]:g} of all weights, not "
                f"{self.share:g}: leave the density out"
            )

    @property
    def share(self) -> float:
        """The density."""
        if self.density is not None:
            return self.density
        groups = n_of_m(self.within)
        return groups[0] / groups[1] if groups else 0.5

    @property
    def told(self) -> str:
        """What it does, in few words."""
        share = self.within if n_of_m(self.within) else f"{self.share:g} in each {self.within}"
        return f"weights to {share} by {self.criterion}"

    def run(self, work: Work) -> Mask:
        """Set the weights that rank lowest to zero."""
        return prune_blocks(
            work.model, self.share, work.batches, criterion=self.criterion, within=self.within,
            seed=work.seed, inside=work.masks[-1], after=work.after,
        )  # fmt: skip


@dataclass(frozen=True)
class Dsnot:
    """Weights are exchanged within rows (`recovery.dsnot`), directly after `Weights`.

    As many stay in every row, and none of those that a stage before `Weights` removed comes back.
    Departs from the published code in that all blocks are pruned once before the first is looked
    at here; what each then sees comes from blocks that were exchanged.
    """

    name: ClassVar = "dsnot"
    told: ClassVar = "weights exchanged by DSnoT"

    def run(self, work: Work) -> Mask:
        """Move the mask."""
        weights, (room, mask) = work.stages[len(work.masks) - 2], work.masks[-2:]
        assert isinstance(weights, Weights), "check_stages has seen to it"
        groups = n_of_m(weights.within)

        def moved(name: str, moments: Moments) -> Tensor:
            weight = work.model.get_parameter(name).detach()
            # A weight of zero brings nothing back, so that it is never grown.
            weight = weight.masked_fill(~room[name].to(weight.device), 0.0)
            return dsnot(weight, mask[name], moments, m=groups[1] if groups else None)

        return _again(work, moved)


@dataclass(frozen=True)
class Bias:
    """What removed weights gave on average goes into the bias of their layer (`recovery.bias`).

    All linear layers of the blocks have a bias then. Outputs of which no weight is left get
    nothing. Departs from FLAP in that the means are those behind the blocks before, pruned and
    mended, not those of the dense network, and that removed single weights count too.
    """

    name: ClassVar = "bias"
    told: ClassVar = "means of what was removed as biases"

    def run(self, work: Work) -> Mask:
        """Change the biases."""
        mask = work.masks[-1]

        def compensated(name: str, moments: Moments) -> Tensor:
            layer = work.model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(layer, nn.Linear), "the mask is of linear layers"
            is_left = mask[name].any(1, keepdim=True)
            prune_into_bias(layer, mask[name] | ~is_left, moments)
            return mask[name]

        return _again(work, compensated)


@dataclass(frozen=True)
class Perp:
    """Few parameters are trained so that blocks give what dense ones gave (`reconstruct`).

    Attributes:
        parts, steps, lr: as of `reconstruct`. More and larger steps than published.
    """

    parts: tuple[str, ...] = USUAL
    steps: int = 50
    lr: float = 3e-3

    name: ClassVar = "perp"
    told: ClassVar = "blocks reconstructed by PERP"

    def run(self, work: Work) -> Mask:
        """Train; the mask stays."""
        reconstruct(
            work.model, work.masks[-1], work.batches, dense=work.dense, parts=self.parts,
            steps=self.steps, lr=self.lr, seed=work.seed,
        )  # fmt: skip
        return work.masks[-1]


Stage = Units | Weights | Dsnot | Bias | Perp
ORDER = (Units, Weights, Dsnot, Bias, Perp)
RECOVERIES: dict[str, Callable[[], Stage]] = {one.name: one for one in (Dsnot, Bias, Perp)}


def check_stages(stages: Sequence[Stage]) -> None:
    """Raise MaskError or DensityError unless these stages can follow each other.

    Each comes once at most, in the order of ORDER, and units or weights are among them: masks
    change before values, and PERP, which trains biases too, comes last.
    """
    names = [stage.name for stage in stages]
    known = [one.name for one in ORDER]
    if names != [name for name in known if name in names]:
        raise MaskError(
            f"stages {', '.join(names)}: expected each once at most, in the order "
            f"{', '.join(known)}"
        )
    found = dict(zip(names, stages, strict=True))
    units, weights = found.get(Units.name), found.get(Weights.name)
    if units is None and weights is None:
        raise MaskError("nothing is pruned: ask for units or weights")
    if Dsnot.name in found and weights is None:
        raise MaskError("dsnot exchanges single weights, which these stages do not prune")
    if isinstance(units, Units) and isinstance(weights, Weights):
        if n_of_m(weights.within):
            if weights.density is not None:
                raise DensityError(
                    f"{weights.within!r} is of what the units leave: leave the density out"
                )
        elif set(units.kinds) == set(KINDS) and units.density <= weights.share:
            raise DensityError(
                f"units of density {units.density:g} leave no weight to remove down to "
                f"{weights.share:g}: ask for more units, or a lower density of weights"
            )


def _again(work: Work, change: Callable[[str, Moments], Tensor]) -> Mask:
    """Make the network dense, then go through its blocks: what `change` gives is their mask.

    `change` is given a weight's name and the moments of its layer's inputs, in the dense block
    behind blocks that are done.
    """
    work.model.load_state_dict(work.dense.state_dict())
    weights = block_weights(work.model)
    patterns = {}

    def layers(block: str) -> dict[str, list[str]]:
        return {INPUTS: [name.removesuffix(".weight") for name in weights[block]]}

    def cut(block: str, found: Calibration) -> None:
        own = {
            name: change(name, found.moments(INPUTS, name.removesuffix(".weight")))
            for name in weights[block]
        }
        Mask(own).apply(work.model)
        patterns.update(own)

    by_blocks(work.model, work.batches, layers, cut)
    return Mask(patterns)


def _check_known(name: str, known: Sequence[str], kind: str) -> None:
    if name not in known:
        raise MaskError(f"unknown {kind} {name!r}; known: {', '.join(known)}")


def _check_density(density: float) -> None:
    if not 0 < density <= 1:  # NaN fails both comparisons
        raise DensityError(f"density must be in (0, 1], got {density}")
