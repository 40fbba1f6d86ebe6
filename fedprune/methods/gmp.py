"""Gradual magnitude pruning over the rounds of a federation, and GraNet.

Zhu and Gupta, To prune, or not to prune, 2017: the density falls along a cubic (equation 1) from 1
after round `prune_from` to `density` after round `prune_until`. At each change the server ranks the
merged weights by size, and the smallest go; what is pruned stays pruned. Clients train at the mask
that there is, so that rounds and messages become smaller with it; before the first change they are
those of dense federated averaging.

Liu et al., Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, NeurIPS 2021,
GraNet: after each change a share of every layer's weights, the smallest, is exchanged for pruned
weights of largest gradient, which start at zero. The share falls along half a cosine from
`regenerate` to `regenerate_last`. Clients send the largest of their gradients at pruned weights
and no other, and the server means them.

Departs from both: a step is a round, and what is ranked is the clients' mean. From GraNet: the
gradients are those at weights which were pruned while the clients trained, so that nothing grows in
the first change, and nothing that has just gone; a layer exchanges no more weights than have
gradients. The schedule, its numbers of weights and its share are those of
`sparsemodel.loops.gradual`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fedprune.exchange.messages import Request
from fedprune.exchange.pooled import Pooled
from fedprune.methods.base import Method, RunState, Start, train_request
from prunelab.errors import RunError
from sparsemodel.masks.distribution import global_ranking, uniform
from sparsemodel.masks.schedule import GradualPlan, adjustment_counts
from sparsemodel.runtime.adjust import prune_and_grow, prune_to_largest, select_largest
from sparsemodel.runtime.state import SparseState


@dataclass(frozen=True)
class GMP(Method):
    """A mask that shrinks along a cubic while clients train: the smallest merged weights go.

    Attributes:
        density: share of prunable weights that are kept from round `prune_until` on.
        prune_from: the last round after which all weights are kept.
        prune_until: the round after which the mask changes for the last time; 0: 75 % of the
            rounds.
        prune_every: rounds between changes.
        within: where weights are ranked against each other: in each "layer", which all have the
            schedule's density, or over "all" layers, which have it together.
    """

    name: ClassVar[str] = "gmp"

    density: float = 0.05
    prune_from: int = 0
    prune_until: int = 0
    prune_every: int = 1
    within: str = "layer"

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        for key in ("prune_from", "prune_until"):
            if getattr(self, key) < 0:
                yield f"{key}: expected 0 or more, got {getattr(self, key)}"
        if self.prune_until and self.prune_until <= self.prune_from:
            yield (
                f"prune_until: expected 0, or more than prune_from = {self.prune_from}, got "
                f"{self.prune_until}"
            )
        if self.prune_every < 1:
            yield f"prune_every: expected at least 1, got {self.prune_every}"
        if self.within not in {"layer", "all"}:
            yield f"within: expected 'layer' or 'all', got {self.within!r}"

    def last_change(self, rounds: int) -> int:
        """The round of the last change in a run of so many."""
        return self.prune_until or max(1, round(0.75 * rounds))

    def used(self, rounds: int) -> dict[str, Any]:
        return {**self.settings(), "prune_until": self.last_change(rounds)}

    def start(self, server: Start) -> RunState:
        until = self.last_change(server.rounds)
        if not self.prune_from < until <= server.rounds:
            raise RunError(
                f"{self.name}: the mask would change from round {self.prune_from} to {until} of "
                f"{server.rounds}; set method.prune_from and method.prune_until so that "
                "prune_from < prune_until <= training.rounds"
            )
        uniform(server.prunable, self.density)  # a density too low is told now
        return RunState(0, server.state(), {"until": until, "layers": list(server.prunable)})

    def plan(self, state: RunState) -> GradualPlan:
        """The schedule of a run; its steps are rounds."""
        until = int(state.memory["until"])
        return GradualPlan(self.density, self.prune_from, until, self.prune_every, self.within)

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        after = super().update(state, pooled)
        plan = self.plan(state)
        if not plan.changes_after(after.round_index):
            return after
        density = plan.density_after(after.round_index)
        model = shrunk(after.model, state.memory["layers"], density, within=self.within)
        return replace(after, model=model)


def shrunk(
    model: SparseState, layers: Iterable[str], density: float, *, within: str
) -> SparseState:
    """The model with its smallest weights pruned until it has a density.

    Args:
        layers: that are pruned; a dense model of which nothing goes stays dense.
        within: "layer" or "all", where weights are ranked against each other.

    >>> model = SparseState({"a": np.float32([3, -1, 2]), "b": np.float32([4, 9, 5])})
    >>> for within in ("layer", "all"):
    ...     pruned = shrunk(model, ["a", "b"], 0.6, within=within)
    ...     print({name: values.tolist() for name, values in pruned.values.items()})
    {'a': [3.0, 2.0], 'b': [9.0, 5.0]}
    {'a': [3.0], 'b': [4.0, 9.0, 5.0]}
    """
    shapes, sizes = model.shapes(), {name: np.abs(model.values[name]) for name in layers}
    capacities = {name: int(np.prod(shapes[name])) for name in sizes}
    if within == "all":
        num_kept = round(density * sum(capacities.values()))
        counts = global_ranking(sizes, num_kept / sum(size.size for size in sizes.values()))
    else:
        counts = {name: max(1, round(density * size)) for name, size in capacities.items()}
    if model.patterns is not None:
        return select_largest(model, counts)
    return model if counts == capacities else prune_to_largest(model, counts)


@dataclass(frozen=True)
class GraNet(GMP):
    """A mask that shrinks along a cubic, and then exchanges weights by the clients' gradients.

    Attributes:
        within: as of `gmp`.
        regenerate: share of a layer's weights that a change after round `prune_from` would
            exchange; 0 with `regenerate_last` = 0: none.
        regenerate_last: the same of the last change.
    """

    name: ClassVar[str] = "granet"

    within: str = "all"
    regenerate: float = 0.5
    regenerate_last: float = 0.005

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        for key in ("regenerate", "regenerate_last"):
            if not 0 <= getattr(self, key) <= 1:
                yield f"{key}: expected 0 to 1, got {getattr(self, key)}"

    def unaccounted(self) -> Iterable[str]:
        yield from super().unaccounted()
        yield (
            f"{self.name} moves its mask by clients' gradients, and privacy.dp covers training "
            "alone; use a method whose mask does not, such as magnitude"
        )

    def plan(self, state: RunState) -> GradualPlan:
        return replace(super().plan(state), regeneration=(self.regenerate, self.regenerate_last))

    def request(self, state: RunState) -> Request:
        if not self.plan(state).changes_after(state.round_index + 1):
            return train_request(state)
        # The mask has shrunk before it exchanges: no layer exchanges more than this.
        return train_request(state, growth=self.exchange_counts(state, state.model))

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        after = super().update(state, pooled)
        if not pooled.growth:
            return after
        counts = self.exchange_counts(state, after.model)
        growth = {name: entries for name, entries in pooled.growth.items() if name in counts}
        return replace(after, model=prune_and_grow(after.model, growth, counts))

    def exchange_counts(self, state: RunState, model: SparseState) -> dict[str, int]:
        """How many weights of each layer of a model the change after the coming round exchanges.

        Layers of which none may move are left out.
        """
        if model.patterns is None:
            return {}
        counts = adjustment_counts(
            model.patterns.counts(),
            {name: pattern.num_weights for name, pattern in model.patterns.items()},
            rate=self.plan(state).share_after(state.round_index + 1),
        )
        return {name: count for name, count in counts.items() if count}
