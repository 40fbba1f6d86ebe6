"""The files of a sharded data set: which they are, whether they changed, labels, order of reading.

Two kinds are read: parquet (`parquet_shards`) and tar as WebDataset has it (`tar_shards`).
"""

from __future__ import annotations

import glob
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from prunelab.data.batches import Integers
from prunelab.data.checked import checked_label, checked_labels
from prunelab.data.parquet import side_files
from prunelab.data.reading import TEST_NAMES
from prunelab.errors import DataError

SUFFIXES = (".parquet", ".tar")
BLOCK_BYTES = 1 << 20
"""About as many bytes of pictures are read at a time."""

_SIDES = ("train", *TEST_NAMES)


@dataclass(frozen=True)
class ShardFile:
    """A file as it was when the data set was opened."""

    path: Path
    size: int
    modified: int

    @classmethod
    def at(cls, path: Path) -> ShardFile:
        """The file as it is.

        Raises:
            DataError: there is none.
        """
        try:
            found = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        return cls(path, found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """Raise DataError if the file has changed, or is gone."""
        if ShardFile.at(self.path) != self:
            raise DataError(
                f"{self.path} has changed since it was opened; open the data again, and score anew"
            )

    def digest(self) -> str:
        """SHA-256 of the content, read in small pieces; once a process for a file as it is."""
        return _digest(self)


@lru_cache(maxsize=1 << 14)
def _digest(file: ShardFile) -> str:
    with file.path.open("rb") as opened:
        digits = hashlib.file_digest(opened, "sha256").hexdigest()
    file.check()
    return digits


def fingerprint_of(files: Sequence[ShardFile], **how: Any) -> str:
    """16 hexadecimal digits of the contents of files in their order, and of how they are read.

    Raises:
        DataError: a file has changed since it was opened.
    """
    for file in files:
        file.check()
    text = json.dumps([[file.digest() for file in files], how], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Layout:
    """How samples lie in files: in blocks, each read at once, and runs of blocks, read in order.

    Attributes:
        starts: row of each block's first sample, and behind it the number of samples.
        sizes: about how many bytes of pictures each block holds.
        runs: of each block, ascending; a block is reached past those before it in its run.
    """

    starts: Integers
    sizes: Integers
    runs: Integers

    def block_of(self, rows: Integers) -> Integers:
        """The block in which each row lies."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def order(self, rows: Integers, *, window: int, rng: np.random.Generator) -> Integers:
        """Places in `rows`, shuffled so that about `window` bytes are in use at a time.

        Runs come in random order; as many of their blocks as go into a window are shuffled sample
        by sample, then the next. Where the blocks of all rows go into one window, the order is
        `rng.permutation`, as of samples in memory.
        """
        blocks = self.block_of(rows)
        used = np.unique(blocks)
        if self.sizes[used].sum() <= window:
            return rng.permutation(len(rows))
        rank = rng.permutation(int(self.runs[-1]) + 1)[self.runs[used]]
        sequence = used[np.argsort(rank, kind="stable")]
        number = np.empty(len(self.sizes), np.int64)
        number[sequence] = (np.cumsum(self.sizes[sequence]) - 1) // window
        shuffled = rng.permutation(len(rows))
        order: Integers = shuffled[np.argsort(number[blocks[shuffled]], kind="stable")]
        return order


class Shards(Protocol):
    """The samples of some files of one kind."""

    files: Sequence[ShardFile]
    layout: Layout
    labels: Labels

    def cells(self, rows: Integers) -> Iterator[tuple[str, Any]]:
        """The place and the bytes of the picture of each row; rows ascend."""
        ...


class Labels:
    """Labels as they are read: whole numbers, or names of classes, eight bytes a sample.

    Attributes:
        names: that the files give to the classes 0, 1, ...
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._codes: dict[int | str, int] = {}
        self._samples = array("q")

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, value: Any, place: str) -> None:
        """The label of the next sample.

        Raises:
            DataError: no whole number, no text and not one-hot.
        """
        if type(value) is not int and type(value) is not str:
            if value is None:
                raise DataError(f"{place} has no label; give it one, or leave the sample out")
            try:
                value = checked_label(value, len(self))
            except DataError:
                raise DataError(
                    f"{place} has the label {value!r}; expected a whole number or a class's name"
                ) from None
        self._samples.append(self._codes.setdefault(value, len(self._codes)))

    def finished(self, *, where: str) -> tuple[Tensor, tuple[str, ...]]:
        """Classes int64 [N], and their names; texts are numbered in sorted order.

        Raises:
            DataError: texts and numbers, or a number that is no class.
        """
        values = list(self._codes)
        texts = sorted(value for value in values if isinstance(value, str))
        if texts and len(texts) < len(values):
            number = next(value for value in values if not isinstance(value, str))
            raise DataError(
                f"{where}: some labels are texts ({texts[0]!r}), others numbers ({number}); "
                "expected one kind"
            )
        place = {text: number for number, text in enumerate(texts)}
        numbers = np.array([place[v] if isinstance(v, str) else v for v in values], object)
        with suppress(OverflowError):  # checked_labels refuses what is larger
            numbers = numbers.astype(np.int64)
        classes = numbers[np.frombuffer(self._samples, np.int64)]
        self._samples = array("q")  # nobody asks twice
        return checked_labels(classes, where=where), tuple(texts) or self.names


def shard_files(path: Any) -> tuple[str, list[Path]]:
    """The suffix and the files of a sharded data set, in order.

    Args:
        path: a folder, of which the files of the side train are taken (see `parquet.side_files`)
            or, where no name speaks of a side, all, in the order of their paths; a file; a pattern
            such as "shards/train-*.tar"; or a list of files.

    Raises:
        DataError: no files, files of two kinds, or of another.
    """
    if isinstance(path, str | Path):
        found = _found(path)
    else:
        found = [Path(one) for one in path]
        if not found:
            raise DataError("no shards given: the list of files is empty")
    kinds = {file.suffix for file in found}
    if len(kinds) > 1 or not kinds <= set(SUFFIXES):
        odd = next(file for file in found if len(kinds) > 1 or file.suffix not in SUFFIXES)
        raise DataError(
            f"{odd}: shards are all .parquet or all .tar files, got {', '.join(sorted(kinds))}"
            + ("; decompress it first" if odd.suffix in (".gz", ".tgz", ".zst", ".xz") else "")
        )
    return kinds.pop(), found


def _found(path: str | Path) -> list[Path]:
    folder = Path(path)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise DataError(f"{path}: no such folder, file or pattern of files")
        return found
    shown = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in SUFFIXES
        and not any(part[0] in "._" for part in file.relative_to(folder).parts)
        and file.is_file()
    ]
    kinds = sorted({file.suffix for file in shown})
    if not kinds:
        packed = next((f.name for f in sorted(folder.rglob("*.t*")) if ".tar." in f.name), "")
        raise DataError(
            f"{folder} holds no .parquet and no .tar files"
            + (f"; {packed} is compressed: decompress it first" if packed else "")
        )
    if len(kinds) > 1:
        raise DataError(
            f"{folder} holds .parquet and .tar files; give a pattern, as {folder}/*.tar"
        )
    has_sides = any(f.name.startswith(_SIDES) or f.parent.name in _SIDES for f in shown)
    return side_files(folder, ("train",), suffix=kinds[0]) if has_sides else shown


def blocks_of(rows: ArrayLike, sizes: ArrayLike, runs: ArrayLike) -> Layout:
    """A layout of blocks of so many rows and bytes."""
    counts, sizes, runs = (np.asarray(column, np.int64) for column in (rows, sizes, runs))
    return Layout(np.concatenate([[0], np.cumsum(counts)]), sizes, runs)
