"""Named columns of what people have: data sets of Hugging Face, frames of pandas, rows, files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prunelab.data.arrays import Array
from prunelab.data.tables import Table
from prunelab.errors import DataError

IMAGE_NAMES = ("image", "img", "images", "pixel_values", "input", "inputs", "x")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "targets", "y")
TEXT_NAMES = ("text", "sentence", "content", "document", "review")
CLIENT_NAMES = ("client",)

_WHOLE = re.compile(r"[+-]?(0|[1-9]\d*)", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Columns:
    """Columns by name, each read when it is asked for.

    Attributes:
        names: in their order.
        read: the values of a column, one a row; a cell without a value is None or NaN.
        class_names: of the columns whose numbers are classes with a name.
        pictures: names of the columns that are known to hold pictures.
        where: what errors begin with, such as a file.
        fields: as `read`, before texts of numbers are taken as numbers; None: the same.
    """

    names: tuple[str, ...]
    read: Callable[[str], Any]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
    where: str = "data"
    fields: Callable[[str], Sequence[Any]] | None = None

    def pick(self, wanted: str | None, usual: Sequence[str], what: str) -> str | None:
        """The column that is wanted, or the one of a usual name; None where there is none.

        Raises:
            DataError: no column of the wanted name, or several of the usual names.
        """
        if wanted is not None:
            if wanted not in self.names:
                raise DataError(f"{self.where}: no column {wanted!r} for the {what}; {self.listed}")
            return wanted
        return self.only([name for name in self.names if name.lower() in usual], what)

    def only(self, found: Sequence[str], what: str) -> str | None:
        """The one that was found; None where none was.

        Raises:
            DataError: several.
        """
        if len(found) > 1:
            raise DataError(
                f"{self.where}: the {what} could be {' or '.join(map(repr, found))}; say which: "
                f"columns={{{what!r}: ...}}, or {what}=... in a setting"
            )
        return found[0] if found else None

    @property
    def listed(self) -> str:
        """All names, for an error."""
        return f"columns: {', '.join(map(repr, self.names))}"

    def first(self, name: str) -> Any:
        """The first cell of a column, None where there is no row."""
        return next(iter(self.read(name)), None)


def columns_of(data: Any, *, where: str = "data") -> Columns | None:
    """The columns of a data set of Hugging Face, a frame of pandas, a table, a list of mappings or
    a mapping of lists and arrays; None where it is none of these.

    Raises:
        DataError: a row of a list without a column that the first row has.
    """
    found: Columns | None = None
    if isinstance(data, Columns):
        found = data
    elif isinstance(data, Table):
        found = Columns(
            tuple(data.column_names), lambda name: typed(data[name]), data.class_names,
            where=str(data.path), fields=data.__getitem__,
        )  # fmt: skip
    elif hasattr(data, "column_names") and hasattr(data, "with_format"):
        found = _of_hugging_face(data, where)
    elif hasattr(data, "columns") and hasattr(data, "iloc"):
        found = _of_pandas(data, where)
    elif isinstance(data, Mapping) and data and all(isinstance(name, str) for name in data):
        found = Columns(tuple(data), data.__getitem__, where=where)
    elif isinstance(data, list | tuple) and data and all(isinstance(r, Mapping) for r in data):
        found = _of_rows(data, where)
    return found


def check_filled(values: Iterable[Any], where: str, *, what: str = "value") -> None:
    """Raise DataError, naming the row, if a cell is None, NaN or an empty text."""
    for row, value in enumerate(values):
        if value is None or value == "" or (isinstance(value, float) and np.isnan(value)):
            raise DataError(f"{where}: row {row} has no {what}; fill it in or leave the row out")


def typed(values: Sequence[Any]) -> Sequence[Any]:
    """Fields of a text file as whole numbers or floats where all of them are written as such.

    Whole numbers have no leading zeros: 01 and 1 may be two names.

    >>> typed(["1", "2"]), typed(["1", ".5", ""]), typed(["1", "a"]), typed(["01", "1_1"])
    ([1, 2], [1.0, 0.5, None], ['1', 'a'], ['01', '1_1'])
    """
    filled = [value for value in values if value != ""]
    if not filled or not all(isinstance(value, str) for value in filled):
        return values
    texts = [value.strip() for value in filled]
    if all(_WHOLE.fullmatch(text) for text in texts):
        return [None if value == "" else int(value) for value in values]
    is_padded = any(text.lstrip("+-").isdecimal() and not _WHOLE.fullmatch(text) for text in texts)
    if not is_padded and all(_DECIMAL.fullmatch(text) for text in texts):
        return [None if value == "" else float(value) for value in values]
    return values


def client_numbers(values: Sequence[Any], where: str) -> Array:
    """Names of natural clients as 0, 1, 2 in their order, int64 [N]; 9 comes before 10.

    Raises:
        DataError: a cell without a name, or with none that is a text or a whole number; all have to
            be of one type.
    """
    check_filled(values, where)
    kinds = {"text" if isinstance(value, str) else type(value).__name__ for value in values}
    if len(kinds) > 1 or not kinds <= {"int", "text"}:
        raise DataError(
            f"{where} holds {' and '.join(sorted(kinds))}; expected one name or whole number for "
            "each sample, of one type in all files"
        )
    number = {name: place for place, name in enumerate(in_order(set(values)))}
    return np.array([number[value] for value in values], np.int64)


def in_order(names: Iterable[Any]) -> list[Any]:
    """Names sorted: as numbers where all are whole numbers, else as texts.

    >>> in_order(["10", "9", "0"]), in_order(["10", "9", "a"])
    (['0', '9', '10'], ['10', '9', 'a'])
    """
    found = list(names)
    are_whole = all(isinstance(name, str) and name.isascii() and name.isdigit() for name in found)
    return sorted(found, key=lambda name: (int(name), name)) if are_whole else sorted(found)


def _of_hugging_face(data: Any, where: str) -> Columns:
    plain = data.with_format(None)
    names: dict[str, tuple[str, ...]] = {}
    pictures: list[str] = []
    dtypes: dict[str, str] = {}
    for name, feature in data.features.items():
        inner = getattr(feature, "feature", feature)  # of lists: classes of several a sample
        if getattr(inner, "names", None):
            names[name] = tuple(map(str, inner.names))
        if type(feature).__name__ == "Image":
            pictures.append(name)
        if type(feature).__name__ in ("Array2D", "Array3D", "Array4D", "Array5D"):
            dtypes[name] = feature.dtype

    def read(name: str) -> Any:
        if name in dtypes:  # as lists they would lose their type
            return np.array(plain[name][:], dtypes[name])
        # A column of pictures is decoded as it is walked through, not all at once.
        return plain[name] if name in pictures else plain[name][:]

    return Columns(tuple(data.column_names), read, names, tuple(pictures), where)


def _of_pandas(frame: Any, where: str) -> Columns:
    names = tuple(map(str, frame.columns))
    place = {name: number for number, name in enumerate(names)}
    if len(place) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where} has two columns called {twice!r}; rename one of them")

    def read(name: str) -> list[Any]:
        column = frame.iloc[:, place[name]]
        values: list[Any] = column.astype(object).where(column.notna(), None).tolist()
        return values

    return Columns(names, read, where=where)


def _of_rows(rows: Sequence[Mapping[str, Any]], where: str) -> Columns:
    def read(name: str) -> list[Any]:
        for number, row in enumerate(rows):
            if name not in row:
                raise DataError(f"{where}: row {number} has no {name!r}, as row 0 has")
        return [row[name] for row in rows]

    return Columns(tuple(map(str, rows[0])), read, where=where)
