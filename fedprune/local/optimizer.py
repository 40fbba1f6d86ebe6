"""What a client's step makes of gradients: clipping, Adam's moments, a rule of one's own; no torch.

Every execution takes steps of stochastic gradient descent; a rule turns gradients into directions
before them, of active weights alone, so that Adam's moments are as long as those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fedprune.errors import ConfigError
from fedprune.given import given_object
from fedprune.local.model import Correction, Sgd
from prunelab.runs.imported import imported
from sparsemodel.masks.schedule import cosine
from sparsemodel.runtime.state import Array, Tensors

if TYPE_CHECKING:
    from fedprune.settings import TrainingConfig


class Rule(Protocol):
    """Turns gradients into directions, in place: the step is values -= lr * gradients.

    One is made for each client and round; it may keep what it has seen in between.
    """

    def __call__(self, values: Tensors, gradients: Tensors) -> None: ...


class Adam:
    """Adam (Kingma and Ba, ICLR 2015), or AdamW (Loshchilov and Hutter, ICLR 2019).

    Args:
        weight_decay: L2 penalty, or decay apart from the moments where `decoupled`.
    """

    def __init__(
        self,
        *,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._weight_decay, self._decoupled = np.float32(weight_decay), decoupled
        self._betas, self._eps = betas, np.float32(eps)
        self._steps = 0
        self._moments: dict[str, tuple[Array, Array]] = {}

    def __call__(self, values: Tensors, gradients: Tensors) -> None:
        self._steps += 1
        first, second = (1 - beta**self._steps for beta in self._betas)
        for name, gradient in gradients.items():
            if self._weight_decay and not self._decoupled:
                np.add(gradient, self._weight_decay * values[name], out=gradient)
            if name not in self._moments:
                self._moments[name] = (np.zeros_like(gradient), np.zeros_like(gradient))
            mean, square = self._moments[name]
            for moment, beta, seen in (
                (mean, self._betas[0], gradient),
                (square, self._betas[1], gradient * gradient),
            ):
                np.multiply(moment, np.float32(beta), out=moment)
                np.add(moment, np.float32(1 - beta) * seen, out=moment)
            scale = np.sqrt(square)
            scale /= np.float32(math.sqrt(second))
            scale += self._eps
            scale *= np.float32(first)
            np.divide(mean, scale, out=gradient)
            if self._weight_decay and self._decoupled:
                np.add(gradient, self._weight_decay * values[name], out=gradient)

    def held_bytes(self) -> int:
        """Of the moments."""
        return sum(each.nbytes for pair in self._moments.values() for each in pair)


def _adam(training: TrainingConfig) -> Rule:
    return Adam(weight_decay=training.weight_decay)


def _adamw(training: TrainingConfig) -> Rule:
    return Adam(weight_decay=training.weight_decay, decoupled=True)


OPTIMIZERS: dict[str, Callable[[TrainingConfig], Rule | None]] = {
    "sgd": lambda training: None,
    "adam": _adam,
    "adamw": _adamw,
}

SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda done, rounds: cosine(done, value=1.0, end=rounds),
    "linear": lambda done, rounds: 1 - done / rounds,
    "constant": lambda done, rounds: 1.0,
}


class Optimizer:
    """A client's optimiser in one round.

    Args:
        correction: changes gradients before all else (a proximal term, say).

    Attributes:
        sgd: the numbers of each step.

    Raises:
        ConfigError: no optimiser or schedule of that name.
    """

    def __init__(
        self,
        training: TrainingConfig,
        round_index: int,
        *,
        correction: Correction | None = None,
    ) -> None:
        self._first, self._limit = correction, training.clip_norm
        self._rule = make_rule(training)
        sgd = round_sgd(training, round_index)
        self.sgd = sgd if self._rule is None else Sgd(sgd.lr, 0.0, 0.0)

    @property
    def correction(self) -> Correction | None:
        """What `LocalModel.step` takes; None: gradients stay as they are."""
        plain = self._first is None and self._rule is None and not self._limit
        return None if plain else self._correct

    def held_bytes(self) -> int:
        """Of what the rule keeps, where it says so."""
        held = getattr(self._rule, "held_bytes", None)
        return 0 if held is None else int(held())

    def _correct(self, values: Tensors, gradients: Tensors) -> None:
        if self._first is not None:
            self._first(values, gradients)
        if self._limit:
            clip(gradients, self._limit)
        if self._rule is not None:
            self._rule(values, gradients)


class OwnOptimizer(Optimizer):
    """An optimiser of a method's own, which decides the whole step of every parameter.

    `move` (values, gradients) leaves in the gradients what is subtracted from the values; `steps`
    says what the run's optimiser would subtract.

    Attributes:
        numbers: of the run's steps.
    """

    def __init__(self, training: TrainingConfig, round_index: int) -> None:
        super().__init__(training, round_index)
        self.numbers, self.sgd = self.sgd, Sgd(1.0, 0.0, 0.0)
        self._speed: dict[str, Array] = {}

    @property
    def correction(self) -> Correction | None:
        return self.move

    def move(self, values: Tensors, gradients: Tensors) -> None:
        """Turn gradients into what is subtracted, in place."""
        raise NotImplementedError

    def steps(self, values: Tensors, gradients: Tensors, *, lr: float | None = None) -> None:
        """Turn gradients into the run's steps, in place: clipped, by its rule or with momentum.

        Args:
            lr: a learning rate in place of the round's.
        """
        self._correct(values, gradients)
        rate, momentum, decay = map(np.float32, self.numbers)
        for name, gradient in gradients.items():
            if decay:
                np.add(gradient, decay * values[name], out=gradient)
            if momentum:
                speed = self._speed.setdefault(name, np.zeros_like(gradient))
                np.multiply(speed, momentum, out=speed)
                np.add(speed, gradient, out=speed)
                gradient[...] = speed
            np.multiply(gradient, rate if lr is None else np.float32(lr), out=gradient)

    def held_bytes(self) -> int:
        return super().held_bytes() + sum(speed.nbytes for speed in self._speed.values())


def round_sgd(training: TrainingConfig, round_index: int) -> Sgd:
    """The numbers of plain SGD in a round: the schedule sets the learning rate round by round."""
    rate = training.lr * schedule_factor(training, round_index)
    return Sgd(rate, training.momentum, training.weight_decay)


def is_plain(training: TrainingConfig) -> bool:
    """Whether gradients go into plain SGD as they are."""
    return training.optimizer == "sgd" and not training.clip_norm


def clip(gradients: Tensors, limit: float) -> None:
    """Scale gradients down, in place, where their Euclidean norm together is beyond `limit`.

    >>> gradients = {"weight": np.array([3.0, 4.0], np.float32)}
    >>> clip(gradients, 1.0)
    >>> gradients["weight"].round(3).tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    squares = (float(np.vdot(g, g)) for g in gradients.values())
    norm = math.sqrt(sum(squares))
    if norm > limit:
        for gradient in gradients.values():
            np.multiply(gradient, np.float32(limit / norm), out=gradient)


