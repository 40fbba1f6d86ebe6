"""The method: what the server makes of the clients' answers, and how a client trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedprune import Magnitude
from fedprune.methods import Local, Reply, Request, RunState, train, train_request


def train_with_short_steps(request: Request, local: Local) -> Reply:
    """The client's half: local training whose gradients are cut to a norm of `max_norm`."""
    max_norm = float(request.fields["max_norm"])

    def shorten(values: Mapping[str, Any], gradients: Mapping[str, Any]) -> None:
        norm = np.sqrt(sum(float(np.vdot(gradient, gradient)) for gradient in gradients.values()))
        for gradient in gradients.values():
            gradient[...] = gradient * min(1.0, max_norm / max(norm, 1e-12))

    return train(request, local, correction=shorten)


@dataclass(frozen=True)
class MyMethod(Magnitude):
    """Magnitude pruning whose server goes only a part of the way to the clients' mean.

    Attributes:
        server_rate: 1 takes the mean.
        max_norm: of a client's gradients.
    """

    name: ClassVar[str] = "my-method"
    actions = {"train": train_with_short_steps}  # noqa: RUF012

    density: float = 0.2
    server_rate: float = 0.9
    max_norm: float = 5.0

    def request(self, state: RunState) -> Request:
        """The server's half, before a round: what the clients are asked."""
        return train_request(state, fields={"max_norm": self.max_norm})

    def update(self, state: RunState, *, mean: Any, growth: Any) -> RunState:
        """The server's half, after a round: the next state."""
        old, rate = state.model.values, np.float32(self.server_rate)
        moved = {name: old[name] + rate * (mean.values[name] - old[name]) for name in old}
        return super().update(state, mean=mean.replace(moved), growth=growth)
