"""Samples of what people have in memory: arrays, tables, data sets of torch and Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    default_collate,
    default_convert,
)

from prunelab.data.arrays import array_of, is_array, note
from prunelab.data.checked import whole_numbers
from prunelab.data.columns import IMAGE_NAMES, LABEL_NAMES, Columns
from prunelab.data.datasets import ImageSet
from prunelab.data.gathered import (
    Gathered,
    client_groups,
    gathered_columns,
    gathered_pair,
    images_of,
    is_grouped,
    is_pair,
    joined,
    plain_columns,
    text_column,
)
from prunelab.data.labels import renumbered
from prunelab.data.pictures import is_picture
from prunelab.data.reading import Reading, reading
from prunelab.data.samples import ImageSamples, Samples, TargetSamples, taken
from prunelab.data.sides import SampleSet
from prunelab.data.text import tokenized_columns
from prunelab.errors import DataError

Groups = Tensor | None


@dataclass(frozen=True)
class Side:
    """Samples, and the natural client of each, int64 [N], where the data say it.

    Attributes:
        were_lists: several classes a sample, given as lists of classes.
    """

    samples: Samples
    groups: Groups = None
    were_lists: bool = False


def as_samples(
    data: Any,
    *,
    resize: int | str | tuple[int, int] | None = None,
    columns: Mapping[str, str | Sequence[str]] | str | None = None,
    task: str | None = None,
    tokenizer: Callable[..., Any] | None = None,
    max_length: int = 128,
) -> Samples:
    """Samples of any data set that scores and training understand.

    Inputs end up in memory as `checked_images` has them: uint8 (normalised when a network is fed)
    or float32 (fed as they are). The fingerprint is of the content.

    Args:
        data: `Samples` (returned as they are); a name, folder, file or "module:function" (the
            training side: all there is, without a test side); an `ImageSet` or `SampleSet` (its
            training side); a pair (inputs, labels) of arrays, tensors or lists; a torch data set,
            or a DataLoader of one; a data set of Hugging Face, a frame of pandas, a list of
            mappings or a mapping
            of columns, with a column of pictures, of texts, or columns of numbers, beside the
            label; or flwr-datasets' partitions. Labels are what `targets_of` takes.
        resize: pixels that pictures are brought to, as `reading` takes it.
        columns: which columns are meant where they are not called as usual: {"image": ...,
            "text": ..., "features": "a+b", "label": ...}.
        task: "classification", "regression" or "multi-label", where labels could be several.
        tokenizer, max_length: for texts, as `tokenized` takes them.

    Raises:
        DataError: something else, or samples that are not of one shape, not finite, without a
            label, or different each time they are read.

    >>> images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4)
    >>> as_samples((images, labels)).images.shape
    torch.Size([4, 1, 8, 8])
    """
    how = reading(
        resize=resize, columns=columns, task=task, test_share=0, tokenizer=tokenizer,
        max_length=max_length,
    )  # fmt: skip
    if isinstance(data, str | Path):
        from prunelab.data.given import load_sample_set  # noqa: PLC0415 - reads objects itself

        return load_sample_set(str(data), how=how).train
    return side_of(data, how).samples


def side_of(data: Any, how: Reading) -> Side:
    """The samples of one side of a data set, and whose they are.

    Raises:
        DataError: as `as_samples`.
    """
    if isinstance(data, type):
        raise DataError(f"data is the class {data.__name__}; give one of it: {data.__name__}(...)")
    if is_loader(data):
        data = _dataset_of_loader(data)
    if _is_streamed(data):
        raise DataError(
            f"data is a {type(data).__name__}, which is read in one go and has no samples by "
            "number; load it without streaming=True, or give one with __getitem__ and __len__"
        )
    if is_samples(data):
        side = Side(called_as(data, getattr(data, "class_names", ()), how.class_names))
    elif isinstance(data, ImageSet | SampleSet):
        both = SampleSet.of(data) if isinstance(data, ImageSet) else data
        samples = called_as(both.train, both.class_names, how.class_names, where=both.name)
        side = Side(samples, both.train_groups)
    elif has_partitions(data):
        side = _of_partitions(data, how)
    elif is_pair(data):
        side = _side(gathered_pair(data[0], data[1], how))
    else:
        side = _of_columns_or_items(data, how)
    return side


def called_as(
    samples: Samples,
    own_names: Sequence[str],
    class_names: tuple[str, ...] | None,
    *,
    where: str = "data",
) -> Samples:
    """Samples with the numbers that others give to their classes.

    Args:
        own_names, class_names: as of `labels.renumbered`.

    Raises:
        DataError: as that, or samples of several classes each whose names are not those.
    """
    if not own_names or not class_names or tuple(own_names) == class_names:
        return samples
    if type(samples) is ImageSamples:
        labels, names = renumbered(
            samples.labels.numpy(), tuple(own_names), class_names, where=where
        )
        return ImageSamples(samples.images, labels, ids=samples.ids, class_names=names)
    raise DataError(
        f"{where}: its classes are {', '.join(own_names)}, those of the other side "
        f"{', '.join(class_names)}; number both alike"
    )


def _of_columns_or_items(data: Any, how: Reading) -> Side:
    if is_grouped(data):
        raise DataError(
            f"data is a mapping of {', '.join(map(repr, data))}; give one of them, such as the "
            "training side"
        )
    columns = plain_columns(data)
    if columns is not None:
        return _of_columns(columns, how)
    is_listed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if is_listed and not isinstance(data, str | bytes) and not is_array(data):
        return _side_of_items(data, how)
    raise DataError(
        f"data is a {type(data).__name__}; expected (images, labels), a torch data set of (image, "
        "label), a Hugging Face data set, a frame of pandas, samples, or the name of a data set"
    )


def _of_columns(columns: Columns, how: Reading) -> Side:
    """Pictures, texts or numbers, whichever the columns hold."""
    text, are_texts = text_column(columns, how)
    if not are_texts or how.tokenizer is None:
        return _side(gathered_columns(columns, how))
    samples = tokenized_columns(
        columns, how.tokenizer, text=text, max_length=how.max_length, class_names=how.class_names,
        label=columns.pick(how.column("label"), LABEL_NAMES, "label"),
    )  # fmt: skip
    _, groups = client_groups(columns, how)
    return Side(samples, None if groups is None else torch.from_numpy(groups))


def _side(found: Gathered) -> Side:
    targets = found.targets
    kind = ImageSamples if targets.are_classes else TargetSamples
    samples = kind(found.inputs, targets.values, class_names=targets.class_names)
    samples.feature_names = found.feature_names
    groups = None if found.groups is None else torch.from_numpy(found.groups)
    return Side(samples, groups, targets.were_lists)


def _is_streamed(data: Any) -> bool:
    """Whether it is a data set of torch's or Hugging Face's without samples by number."""
    is_huggings = hasattr(data, "column_names") and hasattr(data, "with_format")
    return isinstance(data, IterableDataset) or (is_huggings and not hasattr(data, "__len__"))


def is_samples(data: Any) -> bool:
    """Whether an object has what `Samples` need, with nothing computed."""
    return hasattr(data, "ids") and callable(getattr(data, "batch", None))


def is_loader(data: Any) -> bool:
    """Whether it is a DataLoader of torch, or one like it."""
    return hasattr(data, "dataset") and hasattr(data, "batch_size") and hasattr(data, "collate_fn")


def has_partitions(data: Any) -> bool:
    """Whether it is a partitioner of flwr-datasets', or a federated data set."""
    return hasattr(data, "load_partition")


