"""Folders of tables: train.csv and test.csv, or the same in parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunelab.data.arrays import note
from prunelab.data.columns import Columns, columns_of, typed
from prunelab.data.parquet import has_side, holds_tables, side_files
from prunelab.data.reading import TEST_NAMES, Reading
from prunelab.data.tables import read_table
from prunelab.errors import DataError

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")


def is_folder_of_tables(folder: Path, how: Reading) -> bool:
    """Whether it holds the table train, and not pictures."""
    if any((folder / f"train{suffix}").is_file() for suffix in TABLE_SUFFIXES[:2]):
        return True
    return holds_tables(folder, "train", dict(how.columns))


def tables_of_folder(folder: Path) -> dict[str, Columns]:
    """The tables train and test; a folder's single table may be in several files.

    Raises:
        DataError: files that cannot be joined, or that are no tables.
    """
    sides = {}
    for side, names in (("train", ("train",)), ("test", TEST_NAMES)):
        called = [f"{name}{suffix}" for name in names for suffix in TABLE_SUFFIXES[:2]]
        texts = [folder / name for name in called if (folder / name).is_file()]
        if texts:
            files = [path for path in texts if path.stem == texts[0].stem]
            note_left(folder, texts[0].stem, [path.name for path in texts if path not in files])
        elif has_side(folder, names):
            files = side_files(folder, names)
        else:
            continue
        sides[side] = _joined_columns(folder, [columns_of(read_table(path)) for path in files])
    return sides


def note_left(where: str | Path, side: str, left: Sequence[str]) -> None:
    """Say what else could have been the test side."""
    if left:
        note(f"{where}: the test side is {side}; not read: {', '.join(left)}")


def _joined_columns(folder: Path, parts: list[Columns | None]) -> Columns:
    """The columns of several files, one below the other."""
    files = [part for part in parts if part is not None]
    if len(files) == 1:
        return files[0]
    for part in files[1:]:
        if part.names != files[0].names:
            raise DataError(f"{part.where}: {part.listed}; {files[0].where} has others")
        if part.class_names != files[0].class_names:
            raise DataError(
                f"{part.where} names or numbers classes in another way than {files[0].where}; "
                "write both alike"
            )

    def joined(name: str) -> list[Any]:
        return [value for part in files for value in (part.fields or part.read)(name)]

    return replace(
        files[0], read=lambda name: typed(joined(name)), where=str(folder), fields=joined
    )
