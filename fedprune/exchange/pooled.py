"""Several clients' answers to one question, added up: where no single one counts.

The sums are those of `aggregate.py`: integers, whose order does not matter. They can be read as one
long vector of numbers and made of one, so that clients can add them up under masks
(fedprune/privacy) to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprune.errors import ClientError
from fedprune.exchange.aggregate import EntryMean, StateMean, WeightedMean
from fedprune.exchange.messages import MODEL, Expected, Reply, Request, Resources, number
from fedprune.exchange.robust import MEAN, Aggregation
from sparsemodel.runtime.fixed_sum import MAX_ABSOLUTE_VALUE
from sparsemodel.runtime.state import Entries, SparseState, Tensors

MOST = MAX_ABSOLUTE_VALUE - 1  # of a mean loss: beyond it a model is no candidate for anything


@dataclass(frozen=True)
class Pooled:
    """Means over clients, each weighted by what it counts for.

    Attributes:
        clients: whose answers are in it, ascending.
        weight: what they count for together.
        fields: numbers and lists of numbers; of sums over samples the mean of a sample.
        states: under the request's patterns; statistics of batch norms are pooled.
        tensors: dictionaries of whole tensors of the model.
        growth: entries of the model at pruned places; one that a client did not send is 0 there.
        resources: the largest of each that a client holds.
    """

    clients: Sequence[int]
    weight: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    states: Mapping[str, SparseState] = field(default_factory=dict)
    tensors: Mapping[str, Tensors] = field(default_factory=dict)
    growth: Entries = field(default_factory=dict)
    resources: Resources | None = None

    @property
    def model(self) -> SparseState:
        """The clients' mean model."""
        return self.states[MODEL]

    def with_model(self, model: SparseState) -> Pooled:
        """The same with another model."""
        return replace(self, states={**self.states, MODEL: model})


Pooler = Callable[[Request], Pooled]
"""Ask every client and add up the answers; of none, a Pooled of no clients."""


def pooled(
    replies: Iterable[tuple[int, Reply]], expected: Expected, *, aggregation: Aggregation = MEAN
) -> Pooled:
    """Checked replies made one: added up as they arrive, or as an aggregation says."""
    if aggregation.kind != "mean":
        return _aggregated(dict(replies), expected, aggregation)
    sums, clients, resources = Sums(expected.sums), [], []
    for client, reply in replies:
        sums.add(reply)
        clients.append(client)
        resources.append(reply.resources)
    return sums.result(clients, largest(resources))


def _aggregated(
    replies: Mapping[int, Reply], expected: Expected, aggregation: Aggregation
) -> Pooled:
    """All replies at once, for rules that need them so."""
    if not replies:
        return Pooled([], 0)
    clients = sorted(replies)
    ordered = [replies[client] for client in clients]
    weights = [reply.weight for reply in ordered]
    samples = [reply.num_examples for reply in ordered]

    def one(held: Sequence[SparseState]) -> SparseState:
        states = aggregation.states()
        for state, weight in zip(held, weights, strict=True):
            states.add(state, weight=weight)
        return states.result()

    def mean(name: str, place: int) -> float:
        values = [_listed(reply.fields[name])[place] for reply in ordered]
        if name not in expected.sums:
            values = [value * count for value, count in zip(values, samples, strict=True)]
        return aggregation.mean_of(values, samples=samples, weights=weights)

    fields: dict[str, Any] = {}
    for name, value in ordered[0].fields.items():
        means = [mean(name, place) for place in range(len(_listed(value)))]
        fields[name] = means if isinstance(value, list) else means[0]
    growth = aggregation.entries()
    for reply in ordered:
        growth.add(reply.entries.get(MODEL, {}), weight=reply.weight)
    return Pooled(
        clients,
        sum(weights),
        fields,
        {name: one([reply.states[name] for reply in ordered]) for name in ordered[0].states},
        {
            name: one([SparseState(reply.tensors[name]) for reply in ordered]).values
            for name in ordered[0].tensors
        },
        growth.result(),
        largest(reply.resources for reply in ordered),
    )


def check_numbers(reply: Reply, expected: Expected) -> None:
    """Raise ClientError unless a reply's fields can be added up: one number, or the list of them
    that a sum has."""
    for name, length in {**dict.fromkeys(expected.fields, 0), **expected.sums}.items():
        value = reply.fields[name]
        if isinstance(value, list) != bool(length) or len(_listed(value)) != max(1, length):
            raise ClientError(
                f"field {name!r}: expected {f'a list of {length}' if length else 'a number'}, "
                f"got {value!r:.60}"
            )
        for each in _listed(value):
            number({name: each}, name)


