"""One-shot magnitude pruning on the server, then training at that fixed mask.

The rival that costs nothing: magnitude pruning of the pre-trained dense model, by default the
same density in every layer (Han et al., NeurIPS 2015, without the iterations), then sparse
federated averaging.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedprune.methods.base import Start
from fedprune.methods.fixed_mask import FixedMask, largest
from sparsemodel.runtime.pattern import Patterns


@dataclass(frozen=True)
class Magnitude(FixedMask):
    """A fixed mask of the largest weights, chosen once by the server.

    Attributes:
        density: share of the prunable weights that are kept.
        distribution: how many each layer keeps: "uniform", "erk", "erk-conv", "global" or
            "global-minimum".
    """

    name: ClassVar[str] = "magnitude"

    def mask(self, server: Start) -> Patterns:
        values = server.state().values
        scores = {name: np.abs(values[name]) for name in server.prunable}
        return largest(scores, self.density, self.distribution)
