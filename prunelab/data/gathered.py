"""Inputs and targets of pairs of arrays, of columns and of tables, in numpy's arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prunelab.data.arrays import Array, image_array, is_array, whole_array
from prunelab.data.columns import (
    CLIENT_NAMES,
    IMAGE_NAMES,
    LABEL_NAMES,
    TEXT_NAMES,
    Columns,
    check_filled,
    client_numbers,
    columns_of,
)
from prunelab.data.features import feature_names, features_of
from prunelab.data.labels import Targets, targets_of
from prunelab.data.pictures import decoded
from prunelab.data.reading import TEST_NAMES, Reading
from prunelab.errors import DataError


@dataclass(frozen=True, eq=False)
class Gathered:
    """Samples before they are checked as images or features.

    Attributes:
        inputs: [N, ...], what `image_array` takes.
        targets: of each sample.
        feature_names: of the columns that inputs came from, where they came from some.
        groups: natural client of each, int64 [N], where the data say it.
    """

    inputs: Any
    targets: Targets
    feature_names: tuple[str, ...] = ()
    groups: Array | None = None


def gathered(data: Any, how: Reading) -> Gathered | None:
    """Of the training side of data that are a pair or have columns; None of any other.

    Raises:
        DataError: as `gathered_pair` and `gathered_columns`.
    """
    if is_grouped(data) and "train" in data:
        data = data["train"]
    if is_pair(data):
        return gathered_pair(data[0], data[1], how)
    columns = None if is_grouped(data) else plain_columns(data)
    return None if columns is None else gathered_columns(columns, how)


def plain_columns(data: Any) -> Columns | None:
    """The columns of data that are given as they are stored; None where there are none."""
    has_transform = getattr(data, "format", None) and data.format.get("type") == "custom"
    is_streamed = hasattr(data, "with_format") and not hasattr(data, "__len__")
    return None if has_transform or is_streamed else columns_of(data)


def is_grouped(data: Any) -> bool:
    """Whether it is a mapping of sides: of data sets, and not of columns or items."""
    if not isinstance(data, Mapping):
        return False
    # A column may well be called "val".
    return bool({"train", "test", "validation"} & set(data)) or 0 < len(data) == len(
        set(data) & set(TEST_NAMES)
    )


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


def gathered_pair(inputs: Any, labels: Any, how: Reading) -> Gathered:
    """Of arrays, lists of pictures or a frame of pandas, and what is to be predicted of each.

    Raises:
        DataError: other numbers of them, or what `targets_of` cannot take.
    """
    if _is_frame(inputs):
        columns = columns_of(inputs)
        assert columns is not None
        names = feature_names(columns, how.feature_names or columns.names, ())
        made = joined(features_of(columns, names), _listed(labels), how)
        return replace(made, feature_names=tuple(names))
    if not is_array(inputs) or how.resize is not None:
        images = image_array(inputs) if is_array(inputs) else inputs
        cells = ((f"the image of sample {row}", cell) for row, cell in enumerate(images))
        inputs = images_of(cells, how)
    return joined(inputs, _listed(labels), how)


def text_column(columns: Columns, how: Reading) -> tuple[str | None, bool]:
    """The column of texts, and whether texts are meant: there are some, or there is a tokenizer."""
    if how.features or _image_column(columns, how) is not None:
        return None, False
    text = columns.pick(how.column("text"), TEXT_NAMES, "text")
    return text, text is not None or how.tokenizer is not None


def client_groups(columns: Columns, how: Reading) -> tuple[str | None, Array | None]:
    """The column of natural clients and the number of each row's, int64 [N], where there is one."""
    client = columns.pick(how.column("client"), CLIENT_NAMES, "client")
    if client is None:
        return None, None
    names_of_clients = (columns.fields or columns.read)(client)
    numbers = client_numbers(names_of_clients, f"{columns.where}, column {client!r}")
    return client, whole_array(numbers, "clients")


def gathered_columns(columns: Columns, how: Reading) -> Gathered:
    """Pictures or numbers, whichever the columns hold, beside the label.

    Raises:
        DataError: texts, no rows, no label, or cells that are no such values.
    """
    client, groups = client_groups(columns, how)
    label = columns.pick(how.column("label"), LABEL_NAMES, "label")
    text, are_texts = text_column(columns, how)
    if are_texts:
        raise DataError(
            f"{columns.where}: column {text!r} holds texts, which need a tokenizer: "
            "datapruning.tokenized(data, tokenizer) makes samples of them; or name columns of "
            "numbers: columns={'features': 'a+b'}"
        )
    image = _image_column(columns, how)
    if columns.names and not len(columns.read(columns.names[0])):
        raise DataError(f"{columns.where}: no samples")
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
        inputs = images_of(cells, how)
    else:
        features = feature_names(columns, how.features, (label, client))
        inputs = features_of(columns, features)
    names_of_classes = columns.class_names.get(label, ())
    fields = columns.fields(label) if columns.fields else None
    made = joined(inputs, values, how, class_names=names_of_classes, where=where, fields=fields)
    return replace(made, feature_names=tuple(features), groups=groups)


def joined(
    inputs: Any,
    values: Any,
    how: Reading,
    *,
    class_names: Sequence[str] = (),
    where: str = "data",
    fields: Sequence[Any] | None = None,
) -> Gathered:
    """Inputs, and what is to be predicted of each.

    Args:
        class_names: that these data give to their numbers.
        fields: as of `targets_of`.

    Raises:
        DataError: other numbers of them, or what `targets_of` cannot take.
    """
    targets = targets_of(
        values, class_names=how.class_names, own_names=class_names, fields=fields, kind=how.kind,
        lists=how.lists, where=where,
    )  # fmt: skip
    if len(inputs) != len(targets.values):
        raise DataError(
            f"{where}: {len(inputs)} images but {len(targets.values)} labels; expected one of each "
            "a sample"
        )
    return Gathered(inputs, targets)


def images_of(cells: Iterator[tuple[str, Any]], how: Reading) -> Array:
    """Pictures or arrays, as `decoded` has them."""
    return decoded(cells, where="data", resize=how.resize)


def _is_frame(data: Any) -> bool:
    return hasattr(data, "iloc") and hasattr(data, "columns")


def _listed(labels: Any) -> Any:
    """Labels as they are; those of pandas as lists."""
    if _is_frame(labels):
        columns = columns_of(labels)
        assert columns is not None
        return [list(row) for row in zip(*map(columns.read, columns.names), strict=True)]
    return labels.tolist() if hasattr(labels, "iloc") else labels


def _image_column(columns: Columns, how: Reading) -> str | None:
    """The column of pictures; None where there is none, or something else is named."""
    if how.features or how.column("text"):
        return None
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
