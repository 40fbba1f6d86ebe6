"""LotteryFL: every client looks for a winning ticket of its own, and they meet where these overlap.

Li et al., LotteryFL: Empower Edge Intelligence with Personalized and Communication-Efficient
Federated Learning, SEC 2021, and its authors' code. A client is sent the global model at its own
mask. Where that tells more than `threshold` of its development samples right, and the mask keeps
more than `density`, it prunes the share `prune_rate` of each layer's weights, the smallest, and
rewinds the rest to the start of the run; then it trains. The server means every weight over the
clients that have it; one that nobody has keeps its value.

The global model stays dense: it is what tickets are cut from. A run's own tests are of it, and say
little; with `federation.evaluate` = "clients" each client tests its ticket on samples of its own,
which is what the paper reports. A client without a ticket holds the dense model, as published: it
takes ln density / ln(1 − prune_rate) good rounds to get to its density, and it is truly sparse on
the way. The account of operations counts a round's training at the mask that a client was sent,
before it pruned.

Departs from the paper: means are weighted by samples. Masks stop at `density` exactly. The layer
nearest to the input is not pruned; all else is rewound with the weights, batch norm's statistics
included. The server knows the masks and sends the start anew after each pruning, where the paper's
clients keep it. (The authors' code takes test samples to decide on pruning.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import floor, prod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedprune.errors import ClientError
from fedprune.exchange.aggregate import StateMean, WeightedMean
from fedprune.exchange.messages import MODEL, Reply, Request, counts, number
from fedprune.exchange.pooled import Pooled
from fedprune.local.training import train
from fedprune.methods.base import Collector, Method, RunState, Start, train_request
from prunelab.errors import RunError
from sparsemodel.runtime.adjust import carry, prune_to_largest, select_largest
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.positions import find
from sparsemodel.runtime.state import Array, SparseState

if TYPE_CHECKING:
    from fedprune.local.site import Local

START, PRUNED = "start", "pruned"

# --- client half -------------------------------------------------------------------------------


def train_ticket(request: Request, local: Local) -> Reply:
    """Train the client's ticket; where it does well already, a smaller one from the start."""
    if "prune" not in request.fields:
        return train(request, local)
    model, dev = request.state(MODEL), local.data.dev
    layers = request.fields.get("layers") if model.patterns is None else list(model.patterns)
    if not isinstance(layers, list) or not all(name in model.values for name in layers):
        raise ClientError("field 'layers': expected names of the model's tensors")
    pruned = dict(zip(layers, counts(request.fields, "prune", len(layers)), strict=True))
    if any(count > model.values[name].size for name, count in pruned.items()):
        raise ClientError("field 'prune': more weights than a layer has")
    threshold = number(request.fields, "threshold")
    right = local.open(model).evaluate(dev.inputs, dev.targets).metric_sum if len(dev) else 0.0
    if right <= threshold * len(dev):
        nothing = {n: Pattern.from_positions(_shape(model, n), np.empty(0, int)) for n in layers}
        return replace(train(request, local), masks={PRUNED: Patterns(nothing)})
    left = {name: model.values[name].size - count for name, count in pruned.items()}
    smaller = (prune_to_largest if model.patterns is None else select_largest)(model, left)
    assert smaller.patterns is not None
    rewound = carry(request.state(START), smaller.patterns)
    reply = train(replace(request, states={MODEL: rewound}), local)
    trained = reply.states[MODEL]
    gone: dict[str, Pattern] = {}
    for name in layers:
        before = _positions(model, name)
        lost = before[~find(smaller.patterns[name].positions(), before)[1]]
        gone[name] = Pattern.from_positions(_shape(model, name), lost)
    told = trained.dense() if model.patterns is None else carry(trained, model.patterns).values
    states = {MODEL: SparseState(told, model.patterns)}
    return replace(reply, states=states, masks={PRUNED: Patterns(gone)})


# --- server half -------------------------------------------------------------------------------


class TicketMean:
    """The mean of every weight over the clients that have it, and what they have pruned.

    Args:
        state: before the round.
        layers: that tickets are masks of.
        expected: how many weights of each layer a client prunes if any.
    """

    def __init__(
        self,
        state: RunState,
        layers: Iterable[str],
        expected: Callable[[int], Mapping[str, int]],
    ) -> None:
        self._state, self._layers, self._expected = state, list(layers), expected
        self._mean, self._kept = StateMean(), WeightedMean()
        self._tickets: dict[str, SparseState] = {}
        self._clients: list[int] = []

    def add(self, client: int, reply: Reply) -> None:
        model = reply.states[MODEL]
        gone: Mapping[str, Pattern] = reply.masks.get(PRUNED, {})
        if any(mask.num_active for mask in gone.values()):
            pruned = {name: mask.num_active for name, mask in gone.items()}
            if pruned != dict(self._expected(client)):
                raise ClientError(f"it pruned {pruned} weights, which nobody asked for")
        values, kept = dict(model.values), {}
        patterns: dict[str, Pattern] = {}
        for name in self._layers:
            before = positions = _positions(model, name)
            if name in gone and gone[name].num_active:
                lost = gone[name].positions()
                if not find(before, lost)[1].all():
                    raise ClientError(f"{name!r}: weights are called pruned that were not active")
                positions = before[~find(lost, before)[1]]
                patterns[name] = Pattern.from_positions(_shape(model, name), positions)
            there = np.zeros(_shape(model, name), np.float32)
            there.reshape(-1)[positions] = 1
            values[name], kept[name] = model.dense_layer(name) * there, there
        self._mean.add(SparseState(values), weight=reply.weight)
        self._kept.add(kept, weight=reply.weight)
        self._clients.append(client)
        if patterns:
            start = self._state.kept[START]
            layers = SparseState({name: start.values[name] for name in self._layers})
            self._tickets[_ticket(client)] = carry(layers, Patterns(patterns))

    def result(self) -> Pooled:
        mean = self._mean.result()
        values = {}
        for name, share in self._kept.result().items():
            known = mean.values[name] / np.where(share > 0, share, 1)
            values[name] = np.where(share > 0, known, self._state.model.values[name])
        states = {MODEL: mean.replace(values), **self._tickets}
        return Pooled(sorted(self._clients), self._kept.total_weight, states=states)


