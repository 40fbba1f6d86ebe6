"""The kept samples of a data set, for a DataLoader of torch and for training here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data import Subset as TorchSubset

from datapruning.errors import SelectionError
from prunelab.data.checked import checked_label
from prunelab.data.datasets import ImageSet
from prunelab.data.objects import as_samples, is_pair, is_samples, item_of, samples_of_items
from prunelab.data.samples import Samples

if TYPE_CHECKING:
    from datapruning.selection.table import Subset

_NUM_COMPARED = 8


class KeptSamples(TorchSubset[Any]):
    """The kept samples of a data set, in its order; items are those of the data set.

    Of arrays, samples and named data sets an item is (image as a network is fed, label).

    Args:
        dataset: anything that `as_samples` takes.
        subset: what was kept of it.

    Raises:
        SelectionError: the subset was chosen from other data. Of a torch or Hugging Face data set
            the number of samples and a few labels are compared, since its transforms may be
            random; of other data the content is.
    """

    def __init__(self, dataset: Any, subset: Subset) -> None:
        self.subset = subset
        self._samples: Samples | None = None
        if _has_items(dataset):
            rows = _rows_of_items(dataset, subset)
        else:
            self._samples = as_samples(dataset)
            rows = subset.rows(self._samples)
            dataset = _Items(self._samples)
        super().__init__(dataset, rows.tolist())

    def training_samples(self) -> tuple[Samples, Tensor | None]:
        """Samples, and which rows of them are kept; None: all."""
        if self._samples is not None:
            return self._samples, torch.tensor(self.indices)
        return samples_of_items(self), None


class _Items(Dataset[Any]):
    """Samples one by one."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, row: int) -> Any:
        batch = self._samples.batch(torch.tensor([row]))
        if isinstance(batch, dict):
            return {name: part[0] for name, part in batch.items()}
        return tuple(part[0] for part in batch)


def _has_items(dataset: Any) -> bool:
    """Whether it is a data set with items of its own, of torch or Hugging Face."""
    if is_samples(dataset) or isinstance(dataset, str | Path | ImageSet | Mapping):
        return False
    if is_pair(dataset) or hasattr(dataset, "iloc"):
        return False
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or not len(dataset):
        return False
    # Names of classes get their numbers from all of the samples.
    return not isinstance(item_of(dataset[0], 0)[1], str | list)


def _rows_of_items(dataset: Any, subset: Subset) -> Tensor:
    """The rows that are kept, once the data set is known to be of the same samples."""
    if len(dataset) != subset.num_samples or (
        len(subset) and int(subset.ids.max()) >= subset.num_samples
    ):
        raise SelectionError(
            f"the subset was chosen from {subset.num_samples} samples of {subset.dataset}, these "
            f"data have {len(dataset)}; give the data set that was scored"
        )
    if subset.labels is not None:
        step = max(1, len(subset) // _NUM_COMPARED)
        for place in range(0, len(subset), step):
            row, expected = int(subset.ids[place]), int(subset.labels[place])
            label = checked_label(item_of(dataset[row], row)[1], row)
            if label != expected:
                raise SelectionError(
                    f"sample {row} has the label {label}, but had {expected} when the subset was "
                    "chosen; give the data set that was scored, in its order"
                )
    return subset.ids
