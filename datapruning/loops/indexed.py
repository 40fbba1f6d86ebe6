"""Data sets whose items say which sample they are, so that a training run can tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from datapruning.selection.kept import Items, has_items
from prunelab.data.objects import as_samples
from prunelab.errors import DataError

ID = "id"


class Indexed(Dataset[Any]):
    """Items of a data set with the id of their sample as one entry more; made by `indexed`."""

    def __init__(self, data: Any) -> None:
        self._items, self._ids = data, None
        if not has_items(data):
            samples = as_samples(data)
            self._items, self._ids = Items(samples), samples.ids.tolist()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, row: int) -> Any:
        item = self._items[row]
        number = int(row) if self._ids is None else self._ids[row]
        if isinstance(item, Mapping):
            if ID in item:
                raise DataError(f"sample {row} has an entry {ID!r} of its own; rename that one")
            return {**item, ID: number}
        return (*item, number)


def indexed(data: Any) -> Indexed:
    """The data set with the id of each sample in its items, for `DynamicsRecorder`.

    An item (image, label) becomes (image, label, id), a mapping gets an entry `id`. Ids are the
    row numbers of the data set; of `Samples` their own.

    Args:
        data: a torch or Hugging Face data set, or whatever else `as_samples` takes.

    Raises:
        DataError: data of another kind; when an item is read: an entry `id` that is there already.

    >>> indexed([("a", 0), ("b", 1)])[1]
    ('b', 1, 1)
    """
    return Indexed(data)
