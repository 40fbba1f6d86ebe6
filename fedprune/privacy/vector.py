"""A reply as one vector of numbers for a secure sum, and the sum as means again.

The numbers are those that `exchange/aggregate.py` adds up in the clear, so that the means of a
secure sum have the bits of the plain ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from fedprune.errors import ClientError
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import MODEL, SPEC, Expected, Reply, Request, count
from fedprune.exchange.pooled import Layout, Pooled, Sums
from fedprune.local.training import growth_counts
from fedprune.privacy.buckets import (
    FIELDS,
    MAX_PLACES,
    ROWS,
    Places,
    cells_for,
    entries_of,
    table_of,
)
from fedprune.privacy.randomness import Words
from sparsemodel.runtime.fixed_sum import FixedSum, word_width
from sparsemodel.runtime.pattern import Patterns

MAX_CLIENTS = 2**16
MAX_CELLS = 2**26


@dataclass(frozen=True)
class Spec:
    """How a reply becomes a vector; a field of the request that asks for it.

    Attributes:
        session: names the sum.
        clients: whose masks the vector takes.
        width: bytes of a number.
        cells: of a row of the table of growth entries; 0: no table.
        sums: fields that are sums over the client's samples.
    """

    session: str
    clients: Sequence[int]
    width: int
    cells: int = 0
    sums: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, request: Request, session: str, clients: Sequence[int], *, total_weight: int
    ) -> Spec:
        """That of a question to some clients, who count for so much together."""
        entries = len(clients) * sum(request.expected.growth.values())
        width, cells = word_width(total_weight), cells_for(entries)
        return cls(session, list(clients), width, cells, dict(request.expected.sums))

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Spec | None:
        """That of a request's fields; None where there is none.

        Raises:
            ClientError: it is damaged.
        """
        given = fields.get(SPEC)
        if given is None:
            return None
        match given:
            case {
                "session": str(session),
                "clients": list(clients),
                "width": int(width),
                "cells": int(cells),
                "sums": dict(sums),
            } if len(clients) <= MAX_CLIENTS and 5 <= width <= 8 and 0 <= cells <= MAX_CELLS:
                listed = [count({"clients": client}, "clients") for client in clients]
                return cls(session, listed, width, cells, sums)
        raise ClientError(f"field {SPEC!r}: {given!r:.90} is no description of a sum")

    def asked(self, request: Request) -> Request:
        """The question that asks for an answer under masks, and expects nothing else."""
        fields = {**request.fields, SPEC: asdict(self)}
        return replace(request, fields=fields, expected=Expected(), check=lambda reply: None)


def vector_of(reply: Reply, request: Request, spec: Spec, *, norm: float = 0.0) -> Words:
    """A reply, times its weight, as numbers modulo 2^64: uint64 [n].

    Args:
        norm: as of `Expected`.

    Raises:
        ClientError: it holds values that the server could not refuse under masks: not finite,
            too large, of a weight that grew beyond its bounds.
    """
    counts = growth_counts(request) if spec.cells else {}
    if spec.cells and spec.cells != (own := cells_for(len(spec.clients) * sum(counts.values()))):
        raise ClientError(f"a table of {spec.cells} cells a row, where the entries take {own}")
    expected = Expected(
        fields=list(reply.fields),
        states=list(reply.states),
        tensors={name: list(some) for name, some in reply.tensors.items()},
        growth=counts,
        norm=norm,
    )
    check_parts(reply, replace(request, expected=expected))
    sums = Sums(spec.sums, updates=norm > 0)
    sums.add(reply)
    words = sums.words()
    if not spec.cells:
        return words
    patterns = request.state(MODEL).patterns
    assert patterns is not None, "growth is at pruned places"
    starts = _starts(counts, patterns)
    parts = [
        (places + starts[name], *total.words().reshape(2, -1))
        for name, (places, total) in sums.growth.sums().items()
    ]
    if not parts:
        parts = [(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.uint64))]
    places, high, low = (np.concatenate(some) for some in zip(*parts, strict=True))
    table = table_of(places, high, low, cells=spec.cells, session=spec.session)
    return np.concatenate([words, table])


def num_words(request: Request, spec: Spec, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers the vector of an answer has."""
    return Layout.of(request, shapes).num_words() + FIELDS * ROWS * spec.cells


def pooled_of(
    total: Words,
    request: Request,
    spec: Spec,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    weights: Mapping[int, int],
) -> tuple[Pooled, bool]:
    """The means of a sum of vectors.

    Args:
        total: uint64, modulo 2^(8 · spec.width).
        request: the question, with what its answers hold.
        shapes: of the model's tensors.
        weights: client -> what it counts for, of those in the sum.

    Returns:
        The means, and whether all growth entries could be read.
    """
    layout, weight = Layout.of(request, shapes), sum(weights.values())
    end = layout.num_words()
    sums = Sums(request.expected.sums, updates=request.expected.norm > 0)
    sums.take(total[:end], layout, width=spec.width, weight=weight, num_replies=len(weights))
    complete = True
    if spec.cells:
        patterns = request.state(MODEL).patterns
        assert patterns is not None, "growth is at pruned places"
        (places, high, low), complete = entries_of(
            total[end:], session=spec.session, width=spec.width
        )
        found = {}
        for name, start in _starts(request.expected.growth, patterns).items():
            inside = slice(*np.searchsorted(places, [start, start + patterns[name].num_weights]))
            words = np.concatenate([high[inside], low[inside]])
            own: Places = places[inside] - start
            found[name] = own, FixedSum.of_words(own.shape, words, width=spec.width)
        sums.growth.take({n: some for n, some in found.items() if len(some[0])}, weight=weight)
    return sums.result(list(weights)), complete


def _starts(counts: Mapping[str, int], patterns: Patterns) -> dict[str, int]:
    """Where the places of each layer begin, among those of all layers that grow."""
    starts, start = {}, 0
    for name in sorted(counts):
        starts[name] = start
        start += patterns[name].num_weights
    if start > MAX_PLACES:
        raise ClientError(f"layers of {start} weights: secure sums of growth take {MAX_PLACES}")
    return starts
