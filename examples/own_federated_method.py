"""A federated method of your own, both halves in one class: python own_federated_method.py

Clients train with gradients cut to a norm; the server goes a part of the way to their mean.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

import fedprune
from fedprune.methods import train, train_request


def train_cut(request, local):
    def cut(values, gradients):
        norm = np.sqrt(sum(np.vdot(g, g) for g in gradients.values()))
        for gradient in gradients.values():
            gradient[...] *= min(1, request.fields["max_norm"] / max(norm, 1e-12))

    return train(request, local, correction=cut)


@dataclass(frozen=True)
class Careful(fedprune.Magnitude):
    name: ClassVar[str] = "careful"
    actions: ClassVar[dict] = {"train": train_cut}
    max_norm: float = 5.0

    def request(self, state):
        return train_request(state, fields={"max_norm": self.max_norm})

    def update(self, state, *, mean, growth):
        moved = {n: w + 0.9 * (mean.values[n] - w) for n, w in state.model.values.items()}
        return super().update(state, mean=mean.replace(moved), growth=growth)


result = fedprune.run(model="resnet8", data="digits", method=Careful(density=0.2), rounds=3)
print({key: result.summary[key] for key in ("method", "density", "test_accuracy")})