# --- data sets with items ------------------------------------------------------------------------


def item_of(item: Any, row: int, how: Reading | None = None) -> tuple[Any, Any]:
    """Input and label of one item of a data set, as they are.

    Raises:
        DataError: an item that is no pair and no mapping with an image and a label.
    """
    how = how or Reading()
    if isinstance(item, Mapping):
        columns = Columns(tuple(map(str, item)), item.__getitem__, where=f"sample {row}")
        image = columns.pick(how.column("image"), IMAGE_NAMES, "image")
        label = columns.pick(how.column("label"), LABEL_NAMES, "label")
        if image is None or label is None:
            raise DataError(
                f"sample {row} has {', '.join(map(repr, item))}; expected an image "
                f"({', '.join(IMAGE_NAMES)}) and a label ({', '.join(LABEL_NAMES)}): name the "
                "columns, columns={'image': ..., 'label': ...}"
            )
        return item[image], item[label]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    raise DataError(
        f"sample {row} is a {type(item).__name__}, expected (image, label); texts are for "
        "datapruning.tokenized"
    )


def samples_of_items(data: Any, how: Reading | None = None) -> Samples:
    """Samples of a data set with items, each read once.

    Raises:
        DataError: as `as_samples`.
    """
    return _side_of_items(data, how or Reading()).samples