def make_rule(training: TrainingConfig) -> Rule | None:
    """The rule of `training.optimizer`, made anew; None: plain SGD.

    Raises:
        ConfigError: no such optimiser.
    """
    name = training.optimizer
    if name in OPTIMIZERS:
        return OPTIMIZERS[name](training)
    make = _found("training.optimizer", name)
    try:
        rule: Rule = make()
    except Exception as error:  # whatever it raises
        raise ConfigError(
            f"training.optimizer: {name!r} cannot be called without arguments ({error}); expected "
            "what makes a rule (docs/tasks.md); torch's own are named: "
            f"{', '.join(OPTIMIZERS)}"
        ) from error
    if not callable(rule):
        raise ConfigError(
            f"training.optimizer: {name!r} made a {type(rule).__name__}; expected a function of "
            "(values, gradients) that turns gradients into directions in place"
        )
    return rule


def schedule_factor(training: TrainingConfig, round_index: int) -> float:
    """What the learning rate of a round is multiplied by.

    Raises:
        ConfigError: no such schedule, or one that gives no number from 0 on.
    """
    name = training.schedule
    schedule = SCHEDULES.get(name) or _found("training.schedule", name)
    try:
        factor = float(schedule(round_index, training.rounds))
    except Exception as error:  # whatever it raises
        raise ConfigError(
            f"training.schedule: {name!r} fails for round {round_index} of {training.rounds} "
            f"({type(error).__name__}: {error}); expected a function of (rounds done, rounds) that "
            "gives a factor"
        ) from error
    if not 0 <= factor < math.inf:
        raise ConfigError(
            f"training.schedule: {name!r} gives {factor} for round {round_index}; expected a "
            "number from 0 on"
        )
    return factor


def _found(key: str, name: str) -> Callable[..., Any]:
    """The function of "module:function", given in this process or imported."""
    found = given_object(name)
    try:
        found = imported(name) if found is None else found
    except ImportError as error:
        raise ConfigError(f"{key} {name!r}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{key}: {name!r} is a {type(found).__name__}, expected a function")
    return found  # type: ignore[no-any-return]
