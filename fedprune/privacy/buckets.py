"""Sums of few entries among very many positions, in a table that can be added up.

Growth entries of a round lie at few places of a layer, other places at each client. Sent as they
are they would tell a client's places; laid out densely they would take the whole layer. They go
into an invertible Bloom lookup table instead (Goodrich and Mitzenmacher, Allerton 2011): an entry
is added to one cell of each of five rows, chosen by a hash of its place. Tables of all clients are
added up, under masks, and of the sum's cells those that hold one place only are read, taken out,
and so on until the table is empty. Sums are exact. Whoever reads the sum learns of each place,
besides the sum of its values, how many clients named it.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from fedprune.privacy.randomness import Words

ROWS = 5
FIELDS = 5  # of a cell: count, sum of places, sum of their checks, high and low words of the sum
MAX_PLACES = 2**32
_PEELED = 1.6  # cells an entry; five rows can be read from 1.43 on
_SPARE = 32  # cells of a row besides: two of few entries share all theirs once in 2e5 tables

Places = NDArray[np.int64]


def cells_for(entries: int) -> int:
    """Cells of a row for so many different places; 0 for none.

    >>> cells_for(100)
    64
    """
    return int(np.ceil(_PEELED * entries / ROWS)) + _SPARE if entries else 0


def table_of(places: Places, high: Words, low: Words, *, cells: int, session: str) -> Words:
    """The table of some entries, each place once: uint64 [FIELDS · ROWS · cells].

    Args:
        places: in [0, MAX_PLACES).
        high, low: the two words of each sum.
        session: decides where a place goes; the same for all tables that are added up.
    """
    hashes = _Hashes(session, cells)
    table = np.zeros((FIELDS, ROWS * cells), np.uint64)
    cell = _cell(places.astype(np.uint64), hashes.check(places), high, low)
    for at in hashes.cells(places):
        for field, value in zip(table, cell, strict=True):
            np.add.at(field, at, value)
    return table.reshape(-1)


def entries_of(
    table: Words, *, session: str, width: int
) -> tuple[tuple[Places, Words, Words], bool]:
    """The entries of a sum of tables, modulo 2^(8 · width): places, ascending, and both words.

    Returns:
        The entries, and whether they are all: seldom some places share all their cells.
    """
    cells = len(table) // (FIELDS * ROWS)
    hashes, modulus = _Hashes(session, cells), np.uint64(2 ** (8 * width) - 1)
    rest = table.reshape(FIELDS, ROWS * cells) & modulus
    found: list[Words] = []
    while True:
        counts = np.maximum(rest[0], np.uint64(1))
        places = rest[1] // counts
        alone = (rest[0] > 0) & (rest[1] == places * counts) & (places < MAX_PLACES)
        at = np.flatnonzero(alone)
        _, first = np.unique(places[at], return_index=True)
        at = at[first]
        named = places[at].astype(np.int64)
        where = hashes.cells(named)
        right = rest[2, at] == (rest[0, at] * hashes.check(named)) & modulus
        right &= (where == at).any(axis=0)
        if not right.any():
            break
        taken = rest[:, at[right]].copy()
        taken[1] = places[at[right]]
        found.append(taken)
        removed = _cell(taken[0] * taken[1], taken[2], taken[3], taken[4], counts=taken[0])
        for row in where[:, right]:
            for field, value in zip(rest, removed, strict=True):
                np.subtract.at(field, row, value)
        rest &= modulus
    whole = np.concatenate(found, axis=1) if found else np.zeros((FIELDS, 0), np.uint64)
    whole = whole[:, np.argsort(whole[1])]
    return (whole[1].astype(np.int64), whole[3], whole[4]), not rest.any()


def _cell(
    places: Words, checks: Words, high: Words, low: Words, counts: Words | None = None
) -> tuple[Words, ...]:
    return (np.ones_like(places) if counts is None else counts, places, checks, high, low)


class _Hashes:
    """Where places go, and the check by which a place is known; they need not be secret."""

    def __init__(self, session: str, cells: int) -> None:
        digest = hashlib.sha256(session.encode() + b" buckets").digest()
        digest += hashlib.sha256(digest).digest()
        self._seeds = np.frombuffer(digest[: 8 * (ROWS + 1)], "<u8").astype(np.uint64)
        self._cells = cells

    def cells(self, places: Places) -> NDArray[np.int64]:
        """The cell of each row: int64 [ROWS, n]."""
        mixed = [_mixed(places, seed) % np.uint64(self._cells) for seed in self._seeds[:ROWS]]
        rows = np.stack(mixed).astype(np.int64)
        return rows + self._cells * np.arange(ROWS, dtype=np.int64)[:, None]

    def check(self, places: Places) -> Words:
        """A number of a place that no sum of others has by chance."""
        return _mixed(places, self._seeds[ROWS])


def _mixed(places: Places, seed: np.uint64) -> Words:
    """A hash of 64 bits: the finishing steps of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = places.astype(np.uint64) ^ seed
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = x ^ (x >> np.uint64(31))
    return mixed
