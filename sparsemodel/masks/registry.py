"""All criteria of weights by name, with what they are and what they need."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsemodel.calibration.collect import GRADIENTS, GRAM, INPUTS
from sparsemodel.errors import MaskError
from sparsemodel.masks import calibrated, criteria
from sparsemodel.masks.criteria import Criterion
from sparsemodel.taxonomy import ANY, BEFORE, N_OF_M, WEIGHTS, Traits

OF_DATA = ("input_shape", "loss")
"""Parameters by which a criterion says that it looks at data."""


@dataclass(frozen=True)
class WeightCriterion(Traits):
    """A criterion of single weights.

    Attributes:
        score: a function as those in `criteria` and `calibrated`.
        statistics: kinds that `calibrate` has to collect of the layers whose weights are scored.
        steps: in how many `prune` goes down to a density: density^(k/n) in step k of n.
    """

    score: Criterion
    statistics: tuple[str, ...] = ()
    steps: int = 1
    units: tuple[str, ...] = field(default=(WEIGHTS, N_OF_M), kw_only=True)

    @property
    def data(self) -> tuple[str, ...]:
        """What it looks at beside the weights."""
        asked = inspect.signature(self.score).parameters
        return (*(name for name in OF_DATA if name in asked), *self.statistics)


CRITERIA: dict[str, WeightCriterion] = {
    "magnitude": WeightCriterion(
        criteria.magnitude, criterion="size", source="Han et al., NeurIPS 2015"
    ),
    "random": WeightCriterion(criteria.random, criterion="chance", source="baseline", when=ANY),
    "snip": WeightCriterion(
        criteria.snip, criterion="loss, first order", source="Lee et al., ICLR 2019", when=BEFORE
    ),
    "taylor": WeightCriterion(
        criteria.taylor, criterion="loss, first order, squared",
        source="Molchanov et al., CVPR 2019",
    ),
    "grasp": WeightCriterion(
        criteria.grasp, criterion="gradient flow", source="Wang et al., ICLR 2020", when=BEFORE
    ),
    "synflow": WeightCriterion(
        criteria.synflow, criterion="synaptic flow",
        source="Tanaka et al., NeurIPS 2020", when=BEFORE, steps=100,
    ),
    "wanda": WeightCriterion(
        calibrated.wanda, criterion="size × input norm",
        source="Sun et al., ICLR 2024", statistics=(INPUTS,),
    ),
    "gblm": WeightCriterion(
        calibrated.gblm, criterion="size × norms of input, gradient",
        source="Das et al., 2023", statistics=(INPUTS, GRADIENTS),
    ),
    "obs": WeightCriterion(
        calibrated.obs, criterion="output, others compensating",
        source="Hassibi and Stork, NIPS 1992", statistics=(GRAM,),
    ),
    "taylor-mixed": WeightCriterion(
        calibrated.taylor_mixed, criterion="loss, second order",
        source="Ma et al., NeurIPS 2023", statistics=(GRADIENTS,),
    ),
    "dpruner": WeightCriterion(
        calibrated.dpruner, criterion="loss, second order, and obs",
        source="Zhang et al., NAACL 2024", statistics=(GRAM, GRADIENTS),
    ),
}  # fmt: skip

CALIBRATED = tuple(name for name, entry in CRITERIA.items() if entry.statistics)
"""Those of linear layers alone, with statistics."""


def criterion_of(given: str | Criterion | WeightCriterion) -> WeightCriterion:
    """A criterion by its name; of a function its entry, or one that needs no statistics.

    Raises:
        MaskError: an unknown name.
    """
    if isinstance(given, WeightCriterion):
        return given
    if not callable(given):
        if given not in CRITERIA:
            known = ", ".join(CRITERIA)
            raise MaskError(f"unknown criterion {given!r}; known: {known}; or give a function")
        return CRITERIA[given]
    own = WeightCriterion(given, criterion="your own", source="your own", when=ANY)
    return next((entry for entry in CRITERIA.values() if entry.score is given), own)


def needs_of(
    criterion: str | Criterion | WeightCriterion, names: Sequence[str]
) -> dict[str, list[str]]:
    """What `calibrate` has to collect for a criterion on those weights.

    Raises:
        MaskError: an unknown name.
        CalibrationError: statistics of what is no layer's weight.

    >>> needs_of("gblm", ["fc.weight"])
    {'inputs': ['fc'], 'gradients': ['fc']}
    """
    kinds = criterion_of(criterion).statistics
    return {kind: [calibrated.layer_of(name) for name in names] for kind in kinds}
