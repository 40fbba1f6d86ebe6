"""Secure sums over Flower: the steps around a question whose answers come under masks.

The question itself travels as any other (wire.py, server.py); what is here are the small messages
before and after it. They leave alone what a client holds.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from flwr.app import RecordDict

from fedprune.config import RunConfig
from fedprune.errors import ClientError
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import Reply, Request, count
from fedprune.exchange.pooled import Pooled, largest
from fedprune.flower import wire
from fedprune.privacy import secure_sum
from fedprune.privacy.randomness import unpacked
from fedprune.privacy.secure_sum import (
    PUBLIC_BYTES,
    SEALED_BYTES,
    SHARE_BYTES,
    Announced,
    threshold_of,
)
from fedprune.privacy.vector import Spec, num_words, pooled_of

if TYPE_CHECKING:
    from fedprune.rounds.ledger import Traffic

KEYS, SHARES, UNMASK = "secure.keys", "secure.shares", "secure.unmask"
_COMMITMENT_BYTES = 32
_ACTION, _SESSION, _NUM_CLIENTS, _DATA = "a", "s", "n", "k"
_CLIENTS, _WEIGHT, _SURVIVORS = "c", "w", "u"

Header = Mapping[str, Any]

# --- client ------------------------------------------------------------------------------------


def num_clients(header: Header) -> int:
    """How many clients the run has, by a step."""
    return count(header, _NUM_CLIENTS)


def answer(
    header: Header, frames: wire.Frames, kept: dict[str, bytes], *, config: RunConfig, client: int
) -> RecordDict:
    """A client's answer to a step.

    Args:
        kept: what it keeps between messages.

    Raises:
        ClientError: the run has no secure aggregation, or the step is not one that it takes.
    """
    settings, session = config.privacy, header.get(_SESSION)
    known = header[_ACTION] in (KEYS, SHARES, UNMASK)
    if not (settings.secure_aggregation and known and isinstance(session, str)) or (
        len(session) > 200
    ):
        raise ClientError("a step of a secure sum, which this run does not have")
    if header[_ACTION] == KEYS:
        return _record({}, secure_sum.advertise(kept, session, client))
    clients, data = _clients(header, _CLIENTS), frames.get(_DATA, b"")
    if header[_ACTION] == SHARES:
        commitment, sealed = secure_sum.share(
            kept,
            session,
            _cut(data, clients, PUBLIC_BYTES),
            weight=count(header, _WEIGHT),
            at_least=threshold_of(config.clients_per_round, settings.threshold),
            threshold_share=settings.threshold,
        )
        return _record({}, commitment + b"".join(sealed.values()))
    survivors = _clients(header, _SURVIVORS)
    told = secure_sum.unmask(kept, session, survivors, _cut(data, clients, SEALED_BYTES))
    return _record({}, b"".join(told.values()))


# --- server ------------------------------------------------------------------------------------


class Clients(Protocol):
    """Those behind a Grid, as a secure sum sees them; server.py has them."""

    def deliver(
        self, records: Mapping[int, RecordDict], action: str
    ) -> Iterator[tuple[int, wire.Frames]]:
        """Send each client its record and yield what they answer."""
        ...

    def ask(
        self, request: Request, *, clients: list[int] | None = None
    ) -> Iterator[tuple[int, Reply]]:
        """Send to these clients and yield checked replies as they arrive."""
        ...

    def skip(self, client: int, reason: str) -> None:
        """Note that a client's answer could not be used."""
        ...

    def take_traffic(self) -> Traffic:
        """What was sent since the last call."""
        ...

    def count_traffic(self, traffic: Traffic) -> None:
        """Count what was sent."""
        ...


def ask_sum(
    cohort: Clients,
    request: Request,
    *,
    weights: Mapping[int, int],
    num_clients: int,
    shapes: wire.Shapes,
    threshold: float,
    least: int = 1,
) -> Pooled:
    """Ask clients of whom nothing is seen but the sum of their answers.

    Where too few are left at any step it is noted why, and the result has no clients.

    Args:
        weights: client -> what it counts for.
        num_clients: of the run.
        shapes: of the model's tensors.
        threshold: share of the clients, more than which has to stay.
        least: answers below which the sum is not unmasked: asked again, it would be a second one.
    """
    from fedprune.rounds.ledger import stacked  # noqa: PLC0415 - of the server, 1 MiB of clients

    before, sent = cohort.take_traffic(), []
    session = f"{request.action} {request.round_index} {secrets.token_hex(16)}"
    begun = {_SESSION: session, _NUM_CLIENTS: num_clients}
    one = _Sum(
        cohort,
        request,
        begun=begun,
        weights=dict(weights),
        shapes=shapes,
        threshold=threshold,
        least=least,
    )
    try:
        for step in (one.keys, one.shares, one.masked, one.unmask):
            step()
            sent.append(cohort.take_traffic())
        return one.result()
    except ClientError as error:
        cohort.skip(-1, str(error))
        return Pooled([], 0)
    finally:
        cohort.count_traffic(before.joined(stacked([*sent, cohort.take_traffic()])))


