"""Tables of other programs: text with a delimiter, and parquet, read as their own readers do.

Text is UTF-8 (or what its byte order mark says). Fields with commas or semicolons between them may
be quoted, with line breaks inside. With tabs between them they are taken as they are, quotes and
all, since those who write such files do not quote; unless the first line does. Empty lines are
passed over.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunelab.errors import DataError

DELIMITERS = ("\t", ",", ";")
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_LIMIT = threading.Lock()  # csv has one limit for the whole process


@dataclass(frozen=True)
class Table:
    """Columns by name, each read when it is asked for.

    Attributes:
        column_names: in the order of the file.
        values: reads a column.
        long_rows: last lines of rows with a line break inside quotes, which a quote too few makes
            as well.
        class_names: of the columns whose numbers are classes with a name.
    """

    path: Path
    column_names: Sequence[str]
    values: Callable[[str], Sequence[Any]]
    long_rows: Sequence[int] = ()
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Sequence[Any]:
        if list(self.column_names).count(name) > 1:
            raise DataError(f"{self.path} has two columns called {name!r}; rename one of them")
        return self.values(name)


def read_table(path: Path) -> Table:
    """A .parquet file, or a text whose first line names its columns.

    Raises:
        DataError: no such file, no table, or a line with another number of fields; says where.
    """
    return parquet_table(path) if path.suffix == ".parquet" else _delimited(path)


def parquet_table(path: Path) -> Table:
    """A parquet file; a column that nobody asks for may be of any type."""
    pyarrow = imported_pyarrow(path)
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a readable parquet file ({error})") from None

    def values(name: str) -> Sequence[Any]:
        try:
            column: list[Any] = file.read(columns=[name])[name].to_pylist()
        except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}: column {name!r} cannot be read ({error})") from None
        return column

    names = named_classes(file.schema_arrow)
    return Table(path, file.schema_arrow.names, values, class_names=names)


def imported_pyarrow(path: Path) -> Any:
    """The package that reads parquet.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: PLC0415
    except ModuleNotFoundError:
        raise DataError(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
    return pyarrow


def named_classes(schema: Any) -> dict[str, tuple[str, ...]]:
    """Names of classes, by column, that Hugging Face's libraries leave in a table's metadata."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        found = {
            column: feature.get("feature", feature).get("names")
            for column, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("feature", {}), dict)
        }
        return {column: tuple(map(str, names)) for column, names in found.items() if names}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def read_lines(path: Path) -> list[str]:
    """The lines of a text, without their ends; no other character ends a line.

    Raises:
        DataError: no such file, or no text; says where.
    """
    lines = _text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not {encoding} ({error.reason}); save it as UTF-8, such as by "
            "iconv -f LATIN1 -t UTF-8"
        ) from None


def _delimited(path: Path) -> Table:
    text = _text(path)
    first = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    if not first.strip():
        raise DataError(f"{path} is empty")
    delimiter = next((mark for mark in DELIMITERS if mark in first), ",")
    plain = delimiter == "\t" and not first.startswith('"')
    rows = _rows_of_tabs(path) if plain else _rows(text, delimiter, path)
    _, header = next(rows)
    if any(value.strip().isdecimal() for value in header):
        raise DataError(
            f"{path} needs a first line with the names of its columns, such as user, item, time; "
            f"got {first[:60]!r}"
        )
    body, long_rows = [], []
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path}, line {line}: {len(row)} values for {len(header)} columns")
        body.append(row)
        if any("\n" in field or "\r" in field for field in row):
            long_rows.append(line)
    place = {name: number for number, name in enumerate(header)}
    return Table(path, header, lambda name: [row[place[name]] for row in body], long_rows)


def _rows_of_tabs(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(read_lines(path), start=1):
        if line:
            yield number, line.split("\t")


def _rows(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The last line of each row and its fields, quoted or not."""
    with _LIMIT:
        before = csv.field_size_limit(max(len(text), 1))
        try:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            rows = [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: {error}; a quote within a quoted field is "
                'written twice (""), and a field that begins with a quote is quoted as a whole'
            ) from None
        finally:
            csv.field_size_limit(before)
    yield from rows
