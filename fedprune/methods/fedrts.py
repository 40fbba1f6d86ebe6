"""FedRTS: the server draws the mask from what it believes of every weight (Thompson sampling).

Huang et al., FedRTS: Federated Robust Pruning via Combinatorial Thompson Sampling, NeurIPS 2025.
Every weight of a layer has a belief Beta(a, b), a = b = 1 at first, that it is one of the layer's
K. Of these an adjustment may exchange k, κ = K − k. After each round an active weight has

    X = (1 − γ) 1[i ∈ Top-κ |w̄|] + γ Σ p_k 1[i ∈ Top-κ |w_k|],

and in adjustment rounds, of which clients send the places of their k largest gradients, a pruned
one X = (1 − γ)/2 + γ Σ p_k 1[i ∈ Top-k |g_k|]; then a += λ X and b += λ (1 − X). An adjustment
draws θ ~ Beta(a, b) for every weight and keeps the K of largest θ in each layer.

Weights that were never active nor named by a client share one belief, which follows from the number
of adjustments, so that the server keeps a and b of the others alone. Beliefs of the active weights
are kept up until the last adjustment.

Departs from the paper: the start is the one that all methods here share, under its magnitude mask.
Grown weights start at zero; in the authors' code they hold what optimisers left at masked weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedprune.errors import ClientError
from fedprune.exchange.aggregate import EntryMean, StateMean, WeightedMean
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.exchange.pooled import Pooled
from fedprune.local.training import train
from fedprune.methods.adjusting import AdjustedMagnitude
from fedprune.methods.base import Collector, RunState, Start, train_request
from prunelab.runs.seeds import rng
from sparsemodel.runtime.adjust import carry, largest
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.positions import find
from sparsemodel.runtime.state import Array, LayerEntries, SparseState

if TYPE_CHECKING:
    from fedprune.local.site import Local

NAMED = "named"  # pruned weights that a client would grow
A, B = "a", "b"  # of the Beta distributions
SEED_BELIEF = 6  # the first part of a derived seed says what it is for


# --- client half -------------------------------------------------------------------------------


def train_and_name(request: Request, local: Local) -> Reply:
    """Local training; of the largest gradients at pruned weights the places alone."""
    reply = train(request, local)
    if not (entries := reply.entries.get(MODEL)):
        return reply
    shapes = request.state(MODEL).shapes()
    named = {name: Pattern.from_positions(shapes[name], at) for name, (at, _) in entries.items()}
    return replace(reply, entries={}, masks={NAMED: Patterns(named)})


# --- server half -------------------------------------------------------------------------------


class Votes:
    """The mean model, and which weights clients would keep and grow.

    Args:
        patterns: that clients trained under.
        cores: κ of each layer.
    """

    def __init__(self, patterns: Patterns, cores: Mapping[str, int]) -> None:
        self._patterns, self._cores = patterns, cores
        self._mean, self._kept, self._named = StateMean(), WeightedMean(), EntryMean()
        self._clients: list[int] = []

    def add(self, client: int, reply: Reply) -> None:
        """As `Collector.add`."""
        named: dict[str, LayerEntries] = {}
        for name, pattern in reply.masks.get(NAMED, {}).items():
            at = pattern.positions()
            if find(self._patterns[name].positions(), at)[1].any():
                raise ClientError(f"{name!r}: weights are named for growth that are active")
            named[name] = (at, np.ones(len(at), np.float32))
        model = reply.states[MODEL]
        self._mean.add(model, weight=reply.weight)
        self._kept.add(cores_of(model, self._cores), weight=reply.weight)
        self._named.add(named, weight=reply.weight)
        self._clients.append(client)

    def result(self) -> Pooled:
        """As `Collector.result`; "kept" are shares of clients, by layer, and growth too."""
        kept = SparseState(self._kept.result(), self._patterns)
        states = {MODEL: self._mean.result(), "kept": kept}
        weight = self._kept.total_weight
        return Pooled(sorted(self._clients), weight, states=states, growth=self._named.result())


def cores_of(model: SparseState, cores: Mapping[str, int]) -> dict[str, Array]:
    """1 at the largest weights of each layer, as many as its core has, 0 at the other active ones.

    >>> patterns = Patterns({"w": Pattern.from_positions((5,), np.array([0, 2, 3]))})
    >>> cores_of(SparseState({"w": np.float32([3, -1, 2])}, patterns), {"w": 2})
    {'w': array([1., 0., 1.], dtype=float32)}
    """
    magnitudes = {name: np.abs(model.values[name]) for name in cores}
    return {n: largest(magnitudes[n], core).astype(np.float32) for n, core in cores.items()}


@dataclass(frozen=True)
class Belief:
    """Beta(a, b) of each weight of a layer: of some their own, of all others the same.

    Attributes:
        at: flat positions of those with their own, ascending.
        a, b: theirs, float32.
        rest: a and b of all others.
    """

    at: NDArray[np.int64]
    a: Array
    b: Array
    rest: tuple[float, float]

    def knowing(self, positions: NDArray[np.int64]) -> Belief:
        """The same where some more weights have their own."""
        new = np.setdiff1d(positions, self.at)
        places = np.searchsorted(self.at, new)
        a, b = (np.insert(v, places, v0) for v, v0 in zip((self.a, self.b), self.rest, strict=True))
        return Belief(np.insert(self.at, places, new), a, b, self.rest)

    def seen(self, positions: NDArray[np.int64], outcome: Array, *, weight: float) -> Belief:
        """After outcomes X of some weights that have their own: a += λ X, b += λ (1 − X)."""
        a, b, places = self.a.copy(), self.b.copy(), np.searchsorted(self.at, positions)
        a[places] += np.float32(weight) * outcome
        b[places] += np.float32(weight) * (1 - outcome)
        return replace(self, a=a, b=b)

    def draw(self, size: int, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """The `count` of largest θ ~ Beta(a, b) among a layer's `size` weights, ascending."""
        a, b = (np.full(size, value) for value in self.rest)
        a[self.at], b[self.at] = self.a, self.b
        return np.flatnonzero(largest(generator.beta(a, b), count))


