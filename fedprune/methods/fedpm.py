"""FedPM: the weights stay random, and clients learn which of them to use.

Isik et al., Sparse Random Networks for Communication-Efficient Federated Learning, ICLR 2023, and
its authors' code. Weights are ±e/√fan-in, drawn from the run's seed on both sides and never
trained. Each has a score s; in every step its mask is drawn from Bernoulli(θ), θ = σ(s), and the
gradient passes through the draw: ∂L/∂s = ∂L/∂w̃ · w · θ(1 − θ). After its training a client sends
one mask that it draws, at most a bit a weight, entropy coded. The server keeps a Beta(α, β) of each
weight, from α = β = 1: a mask adds ones to α and zeros to β, and θ is the mode,
(α − 1)/(α + β − 2) = votes/masks, kept ε = .01 away from 0 and 1.

What is evaluated and left behind is one network drawn from θ by the seed; its density is what the
clients make of it, about a half, and no setting. Clients hold scores, gradients and Adam's moments
of all weights, and compute densely, as published. Going down, θ takes four bytes a weight.

Departs from the paper: the published networks are of masked layers alone. Here the layer nearest
to the input, biases and batch norms are trained, sent and averaged as in every other method; their
start is pre-trained. Adam begins anew in each round. The authors' code multiplies the gradient by
θ once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedprune.errors import ClientError
from fedprune.exchange.aggregate import StateMean
from fedprune.exchange.messages import MODEL, Reply, Request, number
from fedprune.exchange.pooled import Pooled
from fedprune.local.optimizer import Adam, OwnOptimizer
from fedprune.local.training import train
from fedprune.methods.base import Collector, Method, RunState, Start, train_request
from prunelab.runs.seeds import rng
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import Array, SparseState, Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local
    from fedprune.settings import TrainingConfig

MASK, REST, VOTES = "mask", "rest", "votes"
EPSILON = 0.01
# The first part of a derived seed says what it is for, so that no two uses share a stream.
SEED_WEIGHTS, SEED_SCORES, SEED_CLIENT, SEED_SERVER = 401, 402, 403, 404

# --- client half -------------------------------------------------------------------------------


def train_masks(request: Request, local: Local) -> Reply:
    """Train the scores of the layers that are named, and everything else as always."""
    received, layers = request.state(MODEL), request.fields.get("layers")
    if not isinstance(layers, list) or not all(name in received.values for name in layers):
        raise ClientError("field 'layers': expected names of the model's tensors")
    rate = number(request.fields, "score_lr")
    theta = {name: received.values[name] for name in layers}
    if not all(((value > 0) & (value < 1)).all() for value in theta.values()):
        raise ClientError("a probability of the model's masks is not between 0 and 1")
    scores = Scores(
        {name: np.log(value / (1 - value)) for name, value in theta.items()},
        random_weights({name: value.shape for name, value in theta.items()}, local.config.seed),
        rng(local.seed(SEED_CLIENT, request.round_index)),
        training=local.config.training,
        round_index=request.round_index,
        lr=rate,
    )
    started = received.replace(scores.drawn())
    reply = train(replace(request, states={MODEL: started}), local, optimizer=scores)
    rest = {n: v for n, v in reply.states[MODEL].values.items() if n not in theta}
    patterns = {
        name: Pattern.from_positions(value.shape, np.flatnonzero(value))
        for name, value in scores.drawn().items()
    }
    return replace(reply, states={}, tensors={REST: rest}, masks={MASK: Patterns(patterns)})


class Scores(OwnOptimizer):
    """Steps of scores, by Adam, and of other parameters as the run makes them.

    Args:
        scores: layer -> s, which is moved in place.
        weights: layer -> the weights that stay.
        source: draws the masks.
        lr: of the scores.
    """

    def __init__(
        self,
        scores: Mapping[str, Array],
        weights: Tensors,
        source: np.random.Generator,
        *,
        training: TrainingConfig,
        round_index: int,
        lr: float,
    ) -> None:
        super().__init__(training, round_index)
        self._scores, self._weights, self._source = scores, weights, source
        self._adam, self._lr = Adam(), np.float32(lr)

    def drawn(self) -> dict[str, Array]:
        """Weights under masks drawn now."""
        return {
            name: np.where(drawn(sigmoid(score), self._source), self._weights[name], 0)
            for name, score in self._scores.items()
        }

    def move(self, values: Tensors, gradients: Tensors) -> None:
        others = {n: g for n, g in gradients.items() if n not in self._scores}
        self.steps(values, others)
        steps = {}
        for name in [n for n in self._scores if n in gradients]:
            theta = sigmoid(self._scores[name])
            steps[name] = gradients[name] * self._weights[name] * theta * (1 - theta)
        self._adam(self._scores, steps)
        for name, step in steps.items():
            np.subtract(self._scores[name], self._lr * step, out=self._scores[name])
        for name, weights in self.drawn().items():
            if name in gradients:
                gradients[name][...] = values[name] - weights

    def held_bytes(self) -> int:
        own = sum(2 * score.nbytes for score in self._scores.values())
        return super().held_bytes() + self._adam.held_bytes() + own


# --- server half -------------------------------------------------------------------------------


class Votes:
    """Counts masks, and means what else clients have trained."""

    def __init__(self) -> None:
        self._rest = StateMean()
        self._votes: dict[str, Array] = {}
        self._clients: list[int] = []
        self._weight = 0

    def add(self, client: int, reply: Reply) -> None:
        self._rest.add(SparseState(reply.tensors[REST]), weight=reply.weight)
        for name, pattern in reply.masks[MASK].items():
            votes = self._votes.setdefault(name, np.zeros(pattern.num_weights, np.float32))
            votes[pattern.positions()] += 1
        self._clients.append(client)
        self._weight += reply.weight

    def result(self) -> Pooled:
        tensors = {REST: self._rest.result().values, VOTES: self._votes}
        return Pooled(sorted(self._clients), self._weight, tensors=tensors)


@dataclass(frozen=True)
class FedPM(Method):
    """Masks of random weights are learned, and one bit a weight goes up.

    Attributes:
        score_lr: Adam's learning rate for scores.
        reset_every: rounds after which the server forgets the masks that it has counted.
    """

    name: ClassVar[str] = "fedpm"
    actions = {"train": train_masks}  # noqa: RUF012
    collects: ClassVar[bool] = True

    score_lr: float = 0.1
    reset_every: int = 1

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if not 0 < self.score_lr < math.inf:
            yield f"score_lr: expected a positive number, got {self.score_lr}"
        if self.reset_every < 1:
            yield f"reset_every: expected at least 1, got {self.reset_every}"

    def start(self, server: Start) -> RunState:
        shapes = {name: list(shape) for name, shape in server.prunable.items()}
        state = RunState(0, server.state(), {"seed": server.seed, "shapes": shapes, "masks": 0})
        return replace(state, model=_network(state))

    def request(self, state: RunState) -> Request:
        theta = probabilities(state)
        rest = [name for name in state.model.values if name not in theta]
        model = SparseState({**state.model.values, **theta})
        fields = {"layers": list(theta), "score_lr": self.score_lr}
        asked = train_request(replace(state, model=model), fields=fields)
        most = {name: value.size for name, value in theta.items()}
        expected = replace(asked.expected, states=[], tensors={REST: rest}, masks={MASK: most})
        return replace(asked, expected=expected)

    def collector(self, state: RunState) -> Collector:
        return Votes()

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        votes, masks = pooled.tensors[VOTES], len(pooled.clients)
        if state.round_index % self.reset_every:
            before = state.kept[VOTES].values
            votes = {name: some + before[name] for name, some in votes.items()}
            masks += state.memory["masks"]
        counted = replace(
            state,
            round_index=state.round_index + 1,
            model=state.model.replace(pooled.tensors[REST]),
            memory={**state.memory, "masks": masks},
            kept={VOTES: SparseState(votes)},
        )
        return replace(counted, model=_network(counted))


def probabilities(state: RunState) -> dict[str, Array]:
    """θ of every masked layer: what clients start the round from."""
    theta, memory = {}, state.memory
    for place, (name, shape) in enumerate(memory["shapes"].items()):
        if memory["masks"]:
            share = state.kept[VOTES].values[name].reshape(shape) / np.float32(memory["masks"])
            theta[name] = EPSILON + np.float32(1 - 2 * EPSILON) * share
        else:
            source = rng(SEED_SCORES, memory["seed"], place)
            theta[name] = sigmoid(source.standard_normal(shape, np.float32))
    return theta


def _network(state: RunState) -> SparseState:
    """One network of those that θ describes, with the other tensors of the model."""
    theta, seed = probabilities(state), state.memory["seed"]
    source = rng(SEED_SERVER, seed, state.round_index)
    weights = random_weights({name: value.shape for name, value in theta.items()}, seed)
    patterns, values = {}, dict(state.model.values)
    for name, value in theta.items():
        chosen = np.flatnonzero(drawn(value, source))
        patterns[name] = Pattern.from_positions(value.shape, chosen)
        values[name] = weights[name].reshape(-1)[chosen]
    return SparseState(values, Patterns(patterns))


# --- both --------------------------------------------------------------------------------------


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    """The weights of a run, which nobody sends: e/√fan-in with random signs, float32."""
    weights = {}
    for place, (name, shape) in enumerate(shapes.items()):
        size = np.float32(math.e / math.sqrt(math.prod(shape[1:])))
        signs = rng(SEED_WEIGHTS, seed, place).integers(0, 2, shape, dtype=np.int8)
        weights[name] = np.where(signs, size, -size)
    return weights


def sigmoid(values: Array) -> Array:
    """1 / (1 + exp(−x)), of any x.

    >>> sigmoid(np.float32([0, -1000])).tolist()
    [0.5, 0.0]
    """
    halved: Array = np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * values))
    return halved


def drawn(theta: Array, source: np.random.Generator) -> Array:
    """A mask: which weights are there, each with its probability."""
    chosen: Array = source.random(theta.shape, dtype=np.float32) < theta
    return chosen
