"""What server and clients say to each other: a named question, and its answer.

A method gives its questions names and says what they carry; `flower/wire.py` turns them into
Flower's records and back. Everything else only sees these.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedprune.errors import DIVERGED, ClientError
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import Entries, SparseState, Tensors

Fields = Mapping[str, Any]
"""Small values that JSON can carry: numbers, text, lists and dictionaries of them."""

MODEL = "model"
"""The name under which the global model travels, and its growth entries."""

SPEC = "secure"
"""The field of a request that asks for an answer under masks (fedprune/privacy/vector.py)."""


@dataclass(frozen=True)
class Resources:
    """What a client's process held: bytes of its state, and the peak of its resident memory."""

    state_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True)
class Reply:
    """A client's answer.

    Attributes:
        num_examples: the samples that it stands for.
        states: states by name; one that the request has too is under the request's patterns.
        entries: for states of the request: single entries at pruned places.
        tensors: dictionaries of whole tensors, by name: of the model, or as `Expected.shapes` says.
        masks: masks of layers of the model, by name; any layers, whatever the request's mask is.
        masked: all of it under masks (fedprune/privacy); the rest is empty then.
        weight: what it counts for in whatever is averaged; the server says (gate.py), and by
            default it is `num_examples`. It does not travel.
    """

    num_examples: int
    fields: Fields = field(default_factory=dict)
    states: Mapping[str, SparseState] = field(default_factory=dict)
    entries: Mapping[str, Entries] = field(default_factory=dict)
    tensors: Mapping[str, Tensors] = field(default_factory=dict)
    masks: Mapping[str, Patterns] = field(default_factory=dict)
    resources: Resources | None = None
    masked: bytes = b""
    weight: int = -1

    def __post_init__(self) -> None:
        if self.weight < 0:
            object.__setattr__(self, "weight", self.num_examples)


@dataclass(frozen=True)
class Expected:
    """What a reply holds; one that holds anything else is refused.

    Attributes:
        fields, states: their names; a state is under the request's patterns of that name.
        sums: fields that are sums over the client's samples: name -> how many numbers a list of
            them has; 0: it is one number, no list.
        tensors: name of each dictionary -> the tensors in it.
        shapes: of those tensors that have another shape than the model's of that name, or none
            there.
        masks: name of each mask -> layer -> active weights at most.
        growth: layer -> how many entries at pruned places of the model at most.
        norm: where positive, states are updates, of at most that norm, and not weights.
    """

    fields: Collection[str] = ()
    states: Collection[str] = ()
    sums: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, Collection[str]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    masks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    growth: Mapping[str, int] = field(default_factory=dict)
    norm: float = 0.0


@dataclass(frozen=True)
class Request:
    """One question to clients.

    Attributes:
        action: which function of the method's client half answers.
        round_index: rounds completed before it.
        fields: small values.
        states: states by name, each under its patterns; a client that holds the patterns is sent
            the values alone.
        tensors: dictionaries of whole tensors of the model, by name.
        masks: masks of layers of the model, by name, whatever the model's mask is.
        hold: names of states whose values the clients keep until the next request, which then
            need not bring them again.
        report_resources: whether clients say what they hold.
        expected: what a reply holds. It does not travel.
        on: which of its samples a client's reply stands for: "train", "dev" or "test". It does
            not travel.
        check: refuses, with ClientError, a reply whose fields do not answer it. It does not
            travel.
        forward_passes: for the account of operations: of each pass over the samples `on` that the
            answer takes, layer -> active weights; a layer without is dense. It does not travel.
        batch_passes: the same of each pass over a mini-batch of training samples, of which a step
            takes three. It does not travel.
        program: of the network that the question is about, where it is not the run's.
        macs: for the account: multiply-accumulates of a forward pass of one sample, where they
            are not those of the model under its mask. It does not travel.
        personal: client -> what it is asked instead; who is asked the same should get the same
            object, which is encoded once. It does not travel.
        num_clients: how many clients a question before the first round asks, drawn by the seed;
            0: all. It does not travel.
    """

    action: str
    round_index: int = 0
    fields: Fields = field(default_factory=dict)
    states: Mapping[str, SparseState] = field(default_factory=dict)
    tensors: Mapping[str, Tensors] = field(default_factory=dict)
    masks: Mapping[str, Patterns] = field(default_factory=dict)
    hold: frozenset[str] = frozenset()
    report_resources: bool = False
    expected: Expected = Expected()
    on: str = "train"
    check: Callable[[Reply], None] = lambda reply: None
    forward_passes: Sequence[Mapping[str, int]] = ()
    batch_passes: Sequence[Mapping[str, int]] = ()
    program: Program | None = None
    macs: int = 0
    personal: Callable[[int], Request] | None = None
    num_clients: int = 0

    def of_each(self, clients: Iterable[int]) -> dict[int, Request]:
        """What each client is asked; those who are asked the same have the same object."""
        if self.personal is None:
            return dict.fromkeys(clients, self)
        found: dict[int, tuple[Request, Request]] = {}  # by identity; the first keeps it alive
        asked = {}
        for client in clients:
            own = self.personal(client)
            if id(own) not in found:
                told = replace(
                    own, report_resources=self.report_resources, hold=own.hold | self.hold
                )
                found[id(own)] = own, told
            asked[client] = found[id(own)][1]
        return asked

    def state(self, name: str) -> SparseState:
        """One of its states.

        Raises:
            ClientError: it has no such state.
        """
        if name not in self.states:
            raise ClientError(
                f"{self.action!r} came without its {name!r}; it has {list(self.states)}"
            )
        return self.states[name]


