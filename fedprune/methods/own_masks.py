"""What methods share whose clients prune and grow masks of their own, which the server makes one.

In an adjustment round a client exchanges weights in the middle of its training and tells its
model in three parts: the state under the request's mask, which of those weights it pruned, and
the weights that it grew. The server means every weight over the clients that have it,
w = Σ n_k m_k w_k / Σ n_k m_k, and prunes each layer by magnitude back to its number of weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedprune.errors import ClientError
from fedprune.exchange.aggregate import EntryMean, StateMean, WeightedMean
from fedprune.exchange.messages import MODEL, Reply, Request, number
from fedprune.exchange.pooled import Pooled
from fedprune.local.optimizer import Optimizer
from fedprune.local.training import (
    SEED_ROUND,
    growth_counts,
    growth_rows,
    require_samples,
    train,
    train_epochs,
)
from fedprune.methods.adjusting import AdjustedMagnitude
from fedprune.methods.base import Collector, RunState, train_request
from prunelab.data.batches import num_batches
from sparsemodel.runtime.adjust import carry, select_largest
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.positions import find
from sparsemodel.runtime.state import Array, Entries, SparseState, Tensors

if TYPE_CHECKING:
    from fedprune.local.model import LocalModel
    from fedprune.local.site import Local

PRUNED = "pruned"


class Exchange(Protocol):
    """A client's model with some weights of its mask exchanged; grown weights are zero."""

    def __call__(
        self,
        request: Request,
        model: LocalModel,
        counts: Mapping[str, int],
        inputs: Array,
        targets: Array,
    ) -> SparseState:
        """Exchange as many weights in each layer as `counts` says, or as can be grown.

        Args:
            inputs, targets: a mini-batch for gradients at pruned weights.
        """
        ...


# --- client half -------------------------------------------------------------------------------


def train_own_mask(request: Request, local: Local, exchange: Exchange) -> Reply:
    """Local training in whose middle the client exchanges weights, where it is asked to.

    Momentum and what else an optimiser keeps start anew with the new mask.

    Raises:
        ClientError: too few samples.
    """
    if "pause" not in request.fields:
        return train(request, local)
    counts = growth_counts(request)
    require_samples(len(local.data.train), request)
    training, own, index = local.config.training, local.data.train, request.round_index
    steps = training.local_epochs * num_batches(len(own), batch_size=training.batch_size)
    pause = math.ceil(number(request.fields, "pause") * steps)
    model, rows = local.open(request.state(MODEL)), growth_rows(local, index)
    optimizers = [Optimizer(training, index)]

    def before_step(step: int) -> None:
        if step == pause:
            model.load(exchange(request, model, counts, own.inputs[rows], own.targets[rows]))
            optimizers.append(Optimizer(training, index))

    def correct(values: Tensors, gradients: Tensors) -> None:
        if (correction := optimizers[-1].correction) is not None:
            correction(values, gradients)

    loss = train_epochs(
        model,
        own.inputs,
        own.targets,
        sgd=optimizers[0].sgd,
        epochs=training.local_epochs,
        batch_size=training.batch_size,
        seed=local.seed(SEED_ROUND, index),
        augmented=local.config.data.augment,
        correction=None if optimizers[0].correction is None else correct,
        before_step=before_step,
    )
    if pause >= steps:
        before_step(pause)
    held = model.held_bytes() + optimizers[-1].held_bytes()
    return Reply(
        len(own),
        {"loss": loss},
        resources=local.resources(held, request) if request.report_resources else None,
        **_told(model.state(), request.state(MODEL), counts),  # type: ignore[arg-type]
    )


def _told(own: SparseState, asked: SparseState, counts: Mapping[str, int]) -> dict[str, object]:
    """A model under a mask of its own, as parts of a reply to a request of another."""
    assert own.patterns is not None
    assert asked.patterns is not None
    pruned: dict[str, Pattern] = {}
    grown: Entries = {}
    for name in counts:
        before, after = (patterns[name].positions() for patterns in (asked.patterns, own.patterns))
        gone, new = ~find(after, before)[1], ~find(before, after)[1]
        pruned[name] = asked.patterns[name].subset(gone)
        grown = {**grown, name: (after[new], own.values[name][new])}
    return {
        "states": {MODEL: carry(own, asked.patterns)},
        "entries": {MODEL: grown},
        "masks": {PRUNED: Patterns(pruned)},
    }


