"""PruneFL: one client prunes at the start; squared gradients of all move the mask from then on.

Jiang et al., Model Pruning Enables Efficient Federated Learning on Edge Devices, IEEE TNNLS 2022.
A reconfiguration protects the larger weights of each layer, all but a share ρ of them. All other
weights, active or pruned, stand in one line by their squared gradients g², which are averaged over
clients, and the mask takes in the first of them. As published (`adaptive`) it does so as long as

    Γ(M) = Σ_{j in M} g_j² / (T_0 + Σ_{j in M} t_j)

grows, the empirical risk that a round takes off over the time that it takes. Here t_j is the same
for all weights, so that T_0 is counted in what all prunable weights take together; the authors'
figures for VGG-11 give about .7. The density is the most that a mask ever has, as the authors' own
limit is. Without `adaptive`, the default, the mask fills that limit, so that all methods are
compared at equal density; Γ then decides nothing.

The first mask comes from one client, drawn by the seed, which reconfigures the dense start on its
own samples until the limit is reached, ρ of all weights at a time, with some mini-batches of
training before each.

This is the one method here whose clients measure and send gradients of all weights, pruned ones
too: as published, four bytes for each. A client measures one layer at a time, once more through the
network for each, so that beside what it sends it holds no dense gradient but one layer's.
The account of operations has neither these further passes nor the first mask's, which one client
makes once.

Departs from the paper: the first mask comes back without weights, which are those of the start that
all methods here share; g² are those of mini-batches after local training, not of the sum of a
round's gradients; a run's share ρ is constant, and reconfigurations end at `adjust_until`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedprune.errors import ClientError
from fedprune.exchange.gate import is_statistic
from fedprune.exchange.messages import MODEL, Expected, Reply, Request, count, number
from fedprune.exchange.pooled import Pooled
from fedprune.local.model import LocalModel, Sgd
from fedprune.local.optimizer import Optimizer
from fedprune.local.training import (
    GROWTH_BATCHES,
    SEED_ROUND,
    epoch_batches,
    gradient_batches,
    growth_counts,
    require_samples,
    train,
)
from fedprune.methods.adjusting import Adjusting
from fedprune.methods.base import RunState, Start, not_negative, train_request
from prunelab.errors import RunError
from sparsemodel.masks.distribution import uniform
from sparsemodel.runtime.adjust import carry, largest
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.positions import complement
from sparsemodel.runtime.state import Array, SparseState, Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local

PRUNE, FIRST, SQUARES = "prune", "first", "squares"


@dataclass(frozen=True)
class Rule:
    """How a mask is reconfigured.

    Attributes:
        share: ρ, of each layer's active weights, the smallest, that are not protected.
        limit: weights that the mask has at most, where those protected are no more.
        fixed_time: T_0 over what all prunable weights take; 0: the limit is filled.
    """

    share: float
    limit: int
    fixed_time: float = 0.0

    def reconfigured(self, state: SparseState, squares: Tensors) -> Patterns:
        """The next mask.

        Args:
            state: whose active weights are ranked by magnitude.
            squares: g² of every trained tensor, whole; those outside the mask's layers count in
                Γ alone.
        """
        assert state.patterns is not None
        kept, free = {}, {}
        for name, pattern in state.patterns.items():
            protected = largest(np.abs(state.values[name]), self._num_protected(pattern))
            kept[name] = pattern.positions()[protected]
            free[name] = complement(kept[name], num_total=pattern.num_weights)
        line = np.concatenate([squares[name].reshape(-1)[at] for name, at in free.items()])
        num_kept = sum(len(at) for at in kept.values())
        room = min(max(0, self.limit - num_kept), len(line))
        if self.fixed_time:
            gain = sum(float(np.sum(each, dtype=np.float64)) for each in squares.values())
            gain -= float(np.sum(line, dtype=np.float64))
            time = self.fixed_time * state.patterns.num_weights + num_kept
            room = min(room, num_worthwhile(line, gain=gain, time=time))
        ends = np.cumsum([len(at) for at in free.values()])[:-1]
        found = {}
        for (name, at), taken in zip(
            free.items(), np.split(largest(line, room), ends), strict=True
        ):
            both = np.sort(np.concatenate([kept[name], at[taken]]))
            found[name] = Pattern.from_positions(state.patterns[name].shape, both)
        return Patterns(found)

    def _num_protected(self, pattern: Pattern) -> int:
        return min(pattern.num_active, max(1, math.floor((1 - self.share) * pattern.num_active)))


def num_worthwhile(squares: Array, *, gain: float, time: float) -> int:
    """How many of the largest g² raise gain / time, each of which takes 1.

    >>> num_worthwhile(np.array([1.0, 9.0, 2.0, 4.0]), gain=2.0, time=2.0)
    2
    """
    ranked = np.sort(squares.astype(np.float64))[::-1]
    before = gain + np.concatenate([[0.0], np.cumsum(ranked)[:-1]])
    worth = ranked * (time + np.arange(len(ranked))) > before
    return len(ranked) if worth.all() else int(np.argmin(worth))


# --- client half -------------------------------------------------------------------------------


def train_and_measure(request: Request, local: Local) -> Reply:
    """Local training, and g² of every trained weight after it where they are asked for."""
    layers = list(growth_counts(request))
    reply = train(replace(request, fields={}), local)
    if not layers:
        return reply
    trained = reply.states[MODEL]
    one_by_one = [[name] for name in layers]
    found = squares(local.open(trained), trained, _mini_batches(request, local), one_by_one)
    return replace(reply, tensors={SQUARES: found})


def prune_first(request: Request, local: Local) -> Reply:
    """The first mask: the start reconfigured on this client's samples until the limit is reached.

    Raises:
        ClientError: too few samples, or a question without its numbers.
    """
    start, own, training = request.state(MODEL), local.data.train, local.config.training
    if start.patterns is None:
        raise ClientError("a start without a mask")
    require_samples(len(own), request)
    steps, limit = count(request.fields, "steps"), count(request.fields, "limit")
    share, fixed_time = number(request.fields, "share"), number(request.fields, "time")
    if not 0 < share < 1 or limit < len(start.patterns):
        raise ClientError("fields 'share' and 'limit': expected 0 to 1, and 1 weight a layer")
    source = epoch_batches(
        own.inputs,
        own.targets,
        epochs=sys.maxsize,
        batch_size=training.batch_size,
        seed=local.seed(SEED_ROUND, 0),
        augmented=local.config.data.augment,
    )
    state, model = start, local.open(start)
    patterns = start.patterns
    while (active := patterns.num_active) > limit:
        optimizer = Optimizer(training, 0)
        for _, inputs, targets in islice(source, steps):
            model.step(inputs, targets, sgd=optimizer.sgd, correction=optimizer.correction)
        state = model.state()
        found = squares(model, state, _mini_batches(request, local), [list(start.patterns)])
        next_limit = max(limit, math.floor((1 - share) * active))
        patterns = Rule(share, next_limit, fixed_time).reconfigured(state, found)
        state = carry(state, patterns)
        model.load(state)
    return Reply(len(own), masks={FIRST: patterns})


def squares(
    model: LocalModel,
    state: SparseState,
    batches: Iterable[tuple[Array, Array]],
    groups: Iterable[Iterable[str]],
) -> dict[str, Array]:
    """g² of every trained tensor, whole, averaged over mini-batches by their numbers of samples.

    Args:
        model: holds `state`; its running statistics change.
        groups: of the mask's layers, whose gradients at pruned weights are held at a time.
    """
    assert state.patterns is not None
    patterns, shapes = state.patterns, state.shapes()
    places = {name: pattern.positions() for name, pattern in patterns.items()}
    found: dict[str, Array] = {}
    samples, groups = 0, [list(group) for group in groups]
    for inputs, targets in batches:
        size = np.float32(len(targets))

        def add(_: Tensors, gradients: Tensors, size: Any = size) -> None:
            for name, gradient in gradients.items():
                if name not in found:
                    found[name] = np.zeros(math.prod(shapes[name]), np.float32)
                found[name][places.get(name, slice(None))] += size * np.square(gradient).reshape(-1)

        model.step(inputs, targets, sgd=Sgd(0.0, 0.0, 0.0), correction=add)
        for group in groups:
            pruned = {name: _num_pruned(patterns[name]) for name in group}
            for name, (at, gradients) in model.growth(pruned, inputs, targets).items():
                found[name][at] += size * np.square(gradients)
        samples += len(targets)
    return {n: (total / np.float32(samples)).reshape(shapes[n]) for n, total in found.items()}


def _num_pruned(pattern: Pattern) -> int:
    return pattern.num_weights - pattern.num_active


def _mini_batches(request: Request, local: Local) -> Iterator[tuple[Array, Array]]:
    batches = count(request.fields, GROWTH_BATCHES)
    if batches < 1:
        raise ClientError(f"field {GROWTH_BATCHES!r}: expected at least 1, got 0")
    return gradient_batches(local, request.round_index, most=batches)


# --- server half -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PruneFL(Adjusting):
    """One client prunes the start; squared gradients of all clients reconfigure the mask.

    Attributes:
        adjust_rate: ρ, the share of a layer's weights that a reconfiguration may prune.
        batches: mini-batches over which a client measures squared gradients.
        first_steps: mini-batches of training before each reconfiguration of the first mask.
        adaptive: whether the mask may have fewer weights than `density` allows, as published.
        fixed_time: T_0 of a round over the time that all prunable weights take, above 0.
    """

    name: ClassVar[str] = "prunefl"
    actions = {"train": train_and_measure, PRUNE: prune_first}  # noqa: RUF012

    adjust_rate: float = 0.3
    batches: int = 1
    first_steps: int = 10
    adaptive: bool = False
    fixed_time: float = 0.7

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if self.adjust_rate == 0:
            yield "adjust_rate: expected above 0: the first mask is made by it, got 0"
        if self.batches < 1:
            yield f"batches: expected at least 1, got {self.batches}"
        if self.first_steps < 0:
            yield f"first_steps: expected 0 or more, got {self.first_steps}"
        if not 0 < self.fixed_time < float("inf"):
            yield f"fixed_time: expected a number above 0, got {self.fixed_time}"

    def start(self, server: Start) -> RunState:
        dense, limit = server.state(), sum(uniform(server.prunable, self.density).values())
        whole = Patterns({name: Pattern.full(shape) for name, shape in server.prunable.items()})

        def check(reply: Reply) -> None:
            first = reply.masks[FIRST]
            least = len(first) if self.adaptive else limit
            if not least <= first.num_active <= limit:
                what = "at most " if self.adaptive else ""
                raise ClientError(
                    f"a first mask of {first.num_active} weights: expected {what}{limit}"
                )
            if empty := [name for name, count in first.counts().items() if not count]:
                raise ClientError(f"a first mask without any weight of {empty[0]!r}")

        request = Request(
            PRUNE,
            fields={
                "limit": limit,
                "steps": self.first_steps,
                GROWTH_BATCHES: self.batches,
                "share": self.adjust_rate,
                "time": self._time,
            },
            states={MODEL: carry(dense, whole)},
            expected=Expected(masks={FIRST: whole.counts()}),
            check=check,
            num_clients=1,
        )
        answers = dict(server.ask(request))
        if not answers:
            raise RunError("prunefl: no client could make the first mask")
        client = min(answers)
        first = answers[client].masks[FIRST]
        patterns = Patterns({name: first[name] for name in server.prunable})
        return RunState(
            0,
            carry(dense, patterns),
            {"until": self.last_adjustment(server.rounds), "limit": limit},
            {"first_mask": {"client": client, "densities": patterns.densities()}},
        )

    def request(self, state: RunState) -> Request:
        if not self.adjusts(state):
            return train_request(state)
        assert state.model.patterns is not None
        pruned = {name: _num_pruned(pattern) for name, pattern in state.model.patterns.items()}
        asked = train_request(state, growth=pruned, fields={GROWTH_BATCHES: self.batches})
        trained = [name for name in state.model.values if not is_statistic(name)]
        expected = replace(asked.expected, growth={}, tensors={SQUARES: trained})

        def check(reply: Reply) -> None:
            asked.check(reply)
            not_negative(reply, SQUARES)

        return replace(asked, expected=expected, check=check)

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        after = super().update(state, pooled)
        if not self.adjusts(state):
            return after
        rule = Rule(self.adjust_rate, state.memory["limit"], self._time)
        patterns = rule.reconfigured(after.model, pooled.tensors[SQUARES])
        return replace(after, model=carry(after.model, patterns))

    @property
    def _time(self) -> float:
        return self.fixed_time if self.adaptive else 0.0
