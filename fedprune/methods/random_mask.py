"""A random fixed mask: what every choice of a mask has to beat.

The weights at the mask are those of the start, as with every method. One ranking of random scores
over the whole network would be "uniform" with noise, and is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedprune.methods.base import Start
from fedprune.methods.fixed_mask import BY_SHAPES, FixedMask, largest
from prunelab.runs.seeds import rng
from sparsemodel.runtime.pattern import Patterns

SEED_MASK = 6  # the first part of a derived seed says what it is for


@dataclass(frozen=True)
class RandomMask(FixedMask):
    """A fixed mask of weights drawn by the seed.

    Attributes:
        density: share of the prunable weights that are kept.
        distribution: how many each layer keeps: "uniform", "erk" or "erk-conv".
    """

    name: ClassVar[str] = "random"
    distributions = BY_SHAPES

    def mask(self, server: Start) -> Patterns:
        noise = rng(SEED_MASK, server.seed)
        scores = {name: noise.random(shape) for name, shape in server.prunable.items()}
        return largest(scores, self.density, self.distribution)