@dataclass(frozen=True)
class ClientInfo:
    """Who a client is and what it holds.

    Attributes:
        label_histogram: of the samples for training and development.
        num_test: samples that it keeps for testing; 0 where the server has some.
    """

    client: int
    num_train: int
    num_dev: int
    label_histogram: list[int]
    num_test: int = 0

    def samples(self, on: str) -> int:
        """How many it has of one use: "train", "dev" or "test"."""
        return {"train": self.num_train, "dev": self.num_dev, "test": self.num_test}[on]


MAX_LOSS = 2.0**40
"""Mean loss beyond which a model is no candidate for anything; sums of it are finite."""

DESCRIBE = "describe"
"""The question that every client answers, whatever the method: its ClientInfo."""


EVALUATE = "evaluate"
"""The question how the model does on a client's own test samples, which every client answers."""


def describe_reply(info: ClientInfo) -> Reply:
    """A client's answer to DESCRIBE."""
    fields = {
        "client": info.client,
        "dev": info.num_dev,
        "test": info.num_test,
        "labels": info.label_histogram,
    }
    return Reply(info.num_train, fields)


def client_info(reply: Reply) -> ClientInfo:
    """What a client says of itself.

    Raises:
        ClientError: a field is missing or of another kind.
    """
    labels = reply.fields.get("labels")
    if not isinstance(labels, list):
        raise ClientError(f"field 'labels': expected a list of counts, got {labels!r:.60}")
    return ClientInfo(
        client=count(reply.fields, "client"),
        num_train=reply.num_examples,
        num_dev=count(reply.fields, "dev"),
        num_test=count(reply.fields, "test"),
        label_histogram=counts(reply.fields, "labels", len(labels)),
    )


# --- fields, checked ---------------------------------------------------------------------------


def count(fields: Fields, key: str) -> int:
    """A field that is a whole number, 0 or more.

    Raises:
        ClientError: it is not.
    """
    value = fields.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise ClientError(f"field {key!r}: expected a whole number, 0 or more, got {value!r:.60}")
    return value


def number(fields: Fields, key: str) -> float:
    """A field that is a finite number.

    Raises:
        ClientError: it is not.
    """
    value = fields.get(key)
    if not _is_finite(value):
        raise ClientError(f"field {key!r}: expected a finite number, got {value!r:.60}")
    return float(value)  # type: ignore[arg-type]


def counts(fields: Fields, key: str, length: int) -> list[int]:
    """A field that is a list of so many whole numbers, 0 or more.

    Raises:
        ClientError: it is not.
    """
    return [count({key: value}, key) for value in _listed(fields, key, length)]


def loss(fields: Fields, key: str, samples: int = 1) -> float:
    """A field that is a sum of losses: 0 or more, and no more than can be.

    Raises:
        ClientError: it is not.
    """
    value = number(fields, key)
    if not 0 <= value <= MAX_LOSS * samples:
        raise ClientError(
            f"field {key!r}: expected a loss from 0 to {MAX_LOSS:.3g} a sample, got "
            f"{value / max(samples, 1):.3g}: {DIVERGED}"
        )
    return value


def losses(fields: Fields, key: str, length: int, samples: int) -> list[float]:
    """A field that is a list of so many sums of losses over so many samples.

    Raises:
        ClientError: it is not.
    """
    return [loss({key: value}, key, samples) for value in _listed(fields, key, length)]


def metrics(fields: Fields, key: str, length: int, samples: int, *, metric: str) -> list[float]:
    """A field that is a list of so many sums of a metric over so many samples.

    Args:
        metric: what it is called; of "accuracy", whole numbers from 0 to the number of samples.

    Raises:
        ClientError: it is not.
    """
    found = [number({key: value}, key) for value in _listed(fields, key, length)]
    for value in found:
        if metric == "accuracy" and not (0 <= value <= samples and value.is_integer()):
            raise ClientError(f"field {key!r}: {value:g} hits among {samples} samples")
    return found


def _listed(fields: Fields, key: str, length: int) -> list[Any]:
    values = fields.get(key)
    if not isinstance(values, list) or len(values) != length:
        raise ClientError(f"field {key!r}: expected a list of {length}, got {values!r:.60}")
    return values


def _is_finite(value: object) -> bool:
    # JSON's integers have no end; those beyond the floats are as little use as infinity.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
