"""Named columns of what people have: data sets of Hugging Face, frames of pandas, rows, files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunelab.data.tables import Table
from prunelab.errors import DataError

IMAGE_NAMES = ("image", "img", "images", "pixel_values", "input", "inputs", "x")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "targets", "y")
TEXT_NAMES = ("text", "sentence", "content", "document", "review")


@dataclass(frozen=True)
class Columns:
    """Columns by name, each read when it is asked for.

    Attributes:
        names: in their order.
        read: the values of a column, one a row; where a cell is missing, None or NaN.
        class_names: of the columns whose numbers are classes with a name.
        where: what errors begin with, such as a file.
    """

    names: tuple[str, ...]
    read: Callable[[str], Any]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    where: str = "data"

    def pick(self, wanted: str | None, usual: Sequence[str], what: str) -> str | None:
        """The column that is wanted, or the one of a usual name; None where there is none.

        Raises:
            DataError: no column of the wanted name, or several of the usual names.
        """
        if wanted is not None:
            if wanted not in self.names:
                raise DataError(
                    f"{self.where}: no column {wanted!r} for the {what}; columns: "
                    f"{', '.join(map(repr, self.names))}"
                )
            return wanted
        found = [name for name in self.names if name.lower() in usual]
        if len(found) > 1:
            raise DataError(
                f"{self.where}: the {what} could be {' or '.join(map(repr, found))}; say which"
            )
        return found[0] if found else None


def columns_of(data: Any, *, where: str = "data") -> Columns | None:
    """The columns of a data set of Hugging Face, a frame of pandas, a table, a list of mappings or
    a mapping of lists and arrays; None where it is none of these.

    Raises:
        DataError: a row of a list without a column that the first row has.
    """
    if isinstance(data, Columns):
        return data
    if isinstance(data, Table):
        return Columns(tuple(data.column_names), data.__getitem__, where=str(data.path))
    if hasattr(data, "column_names") and hasattr(data, "with_format"):
        return _of_hugging_face(data, where)
    if hasattr(data, "columns") and hasattr(data, "iloc"):
        return _of_pandas(data, where)
    if isinstance(data, Mapping) and data and all(isinstance(name, str) for name in data):
        return Columns(tuple(data), data.__getitem__, where=where)
    if isinstance(data, list | tuple) and data and all(isinstance(row, Mapping) for row in data):
        return _of_rows(data, where)
    return None


def _of_hugging_face(data: Any, where: str) -> Columns:
    plain = data.with_format(None)
    names = {}
    for name, feature in data.features.items():
        inner = getattr(feature, "feature", feature)  # of lists: classes of several a sample
        if getattr(inner, "names", None):
            names[name] = tuple(map(str, inner.names))
    return Columns(tuple(data.column_names), lambda name: plain[name][:], names, where)


def _of_pandas(frame: Any, where: str) -> Columns:
    names = tuple(map(str, frame.columns))
    place = {name: number for number, name in enumerate(names)}
    if len(place) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where} has two columns called {twice!r}; rename one of them")
    return Columns(names, lambda name: frame.iloc[:, place[name]].tolist(), where=where)


def _of_rows(rows: Sequence[Mapping[str, Any]], where: str) -> Columns:
    def read(name: str) -> list[Any]:
        for number, row in enumerate(rows):
            if name not in row:
                raise DataError(f"{where}: row {number} has no {name!r}, as row 0 has")
        return [row[name] for row in rows]

    return Columns(tuple(map(str, rows[0])), read, where=where)
