"""Samples of what people have in memory: arrays, tables, data sets of torch and Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset

from prunelab.data.checked import Array, array_of, checked_images, whole_numbers
from prunelab.data.columns import (
    CLIENT_NAMES,
    IMAGE_NAMES,
    LABEL_NAMES,
    TEXT_NAMES,
    Columns,
    check_filled,
    columns_of,
)
from prunelab.data.datasets import ImageSet
from prunelab.data.features import feature_names, features_of
from prunelab.data.labels import targets_of
from prunelab.data.pictures import decoded, is_picture
from prunelab.data.reading import Reading, reading
from prunelab.data.samples import ImageSamples, Samples, TargetSamples
from prunelab.data.sides import SampleSet
from prunelab.data.text import tokenized_columns
from prunelab.errors import DataError

Groups = Tensor | None


@dataclass(frozen=True)
class Side:
    """Samples, and the natural client of each, int64 [N], where the data say it."""

    samples: Samples
    groups: Groups = None


def as_samples(
    data: Any,
    *,
    resize: int | str | tuple[int, int] | None = None,
    columns: Mapping[str, str] | str | None = None,
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
    if is_loader(data):
        data = _dataset_of_loader(data)
    if is_samples(data):
        side = Side(data)
    elif isinstance(data, SampleSet):
        side = Side(data.train, data.train_groups)
    elif isinstance(data, ImageSet):
        side = Side(ImageSamples.of(data), data.train_groups)
    elif has_partitions(data):
        side = _of_partitions(data, how)
    elif is_pair(data):
        side = Side(_of_pair(data[0], data[1], how))
    else:
        side = _of_columns_or_items(data, how)
    return side


def _of_columns_or_items(data: Any, how: Reading) -> Side:
    if is_grouped(data):
        raise DataError(
            f"data is a mapping of {', '.join(map(repr, data))}; give one of them, such as the "
            "training side"
        )
    has_transform = getattr(data, "format", None) and data.format.get("type") == "custom"
    columns = None if has_transform else columns_of(data)
    if columns is not None:
        return _of_columns(columns, how)
    is_listed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if is_listed and not isinstance(data, str | bytes) and not is_array(data):
        return Side(samples_of_items(data, how))
    raise DataError(
        f"data is a {type(data).__name__}; expected (images, labels), a torch data set of (image, "
        "label), a Hugging Face data set, a frame of pandas, samples, or the name of a data set"
    )


def is_samples(data: Any) -> bool:
    """Whether an object has what `Samples` need, with nothing computed."""
    return hasattr(data, "ids") and callable(getattr(data, "batch", None))


def is_array(value: Any) -> bool:
    """Whether an object is a tensor or an array of numbers."""
    return isinstance(value, Tensor | np.ndarray)


def is_loader(data: Any) -> bool:
    """Whether it is a DataLoader of torch, or one like it."""
    return hasattr(data, "dataset") and hasattr(data, "batch_size") and hasattr(data, "collate_fn")


def has_partitions(data: Any) -> bool:
    """Whether it is a partitioner of flwr-datasets', or a federated data set."""
    return hasattr(data, "load_partition")


def is_grouped(data: Any) -> bool:
    """Whether it is a mapping of sides: of data sets, and not of columns or items."""
    sided = isinstance(data, Mapping) and {"train", "test", "validation"} & set(data)
    return bool(sided)


