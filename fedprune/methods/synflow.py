"""SynFlow: a fixed mask that keeps the flow through the network, chosen without data.

Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow,
NeurIPS 2020, algorithm 1: in 100 steps, after step k the density d^(k/100) of the whole network,
by |w| ∂R/∂|w|, where R is the sum of the outputs for an input of ones and absolute weights.

Departs from the paper: the start is the one that all methods here share, briefly pre-trained on
the server's samples; `server.pretrain_epochs = 0` gives the paper's, at initialisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedprune.methods.base import Start
from fedprune.methods.fixed_mask import FixedMask, scored_by
from sparsemodel.runtime.pattern import Patterns


@dataclass(frozen=True)
class SynFlow(FixedMask):
    """A fixed mask by SynFlow, which looks at no data.

    Attributes:
        density: share of the prunable weights that are kept.
        distribution: how many each layer keeps: "uniform", "erk", "erk-conv", "global" or
            "global-minimum".
    """

    name: ClassVar[str] = "synflow"

    distribution: str = "global"

    def mask(self, server: Start) -> Patterns:
        return scored_by("synflow", self, server)