def _side_of_items(data: Any, how: Reading) -> Side:
    if not len(data):
        raise DataError("data holds no samples")
    labels: list[Any] = []
    first: list[Any] = []

    def cells() -> Iterator[tuple[str, Any]]:
        for row in range(len(data)):
            image, label = item_of(_item(data, row), row, how)
            labels.append(_plain(label))
            cell = _checked_cell(image, row)
            if not row:
                first.append(np.array(cell) if is_array(cell) else cell)
            yield f"the image of sample {row}", cell

    images = images_of(cells(), how)
    again = _checked_cell(item_of(data[0], 0, how)[0], 0)
    if not np.array_equal(np.asarray(again), np.asarray(first[0]), equal_nan=is_array(again)):
        raise DataError(
            "sample 0 is another one each time it is read; leave random transforms out "
            "(TrainingConfig(augment=True) has crops and flips for training)"
        )
    return _side(joined(images, labels, how, class_names=_class_names_of(data)))


def _plain(label: Any) -> Any:
    """A label of torch's or numpy's as Python has it."""
    if isinstance(label, Tensor | np.ndarray | np.generic):
        found = array_of(label, "labels")
        return found.item() if found.size == 1 else found.tolist()
    return label


def _checked_cell(image: Any, row: int) -> Any:
    if is_array(image):
        return array_of(image, "images", f"sample {row}")
    if not is_picture(image):
        raise DataError(
            f"the image of sample {row} is a {type(image).__name__}, expected a tensor, an array "
            "or a picture; add a transform such as torchvision.transforms.ToTensor"
        )
    return image


def _item(data: Any, row: int) -> Any:
    try:
        return data[row]
    except (KeyError, NotImplementedError) as error:  # such as an iterable data set
        raise DataError(
            f"sample {row} of a {type(data).__name__} cannot be read by its number "
            f"({type(error).__name__}: {error}); give (images, labels) or a list of them"
        ) from error


def _class_names_of(data: Any) -> tuple[str, ...]:
    """What torchvision's data sets call their classes, through subsets of them."""
    while not hasattr(data, "classes") and hasattr(data, "dataset"):
        data = data.dataset
    names = getattr(data, "classes", ())
    is_named = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_named else ()


def _dataset_of_loader(loader: Any) -> Any:
    """The samples that a loader reads: its data set, or the part that its sampler names."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        raise DataError(
            f"the DataLoader's data set, a {type(dataset).__name__}, is read in one go and has no "
            "samples by number; give one with __getitem__ and __len__"
        )
    if loader.collate_fn not in (default_collate, default_convert, None):
        note("the DataLoader's collate_fn is left out: samples are read from its data set")
    batches = getattr(loader, "batch_sampler", None)
    is_plain = batches is None or type(batches) is BatchSampler
    sampler = getattr(batches if is_plain and batches is not None else loader, "sampler", None)
    rows = getattr(sampler, "indices", None)
    if is_plain and rows is not None and not callable(rows):
        return _part(dataset, sorted(map(int, rows)))
    if is_plain and (sampler is None or _is_of_all(sampler, dataset)):
        return dataset
    odd = sampler if is_plain else batches
    raise DataError(
        f"the DataLoader draws its samples by a {type(odd).__name__}, which does not say which "
        "they are; give the data set, or a Subset of it"
    )


def _is_of_all(sampler: Any, dataset: Any) -> bool:
    """Whether a sampler of torch's reads each sample of the data set once."""
    if isinstance(sampler, RandomSampler):
        is_whole = not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    else:
        is_whole = isinstance(sampler, SequentialSampler)
    return is_whole and len(sampler.data_source) == len(dataset)


def _part(dataset: Any, rows: list[int]) -> Any:
    if is_samples(dataset):
        return taken(dataset, torch.tensor(rows, dtype=torch.int64))
    return dataset.select(rows) if hasattr(dataset, "select") else Subset(dataset, rows)


# --- partitions of flwr-datasets -----------------------------------------------------------------


def divided_split(data: Any) -> str | None:
    """The split of a federated data set that its clients share; None of a partitioner."""
    partitioners = getattr(data, "partitioners", None)
    if partitioners is None:
        return None
    return "train" if "train" in partitioners else str(next(iter(partitioners)))


def _of_partitions(data: Any, how: Reading) -> Side:
    """All samples of all partitions, the number of the partition as the client."""
    import datasets  # noqa: PLC0415

    split = divided_split(data)
    if split is not None:
        first = data.load_partition(0, split)
        load: Callable[[int], Any] = lambda number: data.load_partition(number, split)  # noqa: E731
        count = data.partitioners[split].num_partitions
    else:
        if not data.is_dataset_assigned():
            raise DataError("the partitioner has no data set; set partitioner.dataset first")
        load, count = data.load_partition, data.num_partitions
        first = load(0)
    parts = [first, *(load(number) for number in range(1, count))]
    side = side_of(datasets.concatenate_datasets(parts), how)
    numbers = np.repeat(np.arange(count), [len(part) for part in parts])
    return replace(side, groups=whole_numbers(numbers, "clients"))
