"""FedTiny: tiny models from a coarse mask chosen by the clients and refined by their gradients.

Huang et al., Distributed Pruning Towards Tiny Neural Networks in Federated Learning,
ICDCS 2023. Three parts, one file each: the candidate pool (pool.py), adaptive batch-norm
selection (bn_selection.py) and progressive pruning (progressive.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from torch import nn

from fedprune.exchange.messages import Entries, Pool, State
from fedprune.methods.base import Ask, Method, RunState
from fedprune.methods.fedtiny.bn_selection import select_candidate
from fedprune.methods.fedtiny.pool import candidate_pool
from fedprune.methods.fedtiny.progressive import adjust, growth_counts
from prunelab.networks import float_state, load_float_state_, parameter_blocks


class FedTiny(Method):
    """The complete method; the two ablations switch one part off."""

    uses_density = True
    adaptive_selection = True
    progressive_pruning = True

    @cached_property
    def blocks(self) -> list[list[str]]:
        """Prunable parameters of each block, from the input to the output."""
        return parameter_blocks(self.build_model(), granularity=self.config.pruning.granularity)

    def initialise(self, model: nn.Module, state: RunState, ask: Ask) -> RunState:
        pool = Pool(
            weights=state.weights,
            masks=candidate_pool(model, self.config.pruning, seed=self.config.seed),
        )
        winner, statistics, account = select_candidate(
            model, pool, ask, adaptive=self.adaptive_selection
        )
        load_float_state_(model, {**state.weights, **statistics})
        pool.masks[winner].apply(model)
        return replace(
            state,
            weights=float_state(model),
            mask=pool.masks[winner],
            notes={**state.notes, "selection": account},
        )

    def growth_counts(self, state: RunState) -> dict[str, int]:
        if not self.progressive_pruning:
            return {}
        return growth_counts(state, self.blocks, self.config)

    def update(self, state: RunState, *, mean: State, growth: Entries) -> RunState:
        counts = self.growth_counts(state)
        if not counts:
            return super().update(state, mean=mean, growth=growth)
        return adjust(state, mean, growth, counts)


class FedTinyVanillaSelection(FedTiny):
    """Ablation: candidates are compared without adapting their batch-norm statistics."""

    adaptive_selection = False


class FedTinyFixedMask(FedTiny):
    """Ablation: the selected mask stays as it is; no progressive pruning."""

    progressive_pruning = False
