"""What `fedprune prune` is asked for, and the stages that it means."""

from __future__ import annotations

from dataclasses import dataclass, fields

from prunelab.errors import RunError
from sparsemodel.errors import MaskError
from sparsemodel.masks.distribution import n_of_m
from sparsemodel.pipeline.chosen_units import FLAP, KINDS
from sparsemodel.pipeline.stages import CONTROLS, RECOVERIES, Stage, Units, Weights, check_stages

BOTH = "both"


@dataclass(frozen=True)
class Pruning:
    """What is asked for.

    Attributes:
        model: a folder, a .gguf file, or a name on the hub.
        data: a text for calibration; its last tenth is the test text where there is no `test`.
        criterion: of weights, one of sparsemodel.pipeline.stages.CHOICES.
        pattern: where weights are ranked against each other: "row", "layer", or such as "2:4".
        density: kept share of all weights of the blocks' linear layers, at the end of all stages;
            None: that of the pattern, or .5; with `units` and no such pattern, what they leave.
        samples: sequences for calibration, drawn by the seed.
        length: tokens of a sequence; 0: as many as the model takes, 512 at most.
        tested: sequences for testing, at most.
        controls: whether random and magnitude masks are measured too.
        units: kept share of heads and channels, before weights are ranked; None: all.
        unit_criterion: one of sparsemodel.pipeline.chosen_units.UNIT_CHOICES.
        unit_kind: "heads", "channels" or "both".
        recover: some of "dsnot", "bias" and "perp", in this order.
    """

    model: str
    data: str
    test: str = ""
    criterion: str = "wanda"
    pattern: str = "row"
    density: float | None = None
    samples: int = 128
    length: int = 0
    tested: int = 64
    seed: int = 0
    controls: bool = True
    units: float | None = None
    unit_criterion: str = FLAP
    unit_kind: str = BOTH
    recover: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_stages(self.stages())
        for name in ("samples", "tested"):
            if getattr(self, name) < 1:
                raise RunError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.units is None:
            self._refuse_changed("unit_criterion", "unit_kind", cure="give units, a share, too")
        elif not self.ranks_weights:
            self._refuse_changed("criterion", "pattern", cure="give a density of weights, too")

    @property
    def ranks_weights(self) -> bool:
        """Whether single weights are pruned."""
        return self.units is None or self.density is not None or n_of_m(self.pattern) is not None

    @property
    def target(self) -> float | None:
        """The density asked for; None: groups of what units leave, which is counted at the end."""
        if self.units is None:
            return Weights(self.density, within=self.pattern).share
        return self.density if self.ranks_weights else self.units

    @property
    def way(self) -> str:
        """What chooses what stays, by name."""
        names = [f"{self.unit_criterion} units"] if self.units is not None else []
        return ", ".join([*names, *([self.criterion] if self.ranks_weights else [])])

    def choices(self, control: str = "") -> list[Stage]:
        """The stages that choose what stays; of a control those that choose by it."""
        found: list[Stage] = []
        if self.units is not None:
            kinds = KINDS if self.unit_kind == BOTH else (self.unit_kind,)
            found.append(Units(self.units, control or self.unit_criterion, kinds))
        if self.ranks_weights:
            found.append(Weights(self.density, control or self.criterion, self.pattern))
        return found

    def others(self) -> list[str]:
        """Controls that are measured beside it."""
        names = CONTROLS if self.controls else ()
        return [name for name in names if self.choices(name) != self.choices()]

    def stages(self) -> list[Stage]:
        """All stages.

        Raises:
            MaskError, DensityError: what is asked for cannot be.
        """
        for name in self.recover:
            if name not in RECOVERIES:
                raise MaskError(f"unknown recovery {name!r}; known: {', '.join(RECOVERIES)}")
        return [*self.choices(), *(RECOVERIES[name]() for name in self.recover)]

    def _refuse_changed(self, *names: str, cure: str) -> None:
        usual = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != usual[name]:
                raise MaskError(f"{name} {getattr(self, name)!r} changes nothing here: {cure}")
