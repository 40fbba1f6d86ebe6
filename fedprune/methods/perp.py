"""PERP, federated: after Wanda's pruning clients train and send norms and biases alone.

Zimmer et al., PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs, 2023: of a pruned
network the weights and biases of norms, and all other biases, are enough to train again. The mask
is that of calibrated.py. All else is frozen at the start's values: a client is sent it once, and
from then on each round brings it what is trained and takes that back, with the running statistics
of batch norms where there are any. The server means it as it does whole models, also by secure
sums; under a robust rule coordinate by coordinate. Differential privacy refuses the method.

A client that lost what it held is sent it again; so is everybody in each round where clients test
(`federation.evaluate`), as they are sent whole models then. A client's steps take the gradients of
all kept weights, of which those of frozen ones are thrown away; what it keeps for its optimiser is
as long as what it trains.

Departs from the paper: low-rank changes and the output layer are not trained.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedprune.errors import ClientError
from fedprune.exchange.gate import is_statistic
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.exchange.pooled import Pooled
from fedprune.local.optimizer import OwnOptimizer
from fedprune.local.training import train
from fedprune.methods.base import RunState, Start, train_request
from fedprune.methods.calibrated import SQUARES, Wanda, measure
from prunelab.errors import RunError
from sparsemodel.runtime.state import Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local
    from fedprune.settings import TrainingConfig

TRAINED = "trained"

# --- client half -------------------------------------------------------------------------------


def retrain(request: Request, local: Local) -> Reply:
    """Local training of the tensors that the question brings; all others stay as they are held.

    Raises:
        ClientError: no such tensors, or too few samples.
    """
    held, brought = request.state(MODEL), request.tensors.get(TRAINED, {})
    pruned = set(held.patterns or ())
    if not brought or any(name not in held.values or name in pruned for name in brought):
        raise ClientError(f"tensors {TRAINED!r}: expected some of the model that are not pruned")
    whole = replace(request, states={MODEL: held.replace(brought)})
    partial = Partial(local.config.training, request.round_index, brought)
    reply = train(whole, local, optimizer=partial)
    values = reply.states[MODEL].values
    return replace(reply, states={}, tensors={TRAINED: {name: values[name] for name in brought}})


class Partial(OwnOptimizer):
    """Steps of some tensors, as the run makes them; the others stay.

    Args:
        names: of those that are trained.
    """

    def __init__(self, training: TrainingConfig, round_index: int, names: Collection[str]) -> None:
        super().__init__(training, round_index)
        self._names = names

    def move(self, values: Tensors, gradients: Tensors) -> None:
        self.steps(values, {n: g for n, g in gradients.items() if n in self._names})
        for name, gradient in gradients.items():
            if name not in self._names:
                gradient[...] = 0


# --- server half -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PERP(Wanda):
    """Wanda's mask, and then norms and biases alone are trained and sent."""

    name: ClassVar[str] = "perp"
    actions = {"train": retrain, SQUARES: measure}  # noqa: RUF012

    def start(self, server: Start) -> RunState:
        from sparsemodel.recovery.perp import parameter_names  # noqa: PLC0415

        found = set(parameter_names(server.place().network.build()))
        names = [name for name in server.state().values if name in found or is_statistic(name)]
        if not found.intersection(names):
            raise RunError(
                f"{self.name}: the network has no norm with weights and no bias that could be "
                "trained; take a method that trains all kept weights"
            )
        return replace(super().start(server), memory={TRAINED: names})

    def request(self, state: RunState) -> Request:
        names, values = state.memory[TRAINED], state.model.values
        # The same in every round, so that clients hold it: without what is trained.
        frozen = state.model.replace({name: np.zeros_like(values[name]) for name in names})
        asked = train_request(replace(state, model=frozen))
        return replace(
            asked,
            tensors={TRAINED: {name: values[name] for name in names}},
            hold=frozenset([MODEL]),
            expected=replace(asked.expected, states=[], tensors={TRAINED: names}),
        )

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        model = state.model.replace(pooled.tensors[TRAINED])
        return super().update(state, pooled.with_model(model))
