"""What a federated method is: its settings, a server half and a client half, all pure.

A method is a frozen dataclass of its settings. Its server half are the hooks of the round loop on
a plain, serialisable state; its client half are functions by name that answer the server's
questions from a client's own data. Neither knows transport, files or clocks.

This file is imported by clients that have no torch: server halves import it inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.messages import MODEL, Expected, Reply, Request, loss
from fedprune.exchange.pooled import Pooled, Pooler, check_numbers, pooled
from fedprune.exchange.robust import MEAN, Aggregation
from fedprune.local.training import train
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState

if TYPE_CHECKING:
    from torch import nn

    from fedprune.local.site import Local

Action = Callable[[Request, "Local"], Reply]
"""A function of a client half: (request, the client's data and model) -> reply."""


@dataclass(frozen=True)
class RunState:
    """All that a run needs to go on after a stop; written to the checkpoint each round.

    Attributes:
        round_index: rounds completed.
        model: the global model's float state, active values only.
        memory: JSON values that the method keeps for itself.
        notes: JSON values that the report shows (the candidates and the winner, say).
        kept: states of layers of the model that the method keeps for itself, by name.
    """

    round_index: int
    model: SparseState
    memory: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    kept: Mapping[str, SparseState] = field(default_factory=dict)


class Collector(Protocol):
    """Makes one of the answers of a round, one at a time, in whatever order they come."""

    def add(self, client: int, reply: Reply) -> None:
        """Take one checked reply; its `weight` is what it counts for.

        Raises:
            ClientError: it cannot be used; nothing has changed then.
        """
        ...

    def result(self) -> Pooled:
        """All that were taken; at least its `model` or what `Method.update` needs instead."""
        ...


class Ask(Protocol):
    """Send `request` to every client and yield (client, reply) as replies arrive."""

    def __call__(self, request: Request) -> Iterator[tuple[int, Reply]]: ...


def _nowhere() -> Local:
    raise AssertionError("this start was made without the server's samples")


class AskSome(Protocol):
    """Send `request` to some clients, at most as many as a round has, drawn by the run's seed.

    Args:
        among: those that may be asked.
    """

    def __call__(
        self, request: Request, *, among: Collection[int]
    ) -> Iterator[tuple[int, Reply]]: ...


class Tested(Protocol):
    """Means over test samples."""

    @property
    def loss(self) -> float: ...

    @property
    def metric(self) -> float: ...


Test = Callable[[Program, SparseState], Tested | None]
"""How a network of another program does on the server's test samples; None: it has none."""


@dataclass(frozen=True)
class Start:
    """What the server half has to begin with.

    Attributes:
        state: gives the dense model after brief pre-training on the server's few labelled
            samples; every method starts from the same one.
        prunable: shapes of the parameters that may be pruned.
        blocks: granularity -> those parameters in groups from the input to the output.
        ask: reaches the clients.
        rounds: of the whole run.
        seed: of the run.
        metric: what the task's metric is called: "accuracy" of classes; "": there is none.
        aggregation: makes one of what clients answer, as the run's settings say.
        pooler: adds up answers where single ones are not to be seen; then `ask` fails.
        place: gives the server's own place, as a client has one: its labelled samples are
            `data.train`, and `network` builds the network with torch.
        num_clients: of the run.
        program: of the network; None where it has none, for the reason `no_program`.
    """

    state: Callable[[], SparseState]
    prunable: Mapping[str, tuple[int, ...]]
    blocks: Mapping[str, list[list[str]]]
    ask: Ask
    rounds: int
    seed: int
    metric: str = "accuracy"
    aggregation: Aggregation = MEAN
    pooler: Pooler | None = None
    place: Callable[[], Local] = _nowhere
    num_clients: int = 0
    program: Program | None = None
    no_program: str = ""

    def pooled(self, request: Request) -> Pooled:
        """Every client's answer added up: all that a method has under secure aggregation."""
        if self.pooler is not None:
            return self.pooler(request)

        def check(reply: Reply) -> None:
            check_numbers(reply, request.expected)
            request.check(reply)

        asked = dataclasses.replace(request, check=check)
        return pooled(self.ask(asked), request.expected, aggregation=self.aggregation)


class Builder(Protocol):
    """Builds the run's network, dense, the same bits every time."""

    def __call__(self, *, width: int | None = None) -> nn.Module: ...


class WidthRule(Protocol):
    """The largest width of the run's network whose float state takes at most so many bytes."""

    def __call__(self, max_bytes: int) -> int: ...


@dataclass(frozen=True)
class Method:
    """Dense federated averaging, which prunes nothing.

    Other methods override what they change.

    Raises:
        ConfigError: a setting is out of its range; one message with every problem.
    """

    name: ClassVar[str] = "fedavg"
    actions: ClassVar[Mapping[str, Action]] = {"train": train}
    collects: ClassVar[bool] = False
    """Whether `collector` gives one."""

    def __post_init__(self) -> None:
        problems = [f"method.{problem}" for problem in self.problems()]
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def target_density(self) -> float:
        """The share of prunable weights that the method aims to keep."""
        return float(getattr(self, "density", 1.0))

    def settings(self) -> dict[str, Any]:
        """Name -> value of each setting, in order."""
        return dataclasses.asdict(self)

    def used(self, rounds: int) -> dict[str, Any]:
        """The settings as a run of so many rounds uses them: nothing is left to be worked out."""
        return self.settings()

    def problems(self) -> Iterable[str]:
        """Every reason why these settings cannot be used, each beginning with a setting's name."""
        density = self.target_density
        if not 0 < density <= 1:
            yield f"density: expected 0 < density <= 1, got {density}"

    def unaccounted(self) -> Iterable[str]:
        """Every reason why differential privacy does not cover what the method asks of clients."""
        others = sorted(set(self.actions) - {"train"})
        if others:
            yield (
                f"{self.name} asks clients for {', '.join(others)}, and privacy.dp covers training "
                "alone; use a method that does not, such as magnitude"
            )

    def build_model(self, build: Builder, widest: WidthRule) -> nn.Module:
        """The network of this run.

        Args:
            build: the full dense network that savings are measured against, or another width.
            widest: for a narrower one of at most so many bytes.
        """
        return build()

    def start(self, server: Start) -> RunState:
        """The state before the first round."""
        return RunState(round_index=0, model=server.state())

    def request(self, state: RunState) -> Request:
        """What the coming round asks of its clients."""
        return train_request(state)

    def collector(self, state: RunState) -> Collector | None:
        """What makes one of a round's answers in the method's own way; None: as the run says.

        A method with a collector sees single answers, so that it refuses secure aggregation and
        robust rules (see `collects`).
        """
        return None

    def personal(self, state: RunState) -> Callable[[int], SparseState] | None:
        """client -> the model that it tests on samples of its own; None: all the global one."""
        return None

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        """The state after a round.

        Args:
            pooled: the clients' answers made one: `pooled.model`, their weighted mean under the
                patterns of `state`; `pooled.growth`, the mean of the entries that they sent at
                pruned places; `pooled.tensors`, of whatever the question asked for besides.
        """
        model = pooled.model
        return dataclasses.replace(state, round_index=state.round_index + 1, model=model)

    def networks(self, request: Request, program: Program) -> list[Program]:
        """What a client holds at once to answer, where a device has a budget of memory.

        Args:
            program: of the question's network, which is the first of them. With more, they share
                weights, gradients and momentum that are held besides.

        Raises:
            ClientError: the question makes no sense.
        """
        return [program]

    def settle(self, state: RunState, ask: AskSome) -> RunState:
        """The state after clients were asked of the model that a round has made.

        Args:
            state: of `update`.
            ask: reaches clients; of the answers nothing may depend on the order in which they come.
        """
        return state

    def account(self, state: RunState, test: Test) -> dict[str, Any]:
        """What the summary of a run says besides, once it is over.

        Args:
            test: for the record: there is nothing left that it could decide.
        """
        return {}


def train_request(
    state: RunState,
    *,
    fields: Mapping[str, Any] | None = None,
    growth: Mapping[str, int] | None = None,
) -> Request:
    """The question "train the model on your samples".

    Args:
        fields: what the method's own client half needs besides.
        growth: layer -> how many of the largest gradients at pruned weights to send back.
    """
    wanted = dict(growth or {})
    fields = dict(fields or {})
    if wanted:
        assert state.model.patterns is not None, "growth is at pruned places"
        order = list(state.model.patterns)
        fields["grow"] = [[order.index(name), count] for name, count in wanted.items()]

    return Request(
        "train",
        state.round_index,
        fields,
        states={MODEL: state.model},
        expected=Expected(fields=["loss"], states=[MODEL], growth=wanted),
        check=_check_loss,
    )


def _check_loss(reply: Reply) -> None:
    loss(reply.fields, "loss")


def not_negative(reply: Reply, name: str) -> None:
    """Raise ClientError where a reply's tensors of that name, sizes or squares, are below 0."""
    for layer, value in reply.tensors[name].items():
        if value.size and value.min() < 0:
            raise ClientError(f"{name} of {layer!r}: expected 0 or more, got {value.min():.3g}")