class Sums:
    """Running sums of everything that replies to one question hold.

    Args:
        per_sample: fields that are sums over a client's samples: name -> numbers in a list of
            them; 0: no list.
        updates: as of `StateMean`.
    """

    def __init__(self, per_sample: Mapping[str, int], *, updates: bool = False) -> None:
        self._per_sample, self._updates = per_sample, updates
        self._states: dict[str, StateMean] = {}
        self._tensors: dict[str, StateMean] = {}
        self._fields = WeightedMean()
        self._lists: set[str] = set()
        self._growth = EntryMean()
        self._weight = 0

    def add(self, reply: Reply) -> None:
        """Fold in one reply.

        Raises:
            ClientError: a value is not finite or too large, a field holds no numbers.
        """
        for means, held in (
            (self._states, reply.states),
            (self._tensors, {n: SparseState(some) for n, some in reply.tensors.items()}),
        ):
            for name, state in held.items():
                mean = means.setdefault(name, StateMean(updates=self._updates))
                mean.add(state, weight=reply.weight)
        numbers = {name: self._numbers(name, reply) for name in reply.fields}
        self._lists |= {name for name in numbers if isinstance(reply.fields[name], list)}
        if numbers:
            self._fields.add(numbers, weight=reply.weight)
        self._growth.add(reply.entries.get(MODEL, {}), weight=reply.weight)
        self._weight += reply.weight

    def words(self) -> NDArray[np.uint64]:
        """All sums but those of growth, as numbers modulo 2^64."""
        parts = [
            means[name].words() for means in (self._states, self._tensors) for name in sorted(means)
        ]
        return np.concatenate([*parts, self._fields.words()])

    @property
    def growth(self) -> EntryMean:
        """The sums of growth entries."""
        return self._growth

    def take(
        self,
        words: NDArray[np.uint64],
        like: Layout,
        *,
        width: int,
        weight: int,
        num_replies: int,
    ) -> None:
        """Begin with sums that were made elsewhere: their `words`."""
        start = 0
        for means, states in ((self._states, like.states), (self._tensors, like.tensors)):
            for name in sorted(states):
                end = start + _words_of(states[name].values)
                means[name] = mean = StateMean(updates=self._updates)
                mean.take(
                    states[name], words[start:end], width=width, weight=weight, replies=num_replies
                )
                start = end
        shapes = {name: (max(1, count),) for name, count in like.fields.items()}
        self._fields.take(
            shapes, words[start:], width=width, weight=weight, num_replies=num_replies
        )
        self._lists = {name for name, count in like.fields.items() if count}
        self._weight = self._growth.total_weight = weight

    def result(self, clients: Sequence[int], resources: Resources | None = None) -> Pooled:
        """The means."""
        if not clients:
            return Pooled([], 0)
        fields = {}
        for name in self._fields.names:
            means = self._fields.sum_of(name).mean(self._weight).tolist()
            fields[name] = means if name in self._lists else means[0]
        return Pooled(
            sorted(clients),
            self._weight,
            fields,
            {name: mean.result() for name, mean in self._states.items()},
            {name: mean.result().values for name, mean in self._tensors.items()},
            self._growth.result(),
            resources,
        )

    def _numbers(self, name: str, reply: Reply) -> NDArray[np.float64]:
        found = np.array([number({name: each}, name) for each in _listed(reply.fields[name])])
        samples = reply.num_examples if name in self._per_sample else 1
        return np.clip(found / samples, -MOST, MOST)


@dataclass(frozen=True)
class Layout:
    """What the replies to a question hold, so that their sums can be read from one vector.

    Attributes:
        states, tensors: of those names and shapes, whatever their values.
        fields: name -> numbers in a list; 0: no list.
    """

    states: Mapping[str, SparseState]
    tensors: Mapping[str, SparseState]
    fields: Mapping[str, int]

    @classmethod
    def of(cls, request: Request, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """What the answers to a question hold.

        Args:
            shapes: of the model's tensors.
        """
        expected = request.expected
        shapes = {**shapes, **expected.shapes}
        blank = {
            key: SparseState({n: np.broadcast_to(np.float32(0), shapes[n]) for n in names})
            for key, names in expected.tensors.items()
        }
        states = {name: request.states[name] for name in expected.states}
        return cls(states, blank, {**dict.fromkeys(expected.fields, 0), **expected.sums})

    def num_words(self) -> int:
        """How many numbers the sums are."""
        states = [*self.states.values(), *self.tensors.values()]
        numbers = sum(max(1, count) for count in self.fields.values())
        return sum(_words_of(state.values) for state in states) + 2 * numbers


def largest(resources: Iterable[Resources | None]) -> Resources | None:
    """The largest of each that any of them names."""
    known = [some for some in resources if some is not None]
    if not known:
        return None
    return Resources(
        max(some.state_bytes for some in known), max(some.peak_rss_bytes for some in known)
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _words_of(values: Mapping[str, NDArray[Any]]) -> int:
    return 2 * sum(value.size for value in values.values())
