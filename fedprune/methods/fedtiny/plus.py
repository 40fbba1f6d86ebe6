"""FedTiny with options beyond the paper: what may make it less fragile, each by a setting.

Departs from Huang et al. (ICDCS 2023) wherever a setting says so; with every one of them at the
faithful value it is the method of the paper, bit for bit. The defaults are what the ablations in
simulations/LOG.md justify.

Clients begin each round with a new optimiser, so no weight's momentum lasts longer than a round:
a grown weight starts at zero beside others whose momentum is zero too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedprune.exchange.aggregate import EntryMean
from fedprune.exchange.messages import MODEL, Request
from fedprune.exchange.pooled import Pooled
from fedprune.local.training import GROWTH_BATCHES
from fedprune.methods.base import AskSome, RunState, Start, train_request
from fedprune.methods.fedtiny import FedTiny
from fedprune.methods.fedtiny.kinds import KINDS, pool_of_kinds
from fedprune.methods.fedtiny.merged import GROW, grow, growth_request, train_and_grow
from fedprune.methods.fedtiny.pool import Pool
from fedprune.methods.fedtiny.progressive import adjust, growth_counts
from fedprune.methods.fedtiny.trials import (
    FLOW,
    MOST_STEPS,
    STEPS,
    measure_flow,
    select_by_trial,
    try_steps,
)
from prunelab.runs.seeds import rng
from sparsemodel.runtime.outputs import largest_of_rows
from sparsemodel.runtime.positions import absent_at, find
from sparsemodel.runtime.state import Entries, SparseState, Tensors

AFTER, MERGED, FRESH, DRAWN = "after", "merged", "fresh", "drawn"
GROWTH_PLACES = (AFTER, MERGED, FRESH, DRAWN)
SEED_GROWTH = 15  # the first part of a derived seed says what it is for
BATCH_NORM = "batch-norm"
SELECTIONS = (BATCH_NORM, STEPS, FLOW)


@dataclass(frozen=True)
class FedTinyPlus(FedTiny):
    """FedTiny with options of growth, protection, candidates and selection beyond the paper.

    Attributes:
        growth_at: where clients measure gradients at pruned weights: "after" their local epochs,
            on one mini-batch (faithful); at the "merged" model that they receive, before them; or
            "fresh", at the merged model of the round's end, in a question of its own, whose answers
            the server must see one by one; or "drawn": nowhere, the server draws what grows, as
            in Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse
            Connectivity (2018). The mask moves at the round's end in any case.
        growth_batches: mini-batches of a merged model's gradients; 0: all training samples.
        keep_outputs: whether the largest active weight of each output is never pruned.
        protect: rounds for which a grown weight is not pruned again.
        adjust_from: rounds before the first adjustment; α's cosine begins there.
        candidates: kinds of the pool's candidates (kinds.py), separated by commas: "noise"
            (faithful) and "erk" are drawn and share what the others leave of `pool_size`; of
            "uniform", "erk-conv", "synflow", "snip", "gradual" and "narrow" there is one each.
        selection: how clients choose: by "batch-norm" (faithful), or after a few local "steps", or
            by gradient "flow" (trials.py).
        selection_steps: local steps, or mini-batches of the gradient, of each candidate.
    """

    name: ClassVar[str] = "fedtiny-plus"
    actions = {  # noqa: RUF012
        **FedTiny.actions,
        "train": train_and_grow,
        GROW: grow,
        STEPS: try_steps,
        FLOW: measure_flow,
    }

    pool_size: int = 2
    granularity: str = "entire"
    adjust_every: int = 1
    growth_at: str = DRAWN
    growth_batches: int = 1
    keep_outputs: bool = True
    protect: int = 0
    adjust_from: int = 0
    candidates: str = "synflow,erk"
    selection: str = STEPS
    selection_steps: int = 10

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        for key, known in (("growth_at", GROWTH_PLACES), ("selection", SELECTIONS)):
            if getattr(self, key) not in known:
                yield f"{key}: expected one of {', '.join(known)}; got {getattr(self, key)!r}"
        if len(set(self.kinds)) < len(self.kinds) or not set(self.kinds) <= set(KINDS):
            allowed = ", ".join(KINDS)
            yield f"candidates: expected some of {allowed}, once each; got {self.candidates!r}"
        if not 1 <= self.selection_steps <= MOST_STEPS:
            yield f"selection_steps: expected 1 to {MOST_STEPS}, got {self.selection_steps}"
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
        unused = {"growth_batches": self.growth_at in (AFTER, DRAWN)}
        unused["selection_steps"] = self.selection == BATCH_NORM
        return {**used, **{name: "not used" for name, silent in unused.items() if silent}}

    @property
    def kinds(self) -> list[str]:
        """The kinds of candidates, as they are listed."""
        return [kind.strip() for kind in self.candidates.split(",")]

    def start(self, server: Start) -> RunState:
        pool, kinds = pool_of_kinds(
            self.kinds, server, self.density, num_candidates=self.num_candidates,
            outputs=self.keep_outputs,
        )  # fmt: skip
        state = self.started(pool, server, kinds=kinds)
        more = {FRESH: {"clients": server.num_clients}, DRAWN: {"seed": server.seed}}
        return replace(state, memory={**state.memory, **more.get(self.growth_at, {})})

    def select(self, pool: Pool, server: Start) -> tuple[int, Tensors, dict[str, Any]]:
        if self.selection == BATCH_NORM:
            return super().select(pool, server)
        return select_by_trial(
            pool,
            server.pooled,
            selection=self.selection,
            steps=self.selection_steps,
            metric=server.metric,
        )

    @property
    def collects(self) -> bool:  # type: ignore[override]  # by a setting
        return self.growth_at == FRESH

    def request(self, state: RunState) -> Request:
        counts = self.growth_counts(state)
        more = {GROWTH_BATCHES: self.growth_batches} if counts and self.growth_at == MERGED else {}
        return train_request(state, fields=more, growth=counts)

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        after = super().update(state, pooled)
        return after if self.growth_at == FRESH else self._protected(after, before=pooled.model)

    def settle(self, state: RunState, ask: AskSome) -> RunState:
        if self.growth_at != FRESH:
            return state
        counts = self._planned(replace(state, round_index=state.round_index - 1))
        if not counts:
            return self._protected(state, before=state.model)
        request = growth_request(state.model, counts, batches=self.growth_batches)
        mean, clients = EntryMean(), []
        everybody = range(state.memory["clients"])
        for client, reply in ask(replace(request, round_index=state.round_index), among=everybody):
            mean.add(reply.entries.get(MODEL, {}), weight=reply.weight)
            clients.append(client)
        pooled = Pooled(
            sorted(clients), mean.total_weight, states={MODEL: state.model}, growth=mean.result()
        )  # fmt: skip
        memory = {**state.memory, "adjustments": state.memory["adjustments"] + 1}
        moved = replace(state, model=self.adjusted(state, pooled, counts), memory=memory)
        return self._protected(moved, before=state.model)

    def growth_counts(self, state: RunState) -> dict[str, int]:
        return {} if self.growth_at == DRAWN else self.due(state)

    def due(self, state: RunState) -> dict[str, int]:
        return {} if self.growth_at == FRESH else self._planned(state)

    def _planned(self, state: RunState) -> dict[str, int]:
        """How many weights of each layer move at the end of the coming round."""
        return growth_counts(
            state, every=self.adjust_every, rate=self.adjust_rate, after=self.adjust_from
        )

    def _protected(self, state: RunState, *, before: SparseState) -> RunState:
        """The state after a round, with what it remembers of the weights that were grown."""
        if not self.protect:
            return state
        grown = _grown(before, state.model)
        kept = [*state.memory.get("grown", []), *([[state.round_index, grown]] if grown else [])]
        kept = [[since, at] for since, at in kept if state.round_index - since < self.protect]
        return replace(state, memory={**state.memory, "grown": kept})

    def adjusted(self, state: RunState, pooled: Pooled, counts: dict[str, int]) -> SparseState:
        keep = {name: self._kept(name, state, pooled.model) for name in counts}
        growth = pooled.growth
        if self.growth_at == DRAWN:
            parts = (SEED_GROWTH, state.memory["seed"], state.round_index)
            growth = drawn_growth(pooled.model, counts, rng(*parts))
        return adjust(pooled.model, growth, counts, keep=keep)

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


def drawn_growth(
    model: SparseState, counts: Mapping[str, int], generator: np.random.Generator
) -> Entries:
    """So many pruned places of each layer, each as likely, with values in a random order.

    Args:
        counts: layer -> how many, no more than it has pruned weights.
    """
    drawn = {}
    for name, count in counts.items():
        pattern = model.pattern(name)
        assert pattern is not None, "growth is at pruned places"
        ranks = generator.choice(pattern.num_weights - pattern.num_active, count, replace=False)
        values = np.arange(1, count + 1, dtype=np.float32)
        drawn[name] = absent_at(pattern.positions(), ranks), values
    return drawn


def _grown(before: SparseState, after: SparseState) -> dict[str, list[int]]:
    """Layer -> flat positions of the weights that are active after an adjustment alone."""
    assert before.patterns is not None
    assert after.patterns is not None
    return {
        name: np.setdiff1d(after.patterns[name].positions(), pattern.positions()).tolist()
        for name, pattern in before.patterns.items()
        if after.patterns[name] != pattern
    }