@dataclass(frozen=True)
class LotteryFL(Method):
    """Each client prunes and rewinds a mask of its own; the server means where they overlap.

    Attributes:
        density: share of each layer's weights that a client's mask has in the end.
        prune_rate: the share of them that a client prunes at a time.
        threshold: share of its development samples above which a client prunes.
    """

    name: ClassVar[str] = "lotteryfl"
    actions = {"train": train_ticket}  # noqa: RUF012
    collects: ClassVar[bool] = True

    density: float = 0.05
    prune_rate: float = 0.2
    threshold: float = 0.2

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if not 0 < self.prune_rate < 1:
            yield f"prune_rate: expected 0 < prune_rate < 1, got {self.prune_rate}"
        if not 0 <= self.threshold <= 1:
            yield f"threshold: expected 0 to 1, got {self.threshold}"

    def start(self, server: Start) -> RunState:
        if not server.metric.endswith("accuracy"):
            raise RunError(
                f"{self.name} prunes where a ticket tells more than method.threshold of a client's "
                "samples right, and this task has no accuracy; use another method"
            )
        model = server.state()
        layers = list(server.prunable)
        return RunState(0, model, {"layers": layers}, kept={START: model})

    def request(self, state: RunState) -> Request:
        everybody = self._question(state, None)

        @cache  # asked for by the round and by its account
        def personal(client: int) -> Request:
            ticket = state.kept.get(_ticket(client))
            return everybody if ticket is None else self._question(state, ticket)

        return replace(everybody, personal=personal)

    def collector(self, state: RunState) -> Collector:
        def expected(client: int) -> Mapping[str, int]:
            ticket = state.kept.get(_ticket(client))
            return self.pruned_counts(state, None if ticket is None else ticket.patterns)

        return TicketMean(state, state.memory["layers"], expected)

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        tickets = {name: ticket for name, ticket in pooled.states.items() if name != MODEL}
        return replace(super().update(state, pooled), kept={**state.kept, **tickets})

    def personal(self, state: RunState) -> Callable[[int], SparseState]:
        def own(client: int) -> SparseState:
            return _cut(state.model, state.kept.get(_ticket(client)))

        return own

    def pruned_counts(self, state: RunState, ticket: Patterns | None) -> dict[str, int]:
        """How many weights of each layer a client with that ticket prunes next; 0: no more."""
        pruned = {}
        for name in state.memory["layers"]:
            size = prod(state.model.values[name].shape)
            active = size if ticket is None else ticket[name].num_active
            least = max(1, round(self.density * size))
            pruned[name] = min(max(1, floor(self.prune_rate * active)), max(0, active - least))
        return pruned

    def _question(self, state: RunState, ticket: SparseState | None) -> Request:
        """What a client with that ticket is asked; None: one that has pruned nothing yet."""
        patterns = None if ticket is None else ticket.patterns
        model = _cut(state.model, ticket)
        pruned = self.pruned_counts(state, patterns)
        if not any(pruned.values()):
            return train_request(replace(state, model=model))
        fields = {"prune": list(pruned.values()), "threshold": self.threshold}
        if patterns is None:
            fields["layers"] = list(pruned)
        asked = train_request(replace(state, model=model), fields=fields)
        start = _cut(state.kept[START].ordered(state.model.values), ticket)
        return replace(
            asked,
            states={**asked.states, START: start},
            hold=frozenset([START]),
            expected=replace(asked.expected, masks={PRUNED: pruned}),
        )


def _ticket(client: int) -> str:
    return f"ticket-{client}"


def _cut(dense: SparseState, ticket: SparseState | None) -> SparseState:
    """The dense state at a ticket's mask; None: all of it."""
    return dense if ticket is None or ticket.patterns is None else carry(dense, ticket.patterns)


# --- both --------------------------------------------------------------------------------------


def _shape(state: SparseState, name: str) -> tuple[int, ...]:
    pattern = state.pattern(name)
    return state.values[name].shape if pattern is None else pattern.shape


def _positions(state: SparseState, name: str) -> Array:
    """Flat positions of a layer's weights that exist."""
    pattern = state.pattern(name)
    return np.arange(state.values[name].size) if pattern is None else pattern.positions()
