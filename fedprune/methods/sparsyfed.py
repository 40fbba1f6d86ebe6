"""SparsyFed: clients train powers of what they hold, so that large weights grow and zeros stay.

Guastella et al., SparsyFed: Sparse Adaptive Federated Training, ICLR 2025 (arXiv 2504.05153),
and its authors' code. The network computes with w = θ|θ|^(β−1) (powerpropagation, Schwarz et al.,
NeurIPS 2021), while θ is what travels, is trained and is averaged. ∂w/∂θ = β|θ|^(β−1) is 0 at
θ = 0: what is pruned stays so. After its training a client keeps the Top-K of |θ| over all
prunable layers together; the server's mean counts what a client pruned as 0.

The first round is dense on every client, as published: the start is, and clients prune what they
have trained. After it a client holds the model's mask alone, truly sparse.

Departs from the paper: the server keeps the Top-K of the mean, so that the model has `density`
after every round, and its mask is settled by the first (`global_top_k` = False keeps whatever some
client kept, as the authors' code does: a denser model whose mask shrinks until the clients agree).
Activations are not pruned in the backward pass. θ has the run's optimiser, momentum included,
where the authors take plain SGD. The layer nearest to the input, which no method here prunes,
trains its weights as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, Reply, Request, count, number
from fedprune.exchange.pooled import Pooled
from fedprune.local.optimizer import OwnOptimizer
from fedprune.local.training import train
from fedprune.methods.base import Method, RunState, Start, train_request
from sparsemodel.runtime.adjust import largest
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import Array, SparseState, Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local
    from fedprune.settings import TrainingConfig


# --- client half -------------------------------------------------------------------------------


def train_powers(request: Request, local: Local) -> Reply:
    """Train θ under w = θ|θ|^(β−1), and keep its Top-K."""
    received, beta = request.state(MODEL), number(request.fields, "beta")
    if not beta >= 1:
        raise ClientError(f"field 'beta': expected 1 or more, got {beta}")
    layers = request.fields.get("layers") if received.patterns is None else list(received.patterns)
    if not isinstance(layers, list) or not all(name in received.values for name in layers):
        raise ClientError("field 'layers': expected names of the model's tensors")
    keep = count(request.fields, "keep")
    if beta == 1:
        reply = train(request, local)
        trained = reply.states[MODEL]
    else:
        theta = {name: received.values[name].copy() for name in layers}
        started = received.replace({name: power(theta[name], beta) for name in layers})
        powers = Powers(theta, beta, local.config.training, request.round_index)
        reply = train(replace(request, states={MODEL: started}), local, optimizer=powers)
        trained = reply.states[MODEL].replace(theta)
    kept = top_k({name: trained.values[name] for name in layers}, keep)
    pruned = {name: np.where(kept[name], trained.values[name], 0) for name in layers}
    return replace(reply, states={MODEL: trained.replace(pruned)})


class Powers(OwnOptimizer):
    """Steps of θ, and of other parameters as they are.

    Args:
        theta: layer -> θ, which is moved in place.
    """

    def __init__(
        self, theta: Mapping[str, Array], beta: float, training: TrainingConfig, round_index: int
    ) -> None:
        super().__init__(training, round_index)
        self._theta, self._beta = theta, beta

    def move(self, values: Tensors, gradients: Tensors) -> None:
        thetas = {name: theta for name, theta in self._theta.items() if name in gradients}
        for name, theta in thetas.items():
            slope = abs(theta) ** np.float32(self._beta - 1)
            gradients[name][...] *= np.float32(self._beta) * slope
        self.steps({**values, **thetas}, gradients)
        for name, theta in thetas.items():
            np.subtract(theta, gradients[name], out=theta)
            gradients[name][...] = values[name] - power(theta, self._beta)

    def held_bytes(self) -> int:
        return super().held_bytes() + sum(theta.nbytes for theta in self._theta.values())


# --- server half -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparsyFed(Method):
    """Powers of weights are trained and the largest of all layers kept, round by round.

    Attributes:
        density: share of the prunable weights of the whole network that a client keeps; 1 prunes
            nothing.
        beta: β; 1 trains weights as they are.
        global_top_k: whether the server prunes the clients' mean to `density` as well.
    """

    name: ClassVar[str] = "sparsyfed"
    actions = {"train": train_powers}  # noqa: RUF012

    density: float = 0.05
    beta: float = 1.25
    global_top_k: bool = True

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if not 1 <= self.beta < float("inf"):
            yield f"beta: expected 1 or more, got {self.beta}"

    def start(self, server: Start) -> RunState:
        layers = list(server.prunable)
        keep = max(1, round(self.density * sum(map(prod, server.prunable.values()))))
        return RunState(0, server.state(), {"layers": layers, "keep": keep})

    def request(self, state: RunState) -> Request:
        layers, dense = state.memory["layers"], state.model.patterns is None
        theta = {name: power(state.model.values[name], 1 / self.beta) for name in layers}
        fields = {"beta": self.beta, "keep": state.memory["keep"]}
        if dense:
            fields["layers"] = layers
        return train_request(replace(state, model=state.model.replace(theta)), fields=fields)

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        mean, layers = pooled.model, state.memory["layers"]
        theta = {name: mean.values[name] for name in layers}
        if self.density < 1:
            total = sum(value.size for value in theta.values())
            kept = top_k(theta, state.memory["keep"] if self.global_top_k else total)
            mean = _under(mean, {name: kept[name] & (theta[name] != 0) for name in layers})
        weights = {name: power(mean.values[name], self.beta) for name in layers}
        return super().update(state, pooled.with_model(mean.replace(weights)))


# --- both --------------------------------------------------------------------------------------


def power(values: Array, exponent: float) -> Array:
    """sign(x) |x|^exponent, float32.

    >>> power(np.float32([-4, 0, 9]), 0.5).tolist()
    [-2.0, 0.0, 3.0]
    """
    if exponent == 1:
        return values
    raised: Array = np.sign(values) * abs(values) ** np.float32(exponent)
    return raised


def top_k(values: Tensors, count: int) -> dict[str, Array]:
    """Which values are among the `count` of largest magnitude of all tensors; earlier of equals.

    >>> kept = top_k({"a": np.float32([3, 1]), "b": np.float32([-2, 2])}, 2)
    >>> kept["a"].tolist(), kept["b"].tolist()
    ([True, False], [True, False])
    """
    magnitudes = np.concatenate([abs(value).reshape(-1) for value in values.values()])
    chosen = largest(magnitudes, min(count, len(magnitudes)))
    return dict(_parts(chosen, values))


def _parts(flat: Array, like: Tensors) -> Iterator[tuple[str, Array]]:
    start = 0
    for name, value in like.items():
        yield name, flat[start : start + value.size].reshape(value.shape)
        start += value.size


def _under(state: SparseState, kept: Tensors) -> SparseState:
    """The state with those values alone, under patterns."""
    patterns = {}
    for name, chosen in kept.items():
        before = state.pattern(name)
        if before is None:
            patterns[name] = Pattern.from_positions(chosen.shape, np.flatnonzero(chosen))
        else:
            patterns[name] = before.subset(chosen)
    values = {name: state.values[name][chosen] for name, chosen in kept.items()}
    return SparseState({**state.values, **values}, Patterns(patterns))