class _Sum:
    """One secure sum, step by step."""

    def __init__(
        self,
        cohort: Clients,
        request: Request,
        *,
        begun: Header,
        weights: dict[int, int],
        shapes: wire.Shapes,
        threshold: float,
        least: int,
    ) -> None:
        self._cohort, self._request, self._begun = cohort, request, begun
        self._session = str(begun[_SESSION])
        self._weights, self._shapes, self._share = weights, shapes, threshold
        self._threshold, self._least = threshold_of(len(weights), threshold), least
        self._publics: dict[int, bytes] = {}
        self._sealed: dict[int, dict[int, bytes]] = {}
        self._announced: dict[int, Announced] = {}
        self._survivors: list[int] = []
        self._told: dict[int, dict[int, bytes]] = {}
        self._resources: list[Any] = []

    def keys(self) -> None:
        """Public keys of all."""
        records = dict.fromkeys(self._weights, self._step(KEYS))
        for client, publics in self._answers(records, KEYS, PUBLIC_BYTES):
            try:
                secure_sum.check_publics(publics)
            except ClientError as error:
                self._cohort.skip(client, str(error))
                continue
            self._publics[client] = publics
        self._enough(self._publics, "sent keys")
        self._threshold = threshold_of(len(self._publics), self._share)

    def shares(self) -> None:
        """Shares of their secrets, sealed for each other."""
        everyone = sorted(self._publics)
        data = b"".join(self._publics[client] for client in everyone)
        records = {
            client: self._step(SHARES, data, {_CLIENTS: everyone, _WEIGHT: self._weights[client]})
            for client in everyone
        }
        size = _COMMITMENT_BYTES + SEALED_BYTES * (len(everyone) - 1)
        for client, answered in self._answers(records, SHARES, size):
            others = [other for other in everyone if other != client]
            self._sealed[client] = _cut(answered[_COMMITMENT_BYTES:], others, SEALED_BYTES)
            self._announced[client] = Announced(
                self._publics[client], commitment=answered[:_COMMITMENT_BYTES]
            )
        self._enough(self._announced, "shared their secrets")

    def masked(self) -> None:
        """The question, and the sum of the answers with all masks."""
        clients = sorted(self._announced)
        weight = sum(self._weights[client] for client in clients)
        spec = Spec.of(self._request, self._session, clients, total_weight=weight)
        size = num_words(self._request, spec, self._shapes)
        self._spec, self._total = spec, np.zeros(size, np.uint64)
        for client, reply in self._cohort.ask(spec.asked(self._request), clients=clients):
            if len(reply.masked) != size * spec.width:
                self._cohort.skip(
                    client, f"{len(reply.masked)} bytes under masks, {size * spec.width} expected"
                )
                continue
            self._total += unpacked(reply.masked, spec.width)
            self._survivors.append(client)
            self._resources.append(reply.resources)
        self._survivors.sort()
        self._enough(self._survivors, "sent their vector", least=self._least)

    def unmask(self) -> None:
        """Shares of what takes the masks away."""
        clients = sorted(self._announced)
        records = {}
        for client in self._survivors:
            others = [other for other in clients if other != client]
            data = b"".join(self._sealed[other][client] for other in others)
            listed = {_CLIENTS: others, _SURVIVORS: self._survivors}
            records[client] = self._step(UNMASK, data, listed)
        size = SHARE_BYTES * len(clients)
        for client, data in self._answers(records, UNMASK, size):
            self._told[client] = _cut(data, clients, SHARE_BYTES)

    def result(self) -> Pooled:
        """The sum without its masks.

        Raises:
            ClientError: too few shares, or a sum that cannot be one of honest clients.
        """
        secure_sum.remove_masks(
            self._total,
            self._told,
            session=self._session,
            announced=self._announced,
            survivors=self._survivors,
            threshold=self._threshold,
            width=self._spec.width,
        )
        weights = {client: self._weights[client] for client in self._survivors}
        pooled, complete = pooled_of(
            self._total, self._request, self._spec, self._shapes, weights=weights
        )
        if not complete:
            self._cohort.skip(-1, "some growth entries could not be read from their sum")
        means = Reply(1, pooled.fields, pooled.states, {}, pooled.tensors)
        check_parts(means, self._request)
        return Pooled(**{**vars(pooled), "resources": largest(self._resources)})

    def _step(self, action: str, data: bytes = b"", more: Header | None = None) -> RecordDict:
        return _record({_ACTION: action, **self._begun, **(more or {})}, data)

    def _answers(
        self, records: Mapping[int, RecordDict], action: str, size: int
    ) -> Iterator[tuple[int, bytes]]:
        """The data of the answers that have the right length."""
        for client, frames in self._cohort.deliver(records, action):
            data = frames.get(_DATA, b"")
            if len(data) != size:
                self._cohort.skip(client, f"{action}: {len(data)} bytes, expected {size}")
                continue
            yield client, data

    def _enough(self, clients: Collection[int], what: str, *, least: int = 0) -> None:
        needed = max(self._threshold, least)
        if len(clients) < needed:
            raise ClientError(
                f"secure sum: {len(clients)} of {len(self._weights)} clients {what}, and {needed} "
                "are needed"
            )


def _record(header: Header, data: bytes) -> RecordDict:
    return wire.build_record(header, {_DATA: data} if data else {})


def _clients(header: Header, key: str) -> list[int]:
    values = header.get(key)
    if not isinstance(values, list):
        raise ClientError(f"field {key!r}: expected clients, got {values!r:.60}")
    return [count({key: value}, key) for value in values]


def _cut(data: bytes, clients: list[int], size: int) -> dict[int, bytes]:
    """One piece of that size for each client.

    Raises:
        ClientError: there are more or fewer, or a client comes twice.
    """
    if len(data) != size * len(clients) or len(set(clients)) != len(clients):
        raise ClientError(f"secure sum: {len(data)} bytes for {len(clients)} clients")
    return {client: data[place * size : (place + 1) * size] for place, client in enumerate(clients)}