@dataclass(frozen=True)
class FedRTS(AdjustedMagnitude):
    """The server draws the mask from beliefs that clients' weights and gradients shape.

    Attributes:
        individual: γ, what single clients count for against the mean model, in [0, 1].
        belief_weight: λ, what an outcome adds to a belief, above 0.
    """

    name: ClassVar[str] = "fedrts"
    actions = {"train": train_and_name}  # noqa: RUF012
    collects: ClassVar[bool] = True

    individual: float = 0.5
    belief_weight: float = 10.0

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if not 0 <= self.individual <= 1:
            yield f"individual: expected 0 to 1, got {self.individual}"
        if not 0 < self.belief_weight < float("inf"):
            yield f"belief_weight: expected a number above 0, got {self.belief_weight}"

    def start(self, server: Start) -> RunState:
        state = super().start(server)
        memory = {**state.memory, "adjustments": 0, "seed": server.seed}
        return replace(state, memory=memory, kept=_as_states(state.model, {}))

    def request(self, state: RunState) -> Request:
        if not (counts := self.asked_counts(state)):
            return train_request(state)
        asked = train_request(state, growth=counts)
        expected = replace(asked.expected, growth={}, masks={NAMED: counts})
        return replace(asked, expected=expected)

    def collector(self, state: RunState) -> Collector | None:
        if self._is_over(state):
            return None
        assert state.model.patterns is not None
        return Votes(state.model.patterns, self._cores(state))

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        after = super().update(state, pooled)
        if self._is_over(state):
            return replace(after, kept={})
        patterns, adjusts = state.model.patterns, self.adjusts(state)
        assert patterns is not None
        global_cores = cores_of(pooled.model, self._cores(state))
        beliefs, changed = {}, {}
        for place, (name, pattern) in enumerate(patterns.items()):
            votes = pooled.states["kept"].values[name]
            outcome = (1 - self.individual) * global_cores[name] + self.individual * votes
            belief = self._belief(state, name).seen(
                pattern.positions(), outcome.astype(np.float32), weight=self.belief_weight
            )
            if adjusts:
                belief = self._seen_pruned(state, belief, pattern, pooled.growth.get(name))
                parts = (SEED_BELIEF, state.memory["seed"], state.round_index, place)
                drawn = belief.draw(pattern.num_weights, pattern.num_active, rng(*parts))
                changed[name] = Pattern.from_positions(pattern.shape, drawn)
                belief = belief.knowing(drawn)
            beliefs[name] = belief
        model = carry(after.model, patterns.replace(changed))
        memory = {**after.memory, "adjustments": state.memory["adjustments"] + adjusts}
        return replace(after, model=model, memory=memory, kept=_as_states(model, beliefs))

    def _is_over(self, state: RunState) -> bool:
        """Whether no adjustment comes any more."""
        next_one = (state.round_index // self.adjust_every + 1) * self.adjust_every
        return next_one >= int(state.memory["until"])

    def _cores(self, state: RunState) -> dict[str, int]:
        assert state.model.patterns is not None
        exchanged = self.exchange_counts(state)
        return {n: c - exchanged.get(n, 0) for n, c in state.model.patterns.counts().items()}

    def _belief(self, state: RunState, name: str) -> Belief:
        """What is believed of a layer before the coming round."""
        a, b = state.kept[A], state.kept[B]
        assert a.patterns is not None
        rest = self._rest(state.memory["adjustments"])
        return Belief(a.patterns[name].positions(), a.values[name], b.values[name], rest)

    def _rest(self, adjustments: int) -> tuple[float, float]:
        """a and b of weights of which nothing but so many adjustments has been seen."""
        neither = (1 - self.individual) / 2
        seen = self.belief_weight * adjustments
        return 1 + seen * neither, 1 + seen * (1 - neither)

    def _seen_pruned(
        self, state: RunState, belief: Belief, pattern: Pattern, named: LayerEntries | None
    ) -> Belief:
        """After an adjustment round's outcomes of pruned weights."""
        at, votes = (np.empty(0, np.int64), np.empty(0, np.float32)) if named is None else named
        belief = belief.knowing(at)
        pruned = belief.at[~find(pattern.positions(), belief.at)[1]]
        outcome = np.full(len(pruned), (1 - self.individual) / 2, np.float32)
        outcome[np.searchsorted(pruned, at)] += np.float32(self.individual) * votes
        belief = belief.seen(pruned, outcome, weight=self.belief_weight)
        return replace(belief, rest=self._rest(state.memory["adjustments"] + 1))


def _as_states(model: SparseState, beliefs: Mapping[str, Belief]) -> dict[str, SparseState]:
    """Beliefs as the run keeps them; of layers without one, those of weights that are active."""
    assert model.patterns is not None
    found = {}
    for name, pattern in model.patterns.items():
        ones = np.ones(pattern.num_active, np.float32)
        found[name] = beliefs.get(name) or Belief(pattern.positions(), ones, ones, (1.0, 1.0))
    shapes = model.patterns.shapes()
    known = Patterns({n: Pattern.from_positions(shapes[n], own.at) for n, own in found.items()})
    return {
        A: SparseState({name: own.a for name, own in found.items()}, known),
        B: SparseState({name: own.b for name, own in found.items()}, known),
    }
