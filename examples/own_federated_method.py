"""A federated method of your own, both halves in one class: python own_federated_method.py

Clients train with an L1 penalty; the server goes a part of the way to their mean.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

import fedprune
from fedprune.methods import train, train_request


def train_with_l1(request, local):
    def add_penalty(values, gradients):
        for name, gradient in gradients.items():
            gradient[...] += request.fields["l1"] * np.sign(values[name])

    return train(request, local, correction=add_penalty)


@dataclass(frozen=True)
class Careful(fedprune.Magnitude):
    name: ClassVar[str] = "careful"
    actions: ClassVar[dict] = {"train": train_with_l1}
    l1: float = 1e-4

    def request(self, state):
        return train_request(state, fields={"l1": self.l1})

    def update(self, state, pooled):
        mean, old = pooled.model, state.model.values
        moved = mean.replace({n: w + 0.9 * (mean.values[n] - w) for n, w in old.items()})
        return super().update(state, pooled.with_model(moved))


result = fedprune.run(model="resnet8", data="digits", method=Careful(density=0.2), rounds=3)
print({key: result.summary[key] for key in ("method", "density", "test_accuracy")})
