"""FedProx: federated averaging whose clients are held near the global model.

Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020: the local loss is
F_k(w) + μ/2 ‖w − w_t‖², so μ (w − w_t) is added to every gradient. With a density below one the
model is under a fixed magnitude mask, as method "magnitude" makes it; the term is that of the
active weights.

Departs from the paper: every client trains the configured epochs; there is no partial work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedprune.exchange.messages import MODEL, Reply, Request, number
from fedprune.local.training import train
from fedprune.methods.base import RunState, Start, train_request
from fedprune.methods.magnitude import Magnitude
from sparsemodel.runtime.state import Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local


def train_near(request: Request, local: Local) -> Reply:
    """The client half: local training with the proximal term."""
    mu = number(request.fields, "mu")
    anchor = {name: value.copy() for name, value in request.state(MODEL).values.items()}

    def pull(values: Tensors, gradients: Tensors) -> None:
        for name in gradients:
            gradients[name][...] += mu * (values[name] - anchor[name])

    return train(request, local, correction=pull)


@dataclass(frozen=True)
class FedProx(Magnitude):
    """Federated averaging with a proximal term that holds clients near the global model.

    Attributes:
        density: 1 trains the dense network.
        distribution: how many weights each layer keeps: "uniform", "erk", "erk-conv", "global" or
            "global-minimum".
        mu: μ, the weight of the proximal term, >= 0.
    """

    name: ClassVar[str] = "fedprox"
    actions = {"train": train_near}  # noqa: RUF012

    density: float = 1.0
    mu: float = 0.01

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if not 0 <= self.mu < float("inf"):
            yield f"mu: expected 0 or more, got {self.mu}"

    def start(self, server: Start) -> RunState:
        return RunState(0, server.state()) if self.density == 1 else super().start(server)

    def request(self, state: RunState) -> Request:
        return train_request(state, fields={"mu": self.mu})
