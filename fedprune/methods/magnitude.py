"""One-shot magnitude pruning on the server, then training at that fixed mask.

The rival that costs nothing: layer-wise magnitude pruning of the pre-trained dense model, the
same density in every layer (Han et al., NeurIPS 2015, without the iterations), then sparse
federated averaging.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedprune.methods.base import Method, RunState, Start
from sparsemodel.masks.distribution import uniform
from sparsemodel.runtime.adjust import prune_to_largest


@dataclass(frozen=True)
class Magnitude(Method):
    """A fixed mask of the largest weights, chosen once by the server.

    Attributes:
        density: share of the weights of every prunable layer that are kept.
    """

    name: ClassVar[str] = "magnitude"

    density: float = 0.05

    def start(self, server: Start) -> RunState:
        counts = uniform(server.prunable, self.density)
        return RunState(round_index=0, model=prune_to_largest(server.state(), counts))
