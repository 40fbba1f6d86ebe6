"""One-shot magnitude pruning on the server, then training at that fixed mask.

The rival that costs nothing: layer-wise magnitude pruning of the pre-trained dense model, the
same density in every layer (Han et al., NeurIPS 2015, without the iterations), then sparse
federated averaging.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fedprune.methods.base import Ask, Method, RunState
from prunelab.networks import float_state
from sparsemodel.masks.criteria import magnitude
from sparsemodel.masks.distribution import uniform
from sparsemodel.masks.mask import mask_from_scores, prunable_parameters


class Magnitude(Method):
    """Server one-shot magnitude pruning with a fixed mask."""

    uses_density = True

    def initialise(self, model: nn.Module, state: RunState, ask: Ask) -> RunState:
        names = prunable_parameters(model)
        counts = uniform(
            {name: tuple(p.shape) for name, p in names.items()}, self.config.pruning.density
        )
        mask = mask_from_scores(magnitude(model, list(names)), counts)
        mask.apply(model)
        return replace(state, weights=float_state(model), mask=mask)
