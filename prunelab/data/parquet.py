"""Folders of parquet files with pictures: which files are a side, and their columns by name."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunelab.data.arrays import Array, note
from prunelab.data.columns import client_numbers
from prunelab.data.labels import as_classes
from prunelab.data.tables import imported_pyarrow, named_classes, parquet_table
from prunelab.errors import DataError

IMAGE_COLUMNS = ("img", "image")
LABEL, CLIENT = "label", "client"

_FILE = re.compile(
    r"(?P<number>[-_.]?(part|shard|chunk)?[-_.]?\d+([-_.]of[-_.](?P<total>\d+))?"
    r"(?P<mark>[-_.][0-9a-f]{16})?)?\.(parquet|tar)"
)
"""What follows the name of a side: nothing, or a number, "-of-" how many, the hub's older mark."""


@dataclass(frozen=True)
class Pictures:
    """One side of a folder.

    Attributes:
        labels: int64 [N].
        cells: row numbers -> the place and the bytes of each picture.
        groups: natural client of each sample, int64 [N], where the files have the column.
        class_names: of the classes 0, 1, ..., where the files name them.
    """

    labels: Array
    cells: Callable[[Array], Iterator[tuple[str, Any]]]
    groups: Array | None
    class_names: tuple[str, ...]


def read_side(
    folder: Path,
    names: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Pictures:
    """The pictures of the first of these sides that the folder has.

    Args:
        names: what its files are called, such as ("test", "validation"); see `side_files`.
        columns: the columns of "image", "label" and "client" that are called in another way.
        class_names: of the other side: what number the name of a class has; None: there is none.

    Raises:
        DataError: none of them, files that cannot be told from others, or columns that are no
            such data; names the file.
    """
    files = side_files(folder, names)
    parts = [part for part in (_read(file, columns or {}) for file in files) if len(part.labels)]
    if not parts:
        raise DataError(f"{files[0]}: the {names[0]} side has no samples")
    has_groups = {part.groups is not None for part in parts}
    if len(has_groups) > 1:
        odd = next(part.path for part in parts if part.groups is None)
        raise DataError(f"{odd} has no column {CLIENT!r}, as other files of its side have")
    starts = np.cumsum([0, *(len(part.labels) for part in parts)])

    def cells(rows: Array) -> Iterator[tuple[str, Any]]:
        for row in rows.tolist():
            number = int(np.searchsorted(starts, row, side="right")) - 1
            part, place = parts[number], row - int(starts[number])
            yield f"{part.path}: row {place}", _bytes(part.images[place].as_py())

    groups = None
    if has_groups == {True}:
        names_of_clients = [name for part in parts for name in part.groups or ()]
        groups = client_numbers(names_of_clients, f"{files[0]}: column {CLIENT!r}")
    where = str(parts[0].path if len(parts) == 1 else folder)
    # Each file may number its classes in an order of its own.
    known = class_names or next((p.class_names for p in parts if p.class_names), class_names)
    if known:
        of_parts = [
            as_classes(
                part.labels, class_names=known, own_names=part.class_names, where=str(part.path)
            )[0]
            for part in parts
        ]
        labels, found = np.concatenate(of_parts), tuple(known)
    else:
        values = [label for part in parts for label in part.labels]
        labels, found = as_classes(values, class_names=known, where=where)
    return Pictures(labels, cells, groups, found)


def has_side(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder has files of one of these sides."""
    return any(_called(folder, name) for name in names)


def holds_tables(folder: Path, name: str, columns: Mapping[str, str]) -> bool:
    """Whether the files of a side can be read and have no column of pictures."""
    found = []
    for path in _called(folder, name):
        with contextlib.suppress(DataError):
            found.append(image_column(parquet_table(path).column_names, columns))
    return bool(found) and not any(found)


def side_files(folder: Path, names: Sequence[str], *, suffix: str = ".parquet") -> list[Path]:
    """The files of the first of these sides that a folder has, in order.

    They are called NAME.parquet or numbered (NAME-00000-of-00002.parquet, NAME_1.parquet;
    0000.parquet in a folder NAME), and lie in one folder, the nearest to the top; a single file
    whose name begins with NAME serves, too. Hidden folders and files (. and _) are passed over.
    What is not read is named in a warning.

    Raises:
        DataError: no such files, several that could be meant, or one of several missing.
    """
    for place, name in enumerate(names):
        called = _called(folder, name, suffix)
        shown = [p for p in called if not any(x[0] in "._" for x in p.relative_to(folder).parts)]
        if not shown:
            continue
        found = _nearest(folder, name, shown)
        others = {path for side in names[place:] for path in _called(folder, side, suffix)}
        left = [str(path.relative_to(folder)) for path in sorted(others.difference(found))]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            note(
                f"{folder}: the {name} side is {_listed(found)}; not read: "
                f"{', '.join(left[:3])}{more}"
            )
        return found
    raise DataError(
        f"no {names[0]}*{suffix} in {folder}; expected train*{suffix} and test*{suffix}"
    )


def _called(folder: Path, name: str, suffix: str = ".parquet") -> list[Path]:
    return [
        path
        for path in sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())
        if path.name.startswith(name) or (path.parent != folder and path.parent.name == name)
    ]


def _nearest(folder: Path, name: str, shown: list[Path]) -> list[Path]:
    match = {path: _FILE.fullmatch(path.name.removeprefix(name)) for path in shown}
    proper = [path for path in shown if match[path]]
    advice = f"call them {name}.parquet, or {name}-00000-of-00002.parquet and so on"
    if not proper:
        if len(shown) == 1:
            return shown
        raise DataError(f"{folder}: {_listed(shown)} could each be the {name} side; {advice}")
    top = min(len(path.parts) for path in proper)
    found = [path for path in proper if len(path.parts) == top]
    places = sorted({str(path.parent) for path in found})
    if len(places) > 1:
        raise DataError(
            f"{folder}: {name} files lie in {' and in '.join(places[:2])}; name one of these "
            "folders, or put all files into one"
        )
    kinds = {(bool(m["number"]), m["total"], bool(m["mark"])) for p in found if (m := match[p])}
    if len(kinds) > 1:
        raise DataError(
            f"{folder}: {_listed(found)} are numbered in different ways, as two versions of one "
            f"side are; remove one, or {advice}"
        )
    ((_, total, _),) = kinds
    if total is not None and int(total) != len(found):
        raise DataError(
            f"{folder}: {len(found)} of the {int(total)} {name} files are there ({_listed(found)})"
        )
    return found


def _listed(paths: Sequence[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names if len(names) <= 3 else [names[0], "...", names[-1]])


@dataclass(frozen=True)
class _Part:
    """The columns of one file."""

    path: Path
    images: Any
    labels: Sequence[Any]
    groups: list[Any] | None
    class_names: tuple[str, ...]


def _read(path: Path, columns: Mapping[str, str]) -> _Part:
    pyarrow = imported_pyarrow(path)
    try:
        # Not read_table, to_numpy or take: they import pandas and more, for half a second.
        file = pyarrow.parquet.ParquetFile(path)
        image, label, client = picture_columns(path, file.schema_arrow.names, columns)
        wanted = [name for name in (image, label, client) if name in file.schema_arrow.names]
        table = file.read(columns=wanted)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    for name in wanted[1:]:
        if table[name].null_count:
            raise DataError(f"{path}: column {name!r} has {table[name].null_count} empty cells")
    values = table[label].to_pylist()
    labels = as_classes(values, where=str(path)) if values else None
    groups = table[client].to_pylist() if client in wanted else None
    names_of_classes = named_classes(table.schema).get(label, ())
    if labels is not None and not labels[1]:
        values = labels[0].tolist()
    return _Part(path, table[image], values, groups, names_of_classes)


def picture_columns(
    path: Path, names: Sequence[str], columns: Mapping[str, str]
) -> tuple[str, str, str]:
    """What the columns of pictures, labels and clients are called; the last need not be there.

    Raises:
        DataError: a column is missing, or there are two of its name.
    """
    image = image_column(names, columns)
    label, client = columns.get("label", LABEL), columns.get("client", CLIENT)
    if image is None or label not in names:
        pictures = columns.get("image") or f"{IMAGE_COLUMNS[0]} (or {IMAGE_COLUMNS[1]})"
        raise DataError(
            f"{path}: expected columns {pictures} and {label}, got {sorted(names)}; say which "
            "are meant by columns, such as image=picture,label=kind"
        )
    twice = next((n for n in (image, label, client) if list(names).count(n) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has two columns {twice!r}; rename one of them")
    return image, label, client


def image_column(names: Sequence[str], columns: Mapping[str, str]) -> str | None:
    """The column of pictures among these; None where there is none."""
    wanted = (columns["image"],) if "image" in columns else IMAGE_COLUMNS
    return next((name for name in wanted if name in names), None)


def _bytes(cell: Any) -> Any:
    return cell.get("bytes") if isinstance(cell, dict) else cell
