"""The one gate for replies: what a client claims is compared with what is known of it.

Whatever passes may be folded into sums in any order; whatever does not is refused as a whole,
before any part of it has touched one. A client that stays within these bounds can still send
values that help nobody: against that, its weight is bounded, not its honesty.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import numpy as np

from fedprune.errors import DIVERGED, ClientError
from fedprune.exchange.messages import MODEL, SPEC, ClientInfo, Reply, Request, client_info
from sparsemodel.runtime.fixed_sum import MAX_ABSOLUTE_VALUE, MAX_TOTAL_WEIGHT
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import SparseState, Tensors

MAX_GROWTH = 10.0  # of a model's norm in one client's training
MAX_HELD_BYTES = 2**44  # that a client's process may say it holds


class Clients(Mapping[int, ClientInfo]):
    """The clients that have joined; of one that holds exactly its share no copy is kept.

    Args:
        shares: as of `Gate`.
    """

    def __init__(self, shares: Mapping[int, ClientInfo], num_clients: int) -> None:
        self._shares = shares
        self._joined = np.zeros(num_clients, bool)
        self._own: dict[int, ClientInfo] = {}

    def take(self, client: int, info: ClientInfo | None) -> None:
        """One has joined, with its share (None) or whatever it holds."""
        self._joined[client] = True
        self._own.pop(client, None)
        if info is not None:
            self._own[client] = info

    def has_own(self, client: int) -> bool:
        """Whether a client holds something else than its share."""
        return client in self._own

    def __getitem__(self, client: int) -> ClientInfo:
        if client not in self:
            raise KeyError(client)
        return self._own[client] if client in self._own else self._shares[client]

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self._joined).tolist())

    def __len__(self) -> int:
        return int(np.count_nonzero(self._joined))

    def __contains__(self, client: object) -> bool:
        return isinstance(client, int) and bool(self._joined[client : client + 1].any())


class Gate:
    """What is known of the clients, and what is therefore believed of their answers.

    Args:
        num_clients: of the run.
        num_classes: of the data; 1 where samples have no classes.
        shares: client -> what the run gave it, looked up when it is needed; empty where it is not
            known.
        own_data: whether a client may bring other samples than its share.
        max_share: of one round's samples that a client with samples of its own may stand for.
        with_labels: whether clients tell how many samples of each class they have.
        equal_weights: whether every client counts for 1 in a mean.

    Attributes:
        clients: what is believed of each that has joined.
    """

    def __init__(
        self,
        *,
        num_clients: int,
        num_classes: int,
        shares: Mapping[int, ClientInfo],
        own_data: bool,
        max_share: float,
        with_labels: bool = True,
        equal_weights: bool = False,
    ) -> None:
        self._num_clients, self._num_classes = num_clients, num_classes if with_labels else 0
        self._equal_weights = equal_weights
        self._shares, self._own_data, self._max_share = shares, own_data, max_share
        self.clients = Clients(shares, num_clients)

    def admit(self, reply: Reply) -> ClientInfo:
        """Who a node says that it is; `know` holds it to that.

        Raises:
            ClientError: no client of this run can be that.
        """
        info = client_info(reply)
        if set(reply.fields) != {"client", "dev", "test", "labels"} or not _holds_no_arrays(reply):
            raise ClientError("a description holds client, dev, test and labels, no more")
        if info.client >= self._num_clients:
            raise ClientError(
                f"it says that it is client {info.client}: expected 0 to {self._num_clients - 1}"
            )
        if len(info.label_histogram) != self._num_classes:
            raise ClientError(
                f"counts of {len(info.label_histogram)} classes: expected {self._num_classes}"
            )
        total, most = info.num_train + info.num_dev, MAX_TOTAL_WEIGHT // self._num_clients
        labels = sum(info.label_histogram) if self._num_classes else total
        if labels != total or total > most or info.num_test > most:
            raise ClientError(
                f"{info.num_train} samples for training and {info.num_dev} for development, and "
                f"{labels} labels: expected equal sums, at most {most}"
            )
        share = self._shares.get(info.client)
        if share is not None and not self._own_data and info != share:
            raise ClientError(
                f"client {info.client} has other samples than its share: it says "
                f"{info.num_train} and {info.num_dev}, the run gave it {share.num_train} and "
                f"{share.num_dev}"
            )
        return info

    def know(self, info: ClientInfo) -> None:
        """What a client is believed to be from now on."""
        share = self._shares.get(info.client)
        self.clients.take(info.client, None if info == share else info)

    def introduce(self, client: int) -> None:
        """A client joins that need not say what it holds: its share."""
        self.clients.take(client, None)

    def weights(self, clients: Collection[int], *, on: str) -> dict[int, int]:
        """What each of these clients counts for in a mean over all of them: at least 0.

        As many as the samples it announced; one with samples of its own at most `max_share` of
        them all, as far as that can be.
        """
        if self._equal_weights:
            return dict.fromkeys(clients, 1)
        samples = {c: self.clients[c].samples(on) for c in clients}
        own = [c for c in clients if self.clients.has_own(c)]
        return capped(samples, own, self._max_share)

    def check(self, client: int, reply: Reply, request: Request, weight: int) -> Reply:
        """The reply, with its weight.

        Args:
            weight: what the client counts for, of `weights`.

        Raises:
            ClientError: it holds more or less than was asked for, or what cannot be.
        """
        expected = self.clients[client].samples(request.on)
        if reply.num_examples != expected or expected < 1:
            raise ClientError(
                f"a reply for {reply.num_examples} samples, and the client has {expected}"
            )
        if reply.resources is not None:
            held = reply.resources
            if not request.report_resources or max(held.state_bytes, held.peak_rss_bytes) > (
                MAX_HELD_BYTES
            ):
                raise ClientError("an account of memory that was not asked for, or cannot be")
        if bool(reply.masked) != (SPEC in request.fields):
            raise ClientError("an answer under masks that was not asked for, or one without")
        check_parts(reply, request)
        request.check(reply)
        return replace(reply, weight=weight)


def capped(samples: Mapping[int, int], own: Collection[int], max_share: float) -> dict[int, int]:
    """Samples, those of `own` cut so that none of them is more than `max_share` of the sum.

    Where that cannot be, the sum being theirs alone, they stay as they are.

    >>> capped({0: 10, 1: 20, 2: 900}, [2], 0.5)
    {0: 10, 1: 20, 2: 30}
    >>> capped({0: 900}, [0], 0.5)
    {0: 900}
    """
    largest = sorted(own, key=lambda client: (-samples[client], client))
    for number in range(1, len(largest) + 1):
        cut = largest[:number]
        rest = sum(count for client, count in samples.items() if client not in cut)
        free = 1 - number * max_share
        if rest == 0 or free <= 0:
            break
        cap = max(1, int(max_share * rest / free))
        if number == len(largest) or samples[largest[number]] <= cap:
            return {c: min(n, cap) if c in cut else n for c, n in samples.items()}
    return dict(samples)


def check_parts(reply: Reply, request: Request) -> None:
    """Raise ClientError unless a reply holds what `request` expects, with values that can be."""
    expected = request.expected
    parts = (
        ("fields", reply.fields, {*expected.fields, *expected.sums}),
        ("states", reply.states, expected.states),
        ("tensors", reply.tensors, expected.tensors),
        ("masks", reply.masks, expected.masks),
    )
    for what, held, wanted in parts:
        if set(held) != set(wanted):
            raise ClientError(f"expected {what} {_few(wanted)}, got {_few(held)}")
    for name, tensors in reply.tensors.items():
        if set(tensors) != set(expected.tensors[name]):
            raise ClientError(
                f"tensors {name!r}: expected {_few(expected.tensors[name])}, got {_few(tensors)}"
            )
        _check_values(tensors)
    for name, mask in reply.masks.items():
        _check_mask(mask, expected.masks[name])
    for name, state in reply.states.items():
        if expected.norm:
            _check_update(state, expected.norm)
        else:
            _check_state(state, request.states[name])
    for name, entries in reply.entries.items():
        most = expected.growth if name == MODEL else {}
        for layer, (indices, _) in entries.items():
            if len(indices) > most.get(layer, 0):
                raise ClientError(f"growth entries of {layer!r} were not asked for, or too many")
        _check_values({layer: values for layer, (_, values) in entries.items()})


def _check_mask(mask: Patterns, most: Mapping[str, int]) -> None:
    if set(mask) != set(most):
        raise ClientError(f"a mask of {_few(mask)}: expected {_few(most)}")
    for name, pattern in mask.items():
        if pattern.num_active > most[name]:
            raise ClientError(
                f"a mask keeps {pattern.num_active} of {name!r}: at most {most[name]}"
            )


def _check_state(state: SparseState, before: SparseState) -> None:
    """Statistics that can be, and weights that training in its senses reaches from `before`."""
    _check_values({n: value for n, value in state.values.items() if is_statistic(n)})
    norm, start = _norm(state.values), _norm(before.values)
    if not norm <= MAX_GROWTH * (start + 1):
        raise ClientError(f"weights of norm {norm:.3g} after {start:.3g}: {DIVERGED}")


def _check_update(update: SparseState, most: float) -> None:
    squares = (float(np.vdot(v, v)) for v in map(np.float64, update.values.values()))
    norm = sum(squares) ** 0.5
    if not norm <= most:
        raise ClientError(f"an update of norm {norm:.6g}: expected at most {most:.6g}")


def _check_values(tensors: Tensors) -> None:
    for name, value in tensors.items():
        size = np.abs(value)
        if name.endswith("running_var"):
            if value.size and value.min() < 0:
                raise ClientError(f"{name!r} holds a negative variance, {value.min():.3g}")
            # What is added up is the second moment.
            mean = tensors.get(f"{name.removesuffix('running_var')}running_mean")
            size = value if mean is None else value + np.square(mean, dtype=np.float64)
        if not np.isfinite(size).all():
            raise ClientError(f"{name!r} holds NaN or infinite values: {DIVERGED}")
        if size.size and size.max() >= MAX_ABSOLUTE_VALUE:
            raise ClientError(
                f"{name!r} holds a value of magnitude {size.max():.3g}, beyond "
                f"{MAX_ABSOLUTE_VALUE:.3g}: {DIVERGED}"
            )


def _norm(values: Tensors) -> float:
    """The Euclidean norm of all weights; statistics are none."""
    squares = (
        float(np.vdot(value, value)) for name, value in values.items() if not is_statistic(name)
    )
    return float(sum(squares) ** 0.5)


def is_statistic(name: str) -> bool:
    """Whether a tensor of a state is a batch norm's running mean or variance."""
    return name.endswith(("running_mean", "running_var"))


def _holds_no_arrays(reply: Reply) -> bool:
    parts = (reply.states, reply.entries, reply.tensors, reply.masks, reply.resources)
    return not any(parts)


def _few(names: Collection[str]) -> str:
    listed = sorted(names)
    return f"{str(listed[:5])[:200]}{' ...' if len(listed) > 5 else ''}"
