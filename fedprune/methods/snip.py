"""SNIP: a fixed mask of the weights whose removal moves the loss most.

Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, ICLR 2019: one
ranking of |w ∂L/∂w| over the whole network, on one mini-batch, here the server's labelled samples.

Departs from the paper: the start is the one that all methods here share, briefly pre-trained on
the same samples; `server.pretrain_epochs = 0` gives the paper's, at initialisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedprune.methods.base import Start
from fedprune.methods.fixed_mask import FixedMask, scored_by
from sparsemodel.runtime.pattern import Patterns


@dataclass(frozen=True)
class Snip(FixedMask):
    """A fixed mask by SNIP on the server's labelled samples.

    Attributes:
        density: share of the prunable weights that are kept.
        distribution: how many each layer keeps: "uniform", "erk", "erk-conv", "global" or
            "global-minimum".
    """

    name: ClassVar[str] = "snip"

    distribution: str = "global"

    def mask(self, server: Start) -> Patterns:
        return scored_by("snip", self, server)
