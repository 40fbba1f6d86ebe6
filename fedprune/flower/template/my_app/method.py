"""The method: what the server makes of the clients' answers, and how a client trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedprune import Magnitude
from fedprune.methods import Local, Pooled, Reply, Request, RunState, train, train_request


def train_with_l1(request: Request, local: Local) -> Reply:
    """The client's half: local training with the penalty `l1` · ‖weights‖₁."""
    l1 = float(request.fields["l1"])

    def add_penalty(values: Mapping[str, Any], gradients: Mapping[str, Any]) -> None:
        for name, gradient in gradients.items():
            gradient[...] += l1 * np.sign(values[name])

    return train(request, local, correction=add_penalty)


@dataclass(frozen=True)
class MyMethod(Magnitude):
    """Magnitude pruning whose server goes only a part of the way to the clients' mean.

    Attributes:
        server_rate: 1 takes the mean.
        l1: weight of the penalty.
    """

    name: ClassVar[str] = "my-method"
    actions = {"train": train_with_l1}  # noqa: RUF012

    density: float = 0.2
    server_rate: float = 0.9
    l1: float = 1e-4

    def request(self, state: RunState) -> Request:
        """The server's half, before a round: what the clients are asked."""
        return train_request(state, fields={"l1": self.l1})

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        """The server's half, after a round: the next state."""
        mean, old, rate = pooled.model, state.model.values, np.float32(self.server_rate)
        moved = {name: old[name] + rate * (mean.values[name] - old[name]) for name in old}
        return super().update(state, pooled.with_model(mean.replace(moved)))
