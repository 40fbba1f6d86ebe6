"""What the name of data means: pictures, tables, arrays, or what a function gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunelab.data.array_files import are_arrays, read_arrays
from prunelab.data.datasets import DATASETS, check_dataset
from prunelab.data.reading import Reading
from prunelab.data.table_folders import TABLE_SUFFIXES, is_folder_of_tables, tables_of_folder
from prunelab.data.tables import read_table
from prunelab.errors import DataError
from prunelab.runs.imported import imported


def names_pictures(name: str, how: Reading) -> bool:
    """Whether it is what `datasets.sources` reads: one of DATASETS, or a folder of pictures."""
    path = Path(name)
    if name in DATASETS or not path.is_dir():
        return name in DATASETS
    return not are_arrays(path) and not is_folder_of_tables(path, how)


def data_of(name: str) -> Any:
    """Columns, arrays, or whatever a function gives, under a name that is none of pictures.

    Raises:
        DataError: there are no such data.
    """
    path = Path(name)
    if path.exists() and are_arrays(path):
        return read_arrays(path)
    if path.is_dir():
        return tables_of_folder(path)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return read_table(path)
    if ":" not in name:
        check_dataset(name)
    try:
        made = imported(name)
    except ImportError as error:
        raise DataError(f"data set {name!r}: {error}") from error
    return made() if callable(made) and not hasattr(made, "__getitem__") else made
