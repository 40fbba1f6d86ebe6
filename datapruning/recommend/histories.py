"""Interaction histories of users, split into training, validation and test, and their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from datapruning.recommend.ragged import Ragged
from prunelab.data.datasets import fingerprint
from prunelab.errors import DataError

PADDING = 0
"""The item number that stands for no item; items count from 1."""


@dataclass(frozen=True, eq=False)
class Histories:
    """What each user took, in the order of time, and what the items are called.

    Attributes:
        name: of the data set.
        users: int64 [U], unique: the names of users in tables.
        train, valid, test: [U] rows of item numbers in 1 ... num_items, one after another in time.
        titles: title of item i at i − 1.

    Raises:
        DataError: parts of different lengths, users named twice, or item numbers out of range.
    """

    name: str
    users: Tensor
    train: Ragged
    valid: Ragged
    test: Ragged
    titles: Sequence[str]

    def __post_init__(self) -> None:
        parts = {"train": self.train, "valid": self.valid, "test": self.test}
        for name, part in parts.items():
            if len(part) != len(self.users):
                raise DataError(f"{self.name}: {len(self.users)} users, {len(part)} {name} rows")
            values = part.values
            if len(values) and not 1 <= int(values.min()) <= int(values.max()) <= self.num_items:
                raise DataError(
                    f"{self.name}: item numbers of {name} run from {int(values.min())} to "
                    f"{int(values.max())}, expected 1 to {self.num_items}"
                )
        if len(self.users.unique()) != len(self.users):
            raise DataError(f"{self.name}: a user occurs more than once")

    @property
    def num_items(self) -> int:
        """Items that can be recommended, those without a training interaction among them."""
        return len(self.titles)

    def take(self, rows: Tensor) -> Histories:
        """The histories of some users; all items stay."""
        return Histories(
            self.name,
            self.users[rows],
            self.train.take(rows),
            self.valid.take(rows),
            self.test.take(rows),
            self.titles,
        )

    def question(self, split: str) -> Question:
        """What a recommender is asked in validation ("valid") or test ("test").

        Users without a target or without a history are left out. In the test, validation items
        belong to the history: they came before.
        """
        if split not in ("valid", "test"):
            raise DataError(f"unknown split {split!r}; known: valid, test")
        history = self.train if split == "valid" else self.train.joined(self.valid)
        targets = self.valid if split == "valid" else self.test
        rows = torch.nonzero((history.lengths > 0) & (targets.lengths > 0)).flatten()
        return Question(self.users[rows], history.take(rows), _unique(targets.take(rows)))


@dataclass(frozen=True, eq=False)
class Question:
    """Histories, and the items that came after them.

    Attributes:
        users: int64 [Q].
        history: [Q] rows of item numbers, none empty.
        targets: [Q] rows of item numbers in the order of time, none empty, no item twice in a row.
    """

    users: Tensor
    history: Ragged
    targets: Ragged

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: Tensor) -> Question:
        """Some of the users."""
        return Question(self.users[rows], self.history.take(rows), self.targets.take(rows))


@dataclass
class ReadReport:
    """What was found while reading, and what was left out.

    Attributes:
        users, items, interactions: that were kept.
        notes: sentences on what was skipped or looked odd, with counts and a first place.
    """

    users: int = 0
    items: int = 0
    interactions: int = 0
    notes: list[str] = field(default_factory=list)

    def count(self, what: str, places: Sequence[object]) -> None:
        """Note how often something was met, if it was."""
        if places:
            self.notes.append(f"{len(places)} {what}, the first: {places[0]}")


class HistorySamples:
    """Training samples: the last training item of a user, and the items before it.

    A batch is (int64 [B, T] histories, padded on the right with 0; int64 [B] targets). Users
    with fewer than two training items give no sample.

    Args:
        max_length: items of a history, the most recent.

    Raises:
        DataError: nobody has two training items.
    """

    labels = None

    def __init__(self, histories: Histories, *, max_length: int = 50) -> None:
        rows = torch.nonzero(histories.train.lengths >= 2).flatten()
        if len(rows) == 0:
            raise DataError(f"{histories.name}: no user has two training items, so no sample")
        train = histories.train.take(rows)
        self.user_rows = rows
        self.ids = histories.users[rows]
        self.history = train.without_last(1).last(max_length)
        self.targets = train.values[train.starts[1:] - 1]
        self.fingerprint = fingerprint(
            self.ids, self.history.values, self.history.starts, self.targets
        )

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.history.take(rows).padded(fill=PADDING), self.targets[rows]


def leave_last_out(items: Ragged) -> tuple[Ragged, Ragged, Ragged]:
    """The last item of each user for the test, the one before it for validation.

    Users with fewer than three items only train.

    >>> train, valid, test = leave_last_out(Ragged.of([[1, 2, 3, 4], [5, 6]]))
    >>> train.padded(), valid.lengths, test[0]
    (tensor([[1, 2],
            [5, 6]]), tensor([1, 0]), tensor([4]))
    """
    held = torch.where(items.lengths >= 3, 2, 0)
    ends = items.starts[1:]
    train = items.without_last(held)
    tested = held > 0
    places = torch.zeros(len(items) + 1, dtype=torch.int64)
    places[1:] = tested.long().cumsum(0)
    valid = Ragged(items.values[ends[tested] - 2], places)
    test = Ragged(items.values[ends[tested] - 1], places)
    return train, valid, test


def _unique(rows: Ragged) -> Ragged:
    """Each value once in its row, where it came first."""
    pairs = torch.stack([rows.owners, rows.values], dim=1)
    kinds, kind = pairs.unique(dim=0, return_inverse=True)
    places = torch.arange(len(pairs))
    first = places.new_full((len(kinds),), len(pairs)).scatter_reduce(0, kind, places, "amin")
    kept = first.sort().values
    counts = torch.bincount(rows.owners[kept], minlength=len(rows))
    return Ragged(rows.values[kept], torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
