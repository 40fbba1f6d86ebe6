"""FedTiny with options beyond the paper: what may make it less fragile, each by a setting.

Departs from Huang et al. (ICDCS 2023) wherever a setting says so; with every one of them at the
faithful value it is the method of the paper, bit for bit.

Clients begin each round with a new optimiser, so no weight's momentum lasts longer than a round:
a grown weight starts at zero beside others whose momentum is zero too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedprune.exchange.messages import Request
from fedprune.exchange.pooled import Pooled
from fedprune.local.training import GROWTH_BATCHES
from fedprune.methods.base import RunState, train_request
from fedprune.methods.fedtiny import FedTiny
from fedprune.methods.fedtiny.merged import train_and_grow
from fedprune.methods.fedtiny.progressive import adjust, growth_counts
from sparsemodel.runtime.adjust import largest_of_rows
from sparsemodel.runtime.positions import find
from sparsemodel.runtime.state import SparseState

AFTER, MERGED = "after", "merged"
GROWTH_PLACES = (AFTER, MERGED)


@dataclass(frozen=True)
class FedTinyPlus(FedTiny):
    """FedTiny with options of growth, protection, candidates and selection beyond the paper.

    Attributes:
        growth_at: where clients measure gradients at pruned weights: "after" their local epochs,
            on one mini-batch (faithful), or at the "merged" model that they receive, before them.
            The mask moves after that round's aggregation either way.
        growth_batches: mini-batches of the merged model's gradients; 0: all training samples.
        keep_outputs: whether the largest active weight of each output is never pruned.
        protect: rounds for which a grown weight is not pruned again.
        adjust_from: rounds before the first adjustment; α's cosine begins there.
    """

    name: ClassVar[str] = "fedtiny-plus"
    actions = {**FedTiny.actions, "train": train_and_grow}  # noqa: RUF012

    growth_at: str = AFTER
    growth_batches: int = 0
    keep_outputs: bool = False
    protect: int = 0
    adjust_from: int = 0

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if self.growth_at not in GROWTH_PLACES:
            allowed = ", ".join(GROWTH_PLACES)
            yield f"growth_at: expected one of {allowed}; got {self.growth_at!r}"
        for key in ("growth_batches", "protect", "adjust_from"):
            if getattr(self, key) < 0:
                yield f"{key}: expected 0 or more, got {getattr(self, key)}"
        if 0 < self.adjust_until <= self.adjust_from:
            yield (
                f"adjust_from: expected less than adjust_until ({self.adjust_until}), "
                f"got {self.adjust_from}"
            )

    def used(self, rounds: int) -> dict[str, Any]:
        used = super().used(rounds)
        return used if self.growth_at == MERGED else {**used, "growth_batches": "not used"}

    def request(self, state: RunState) -> Request:
        counts = self.growth_counts(state)
        more = {GROWTH_BATCHES: self.growth_batches} if counts and self.growth_at == MERGED else {}
        return train_request(state, fields=more, growth=counts)

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        after = super().update(state, pooled)
        if not self.protect:
            return after
        grown = _grown(pooled.model, after.model)
        kept = [*state.memory.get("grown", []), *([[after.round_index, grown]] if grown else [])]
        kept = [[since, at] for since, at in kept if after.round_index - since < self.protect]
        return replace(after, memory={**after.memory, "grown": kept})

    def growth_counts(self, state: RunState) -> dict[str, int]:
        return growth_counts(
            state, every=self.adjust_every, rate=self.adjust_rate, after=self.adjust_from
        )

    def adjusted(self, state: RunState, pooled: Pooled, counts: dict[str, int]) -> SparseState:
        keep = {name: self._kept(name, state, pooled.model) for name in counts}
        return adjust(pooled.model, pooled.growth, counts, keep=keep)

    def _kept(self, name: str, state: RunState, model: SparseState) -> NDArray[np.bool_]:
        """Which active weights of a layer the coming adjustment must leave."""
        pattern = model.pattern(name)
        assert pattern is not None, "an adjustment is of pruned layers"
        kept = np.zeros(pattern.num_active, dtype=bool)
        if self.keep_outputs:
            kept |= largest_of_rows(pattern, model.values[name])
        for _, grown in state.memory.get("grown", []):
            places, there = find(pattern.positions(), np.array(grown.get(name, []), np.int64))
            kept[places[there]] = True
        return kept


def _grown(before: SparseState, after: SparseState) -> dict[str, list[int]]:
    """Layer -> flat positions of the weights that are active after an adjustment alone."""
    assert before.patterns is not None
    assert after.patterns is not None
    return {
        name: np.setdiff1d(after.patterns[name].positions(), pattern.positions()).tolist()
        for name, pattern in before.patterns.items()
        if after.patterns[name] != pattern
    }
