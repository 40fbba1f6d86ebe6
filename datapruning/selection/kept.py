"""The kept samples of a data set: as what it is, or for a DataLoader and for training here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torch.utils.data import Subset as TorchSubset

from datapruning.errors import SelectionError
from prunelab.data.arrays import is_array
from prunelab.data.checked import checked_label
from prunelab.data.columns import LABEL_NAMES
from prunelab.data.datasets import ImageSet
from prunelab.data.gathered import is_pair
from prunelab.data.objects import as_samples, is_samples, item_of, samples_of_items
from prunelab.data.samples import Samples

if TYPE_CHECKING:
    from datapruning.selection.table import Subset

_NUM_COMPARED = 8


def kept_of(dataset: Any, subset: Subset) -> Any:
    """What `Subset.of` gives."""
    if isinstance(dataset, Mapping) and "train" in dataset:
        made: Any = type(dataset)
        return made({**dataset, "train": kept_of(dataset["train"], subset)})
    if hasattr(dataset, "select") and hasattr(dataset, "features"):  # of Hugging Face
        return dataset.select(_rows_of_items(dataset, subset).numpy())
    if hasattr(dataset, "iloc"):
        return dataset.iloc[subset.rows(as_samples(dataset)).numpy()]
    if is_array(dataset):
        _check_count(len(dataset), subset)
        return dataset[subset.indices]
    is_streamed = hasattr(dataset, "filter") and hasattr(dataset, "features")
    if is_streamed or isinstance(dataset, IterableDataset):
        return _thinned(dataset, subset)
    return KeptSamples(dataset, subset)


def _thinned(stream: Any, subset: Subset) -> Any:
    """A data set without rows, of Hugging Face or torch, less what is not kept."""
    if not hasattr(stream, "features"):
        return KeptStream(stream, subset)
    import datasets  # noqa: PLC0415

    features = stream.features
    if features and hasattr(stream, "decode"):
        stream = stream.decode(False)  # pictures pass as the bytes they are
    # A filter would count the rows of each shard, worker and shuffled order from 0.
    return datasets.IterableDataset.from_generator(
        _kept_items,
        features=features,
        gen_kwargs={"stream": stream, "kept": frozenset(subset.indices.tolist())},
    )


def _kept_items(stream: Iterable[Any], kept: frozenset[int]) -> Iterator[Any]:
    worker = get_worker_info()
    if worker is not None and worker.num_workers > 1:
        raise SelectionError(
            "several workers each see a part of a stream, and not whose place is which; use one "
            "worker at most"
        )
    yield from (item for place, item in enumerate(stream) if place in kept)


class KeptStream(IterableDataset[Any]):
    """The kept samples of a data set that is read from its start to its end, in one process.

    A kept sample is told by its place; whether the data are those that were scored is not known.
    """

    def __init__(self, dataset: IterableDataset[Any], subset: Subset) -> None:
        self.subset = subset
        self._dataset, self._kept = dataset, frozenset(subset.indices.tolist())

    def __iter__(self) -> Iterator[Any]:
        return _kept_items(self._dataset, self._kept)


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
        if has_items(dataset):
            rows = _rows_of_items(dataset, subset)
        else:
            self._samples = as_samples(dataset)
            rows = subset.rows(self._samples)
            dataset = Items(self._samples)
        super().__init__(dataset, rows.tolist())

    def training_samples(self) -> tuple[Samples, Tensor | None]:
        """Samples, and which rows of them are kept; None: all."""
        if self._samples is not None:
            return self._samples, torch.tensor(self.indices)
        return samples_of_items(self), None


class Items(Dataset[Any]):
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


def has_items(dataset: Any) -> bool:
    """Whether it is a data set with items of its own, of torch or Hugging Face."""
    if is_samples(dataset) or isinstance(dataset, str | Path | ImageSet | Mapping):
        return False
    if is_pair(dataset) or hasattr(dataset, "iloc"):
        return False
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or not len(dataset):
        return False
    return not _has_named_labels(dataset)


def _has_named_labels(dataset: Any) -> bool:
    """Whether labels are names of classes, which get their numbers from all of the samples."""
    return len(dataset) > 0 and isinstance(_label_of(dataset[0], 0), str | list)


def _check_count(count: int, subset: Subset) -> None:
    if count != subset.num_samples or (len(subset) and int(subset.ids.max()) >= count):
        raise SelectionError(
            f"the subset was chosen from {subset.num_samples} samples of {subset.dataset}, these "
            f"data have {count}; give the data set that was scored"
        )


def _rows_of_items(dataset: Any, subset: Subset) -> Tensor:
    """The rows that are kept, once the data set is known to be of the same samples."""
    _check_count(len(dataset), subset)
    if subset.labels is not None:
        if _has_named_labels(dataset):
            return subset.rows(as_samples(dataset))
        step = max(1, len(subset) // _NUM_COMPARED)
        for place in range(0, len(subset), step):
            row, expected = int(subset.ids[place]), int(subset.labels[place])
            label = checked_label(_label_of(dataset[row], row), row)
            if label != expected:
                raise SelectionError(
                    f"sample {row} has the label {label}, but had {expected} when the subset was "
                    "chosen; give the data set that was scored, in its order"
                )
    return subset.ids


def _label_of(item: Any, row: int) -> Any:
    """The label of an item, whose input may be anything that a network of the user's takes."""
    if isinstance(item, Mapping):
        for name in LABEL_NAMES:
            if name in item:
                return item[name]
    return item_of(item, row)[1]
