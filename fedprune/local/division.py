"""Samples divided among clients, as two arrays, however many clients there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from prunelab.data.batches import Integers


@dataclass(frozen=True, eq=False)
class Division(Sequence[Integers]):
    """Each client's ascending indices, cut out when they are asked for.

    Attributes:
        indices: int64, of all clients, one after the other.
        ends: int64 [clients], where each one's end.

    >>> division = Division.of_owners(np.array([1, 0, 2, 1]), 3)
    >>> [share.tolist() for share in division]
    [[1], [0, 3], [2]]
    """

    indices: Integers
    ends: Integers

    @classmethod
    def of_owners(cls, owners: Integers, num_clients: int) -> Division:
        """That which gives each sample to a client: int64 [N], 0 ... num_clients - 1."""
        sizes = np.bincount(owners, minlength=num_clients)
        return cls(np.argsort(owners, kind="stable"), np.cumsum(sizes, dtype=np.int64))

    @classmethod
    def of(cls, shares: Sequence[Integers]) -> Division:
        """That of these shares."""
        if isinstance(shares, Division):
            return shares
        joined = np.concatenate(shares) if shares else np.empty(0, np.int64)
        return cls(joined, np.cumsum([len(share) for share in shares], dtype=np.int64))

    def within(self, samples: Integers) -> Division:
        """The same division of these samples: ascending indices, int64, as many as it divides."""
        return Division(samples[self.indices], self.ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, client: int) -> Integers: ...

    @overload
    def __getitem__(self, client: slice) -> list[Integers]: ...

    def __getitem__(self, client: int | slice) -> Integers | list[Integers]:
        if isinstance(client, slice):
            return [self[each] for each in range(*client.indices(len(self)))]
        place = range(len(self))[client]
        return self.indices[self.ends[place - 1] if place else 0 : self.ends[place]]