# --- server half -------------------------------------------------------------------------------


class MaskedMean:
    """The mean of models under masks of their own; each weight over the clients that have it.

    Args:
        patterns: of the request; what clients prune is of these, what they grow is not.
    """

    def __init__(self, patterns: Patterns) -> None:
        self._patterns = patterns
        self._mean, self._kept = StateMean(), WeightedMean()
        self._grown, self._grew = EntryMean(), EntryMean()
        self._clients: list[int] = []

    def add(self, client: int, reply: Reply) -> None:
        """As `Collector.add`."""
        model, grown = reply.states[MODEL], reply.entries.get(MODEL, {})
        kept: dict[str, Array] = {}
        for name, pattern in reply.masks[PRUNED].items():
            places, active = find(self._patterns[name].positions(), pattern.positions())
            if not active.all():
                raise ClientError(f"{name!r}: weights are called pruned that were not active")
            num_grown = len(grown[name][0]) if name in grown else 0
            if num_grown != pattern.num_active:
                raise ClientError(
                    f"{name!r}: {pattern.num_active} weights pruned and {num_grown} grown; "
                    "expected as many of both"
                )
            kept[name] = np.ones(self._patterns[name].num_active, np.float32)
            kept[name][places] = 0
        values = {name: model.values[name] * there for name, there in kept.items()}
        self._mean.add(model.replace(values), weight=reply.weight)
        self._kept.add(kept, weight=reply.weight)
        self._grown.add(grown, weight=reply.weight)
        ones = {name: (at, np.ones_like(told)) for name, (at, told) in grown.items()}
        self._grew.add(ones, weight=reply.weight)
        self._clients.append(client)

    def result(self) -> Pooled:
        """As `Collector.result`; the model is under all weights that some client has."""
        mean, grown, grew = self._mean.result(), self._grown.result(), self._grew.result()
        values, patterns = dict(mean.values), {}
        for name, share in self._kept.result().items():
            pattern, kept = self._patterns[name], share > 0
            at, told = pattern.positions()[kept], mean.values[name][kept] / share[kept]
            if name in grown:
                new, sums = grown[name]
                at, told = _merged(at, told, new, sums / grew[name][1])
            patterns[name], values[name] = Pattern.from_positions(pattern.shape, at), told
        model = SparseState(values, self._patterns.replace(patterns))
        return Pooled(sorted(self._clients), self._kept.total_weight, states={MODEL: model})


def _merged(
    at: NDArray[np.int64], values: Array, new: NDArray[np.int64], grown: Array
) -> tuple[NDArray[np.int64], Array]:
    """Two lists of positions, which share none, and their values as one, ascending."""
    places = np.searchsorted(at, new)
    return np.insert(at, places, new), np.insert(values, places, grown)


@dataclass(frozen=True)
class OwnMasks(AdjustedMagnitude):
    """Clients adjust masks of their own; a child says how, by its answer to "train".

    Attributes:
        adjust_after: share of a client's local steps before it exchanges weights, in [0, 1]; 1:
            after all of them, so that what it grew is told as zeros.
    """

    collects: ClassVar[bool] = True

    adjust_after: float = 0.5

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if not 0 <= self.adjust_after <= 1:
            yield f"adjust_after: expected 0 to 1, got {self.adjust_after}"

    def request(self, state: RunState) -> Request:
        if not (counts := self.asked_counts(state)):
            return train_request(state)
        asked = train_request(state, growth=counts, fields={"pause": self.adjust_after})
        return replace(asked, expected=replace(asked.expected, masks={PRUNED: counts}))

    def collector(self, state: RunState) -> Collector | None:
        assert state.model.patterns is not None
        return MaskedMean(state.model.patterns) if self.asked_counts(state) else None

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        assert state.model.patterns is not None
        model = select_largest(pooled.model, state.model.patterns.counts())
        return super().update(state, pooled.with_model(model))
