"""Folders of pictures, a folder for each class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunelab.data.arrays import Array, note
from prunelab.data.columns import in_order
from prunelab.data.reading import TEST_NAMES, TRAIN_NAMES
from prunelab.errors import DataError

PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)
_SIDES = ("train", "test", "val")
_NOT_DATA = frozenset({"__pycache__", "__MACOSX"})


@dataclass(frozen=True)
class ClassFolders:
    """The pictures of one side.

    Attributes:
        labels: int64 [N].
        cells: row numbers -> the file and the bytes of each picture.
        class_names: of the folders, in sorted order: of whole numbers, 9 before 10.
    """

    labels: Array
    cells: Callable[[Array], Iterator[tuple[str, Any]]]
    class_names: tuple[str, ...]


def side_folders(folder: Path) -> tuple[Path, Path | None]:
    """Where the training and the test side lie: in folders train and test, or val; else here."""
    train = _named(folder, TRAIN_NAMES)
    if not train:
        return folder, None
    test = _named(folder, TEST_NAMES)
    if len(test) > 1:
        left = ", ".join(path.name for path in test[1:])
        note(f"{folder}: the test side is {test[0].name}; not read: {left}")
    return train[0], test[0] if test else None


def read_classes(folder: Path, *, class_names: Sequence[str] | None = None) -> ClassFolders:
    """The pictures of each class, in the order of their names, at any depth.

    Hidden files and what is no picture by its suffix are passed over and counted in a warning;
    folders that Python and archivers leave are no classes.

    Args:
        class_names: of the run, or of another side: their order numbers the classes, and one may
            be missing here; by default those of the folders, sorted: as numbers where all are
            whole numbers, else as texts.

    Raises:
        DataError: no folder of a class, one that is a side instead, no picture, or a class that is
            none of those; damaged pictures once they are read, by name.
    """
    found = [folder / name for name in in_order([path.name for path in shown_folders(folder)])]
    others = sum(path.is_file() for path in folder.iterdir())
    if not found:
        raise DataError(
            f"{folder} has no folders of classes; expected {folder.name}/CLASS/picture.png (or "
            "parquet files, or train.csv)"
        )
    for path in found:
        if path.name.lower().startswith(_SIDES) or path.name.lower().endswith(_SIDES):
            _check_no_side(path)
    names = tuple(class_names or ()) or tuple(path.name for path in found)
    unknown = [path.name for path in found if path.name not in names]
    if unknown:
        raise DataError(
            f"{folder} has the class {unknown[0]!r}, which is none of {', '.join(map(repr, names))}"
        )
    files: list[Path] = []
    labels: list[int] = []
    for path in found:
        inside = sorted(entry for entry in path.rglob("*") if entry.is_file())
        pictures = [entry for entry in inside if _is_picture(entry.relative_to(path))]
        others += len(inside) - len(pictures)
        if not pictures:
            note(f"{folder}: the class {path.name!r} has no pictures")
        files += pictures
        labels += [names.index(path.name)] * len(pictures)
    if not files:
        raise DataError(
            f"{folder}: no pictures in its {len(found)} folders of classes; expected files such as "
            "CLASS/picture.png"
        )
    if others:
        note(f"{folder}: {others} files are hidden or no pictures, and were passed over")

    def cells(rows: Array) -> Iterator[tuple[str, Any]]:
        for row in rows.tolist():
            try:
                data = files[row].read_bytes()
            except OSError as error:
                raise DataError(f"{files[row]} cannot be read: {error}") from None
            yield str(files[row]), data

    return ClassFolders(np.array(labels, np.int64), cells, names)


def shown_folders(folder: Path) -> list[Path]:
    """Those that hold data, sorted: none is hidden, or left by Python or an archiver."""
    found = (path for path in folder.iterdir() if path.is_dir())
    return sorted(p for p in found if not p.name.startswith(".") and p.name not in _NOT_DATA)


def _named(folder: Path, names: Sequence[str]) -> list[Path]:
    folders = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    return [folders[name] for name in names if name in folders]


def _check_no_side(folder: Path) -> None:
    """Refuse a folder of folders alone, which its name calls a side."""
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if inside and all(path.is_dir() for path in inside):
        raise DataError(
            f"{folder} holds folders alone, so it is no class; is it a side? Call the folders of "
            f"the sides {folder.parent.name}/train and {folder.parent.name}/test"
        )


def _is_picture(path: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.parts)
    return not is_hidden and path.suffix.lower() in PICTURE_SUFFIXES
