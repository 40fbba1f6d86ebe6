"""Rows of different lengths in two tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ragged:
    """Integer rows of any lengths, one after another.

    Attributes:
        values: int64 [sum of lengths].
        starts: int64 [N + 1]; row n is values[starts[n]:starts[n + 1]].

    >>> rows = Ragged.of([[5, 6, 7], [], [8]])
    >>> rows.lengths
    tensor([3, 0, 1])
    >>> rows[0]
    tensor([5, 6, 7])
    """

    values: Tensor
    starts: Tensor

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Ragged:
        """From lists."""
        values: list[int] = []
        starts = [0]
        for row in rows:
            values.extend(row)
            starts.append(len(values))
        return cls(torch.tensor(values, dtype=torch.int64), torch.tensor(starts))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Tensor:
        return self.values[int(self.starts[row]) : int(self.starts[row + 1])]

    @property
    def lengths(self) -> Tensor:
        """int64 [N]."""
        return self.starts.diff()

    def take(self, rows: Tensor) -> Ragged:
        """Some rows, in the order asked for."""
        return self._slices(self.starts[rows], self.lengths[rows])

    def last(self, num_values: int) -> Ragged:
        """The last so many values of each row, or all of a shorter one."""
        lengths = self.lengths.clamp(max=num_values)
        return self._slices(self.starts[1:] - lengths, lengths)

    def without_last(self, num_values: int | Tensor) -> Ragged:
        """Each row without its last so many values; a tensor [N] says how many of each."""
        return self._slices(self.starts[:-1], (self.lengths - num_values).clamp(min=0))

    def joined(self, other: Ragged) -> Ragged:
        """Row n of this, then row n of the other."""
        assert len(self) == len(other)
        lengths = self.lengths + other.lengths
        starts = _starts(lengths)
        values = torch.empty(int(starts[-1]), dtype=torch.int64)
        for part, first in ((self, starts[:-1]), (other, starts[:-1] + self.lengths)):
            values[first.repeat_interleave(part.lengths) + _places(part.lengths)] = part.values
        return Ragged(values, starts)

    def padded(self, *, fill: int = 0) -> Tensor:
        """int64 [N, longest], padded on the right; at least one column."""
        lengths = self.lengths
        longest = max(1, int(lengths.max())) if len(self) else 1
        table = torch.full((len(self), longest), fill, dtype=torch.int64)
        table[self.owners, _places(lengths)] = self.values
        return table

    @property
    def owners(self) -> Tensor:
        """The row of each value, int64, as long as values."""
        return torch.arange(len(self)).repeat_interleave(self.lengths)

    def _slices(self, first: Tensor, lengths: Tensor) -> Ragged:
        places = first.repeat_interleave(lengths) + _places(lengths)
        return Ragged(self.values[places], _starts(lengths))


def _starts(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def _places(lengths: Tensor) -> Tensor:
    """Position of each value in its row."""
    return torch.arange(int(lengths.sum())) - _starts(lengths)[:-1].repeat_interleave(lengths)