def is_pair(data: Any) -> bool:
    """Whether data are (images, labels) of all samples, and not a data set of two items."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    images, labels = data
    if is_array(images) or _is_frame(images):
        return is_array(labels) or isinstance(labels, list | tuple) or hasattr(labels, "__array__")
    return isinstance(images, list | tuple) and (
        is_array(labels)
        or (isinstance(labels, list) and all(isinstance(x, int | str | float) for x in labels))
    )


def _is_frame(data: Any) -> bool:
    return hasattr(data, "iloc") and hasattr(data, "columns")


def _of_pair(inputs: Any, labels: Any, how: Reading) -> Samples:
    if _is_frame(inputs):
        columns = columns_of(inputs)
        assert columns is not None
        names = feature_names(columns, how.feature_names or columns.names, ())
        made = _joined(features_of(columns, names), _listed(labels), how, (), "data")
        made.feature_names = tuple(names)
        return made
    if not is_array(inputs):
        inputs = _images_of(
            ((f"the image of sample {row}", cell) for row, cell in enumerate(inputs)), how
        )
    elif how.resize is not None:
        images = checked_images(inputs).numpy()
        inputs = _images_of(
            ((f"the image of sample {row}", cell) for row, cell in enumerate(images)), how
        )
    return _joined(inputs, _listed(labels), how, (), "data")


def _listed(labels: Any) -> Any:
    """Labels as they are; those of pandas as a list."""
    return labels.tolist() if hasattr(labels, "iloc") else labels


def _of_columns(columns: Columns, how: Reading) -> Side:
    """Pictures, texts or numbers, whichever the columns hold."""
    client = columns.pick(how.column("client"), CLIENT_NAMES, "client")
    groups = None if client is None else _groups(columns, client)
    label = columns.pick(how.column("label"), LABEL_NAMES, "label")
    image = None if how.features or how.column("text") else _image_column(columns, how)
    if image is None and not how.features:
        text = columns.pick(how.column("text"), TEXT_NAMES, "text")
        if text is not None or how.tokenizer is not None:
            return Side(_texts(columns, text, label, how), groups)
    if label is None:
        raise DataError(
            f"{columns.where}: no column is called as a label is ({', '.join(LABEL_NAMES)}); "
            f"{columns.listed}; say which is to be predicted: columns={{'label': ...}}, or "
            "--target ... of a command"
        )
    where = f"{columns.where}, column {label!r}"
    values, features = columns.read(label), list[str]()
    check_filled(values if isinstance(values, list) else (), where, what="label")
    if image is not None:
        cells = ((f"{columns.where}, row {r}", _cell(c)) for r, c in enumerate(columns.read(image)))
        inputs = _images_of(cells, how)
    else:
        features = feature_names(columns, how.features, (label, client))
        inputs = features_of(columns, features)
    names_of_classes = columns.class_names.get(label, ())
    made = _joined(inputs, values, how, names_of_classes, where)
    made.feature_names = tuple(features)
    return Side(made, groups)


def _image_column(columns: Columns, how: Reading) -> str | None:
    wanted = how.column("image")
    if wanted is not None or not columns.pictures:
        found = columns.pick(wanted, (), "image")
        usual = [name for name in columns.names if name.lower() in IMAGE_NAMES]
        return found or columns.only([n for n in usual if _is_image(columns.first(n))], "image")
    named = [name for name in columns.pictures if name.lower() in IMAGE_NAMES]
    return columns.only(named or columns.pictures, "image")


def _is_image(cell: Any) -> bool:
    """Whether a cell can be an image: no number and no text."""
    return not (cell is None or isinstance(cell, str | int | float | np.generic))


def _cell(cell: Any) -> Any:
    """A picture as parquet files and undecoded columns have it: its bytes."""
    return cell["bytes"] if isinstance(cell, Mapping) and "bytes" in cell else cell


def _texts(columns: Columns, text: str | None, label: str | None, how: Reading) -> Samples:
    if how.tokenizer is None:
        raise DataError(
            f"{columns.where}: column {text!r} holds texts, which need a tokenizer: "
            "datapruning.tokenized(data, tokenizer) makes samples of them; or name columns of "
            "numbers: columns={'features': 'a+b'}"
        )
    return tokenized_columns(
        columns, how.tokenizer, text=text, label=label, max_length=how.max_length,
        class_names=how.class_names,
    )  # fmt: skip


def _groups(columns: Columns, client: str) -> Tensor:
    """Names of natural clients as 0, 1, 2 in their order, int64 [N]."""
    values = columns.read(client)
    check_filled(values, f"{columns.where}, column {client!r}")
    kinds = {type(value) for value in values}
    if len(kinds) > 1 or not kinds <= {int, str}:
        raise DataError(
            f"{columns.where}: column {client!r} holds "
            f"{' and '.join(sorted(kind.__name__ for kind in kinds))}; expected one name or whole "
            "number for each sample"
        )
    return whole_numbers(np.unique(values, return_inverse=True)[1], "clients")


def _joined(
    inputs: Any, values: Any, how: Reading, class_names: Sequence[str], where: str
) -> ImageSamples | TargetSamples:
    """Samples of inputs and what is to be predicted of each."""
    names = how.class_names or class_names or how.class_names
    targets = targets_of(values, class_names=names, kind=how.kind, where=where)
    if len(inputs) != len(targets.values):
        raise DataError(
            f"{where}: {len(inputs)} images but {len(targets.values)} labels; expected one of each "
            "a sample"
        )
    kind = ImageSamples if targets.are_classes else TargetSamples
    return kind(inputs, targets.values, class_names=targets.class_names)


def _images_of(cells: Iterator[tuple[str, Any]], how: Reading) -> Array:
    return decoded(cells, where="data", resize=how.resize)


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
    how = how or Reading()
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

    images = _images_of(cells(), how)
    again = _checked_cell(item_of(data[0], 0, how)[0], 0)
    if not np.array_equal(np.asarray(again), np.asarray(first[0]), equal_nan=is_array(again)):
        raise DataError(
            "sample 0 is another one each time it is read; leave random transforms out "
            "(TrainingConfig(augment=True) has crops and flips for training)"
        )
    return _joined(images, labels, how, _class_names_of(data), "data")


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
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        raise DataError(
            f"the DataLoader's data set, a {type(dataset).__name__}, is read in one go and has no "
            "samples by number; give one with __getitem__ and __len__"
        )
    return dataset


# --- partitions of flwr-datasets -----------------------------------------------------------------


def _of_partitions(data: Any, how: Reading) -> Side:
    """All samples of all partitions, the number of the partition as the client."""
    import datasets  # noqa: PLC0415

    partitioners = getattr(data, "partitioners", None)
    split = None
    if partitioners is not None:  # a federated data set, with a partitioner for each split
        split = "train" if "train" in partitioners else next(iter(partitioners))
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
