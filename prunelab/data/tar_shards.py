"""Pictures in tar files as WebDataset has them: members KEY.jpg and KEY.cls or KEY.json."""

from __future__ import annotations

import json
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunelab.data.batches import Integers
from prunelab.data.parquet import LABEL
from prunelab.data.shards import BLOCK_BYTES, Labels, Layout, ShardFile, blocks_of
from prunelab.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff")
CLASS, JSON = "cls", "json"
LARGEST_LABEL = 1 << 20
"""Bytes of a member that holds a label: no more are read into memory."""

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


class TarShards:
    """Samples of uncompressed tar files; place and size of each picture are held in memory.

    The members of a sample follow each other and are called alike up to the first dot of their
    name: one picture (see `PICTURES`), and KEY.cls with a whole number or the name of a class, or
    KEY.json with a "label", or what `columns` calls it. Other members are not looked at.

    Raises:
        DataError: files that are damaged, compressed or cut off, or samples without a picture or
            a label.
    """

    def __init__(
        self, files: Sequence[ShardFile], *, columns: Mapping[str, str] | None = None
    ) -> None:
        self.files, key = files, (columns or {}).get("label", LABEL)
        texts = Labels()
        starts, self._offsets, self._sizes = array("q", [0]), array("q"), array("q")
        for file in files:
            for sample in _samples(file, key):
                self._offsets.append(sample.offset)
                self._sizes.append(sample.size)
                texts.add(sample.label, f"{file.path}: {sample.key}")
            starts.append(len(self._offsets))
            file.check()
        self.labels = texts
        self._starts = np.frombuffer(starts, np.int64)
        self.layout = self._layout()

    def cells(self, rows: Integers) -> Iterator[tuple[str, Any]]:
        """The place and the bytes of the picture of each row; rows ascend."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            file = self.files[number]
            file.check()
            with file.path.open("rb", buffering=0) as opened:
                for row in rows[numbers == number].tolist():
                    opened.seek(self._offsets[row])
                    place = row - int(self._starts[number])
                    yield f"{file.path}: sample {place}", opened.read(self._sizes[row])

    def _layout(self) -> Layout:
        """Blocks of about as many bytes, none of two files."""
        offsets, sizes = (np.frombuffer(x, np.int64) for x in (self._offsets, self._sizes))
        number = np.repeat(np.arange(len(self.files)), np.diff(self._starts))
        first = np.ones(len(offsets), np.bool_)
        place = offsets // BLOCK_BYTES
        first[1:] = (np.diff(place) != 0) | (np.diff(number) != 0)
        starts = np.flatnonzero(first)
        counts = np.diff([*starts.tolist(), len(offsets)])
        total = np.add.reduceat(sizes, starts) if len(starts) else sizes
        return blocks_of(counts, total, np.arange(len(starts)))


@dataclass
class _Sample:
    """What is known of a sample while its members pass by."""

    key: str
    offset: int = -1
    size: int = 0
    label: Any = None


def _samples(file: ShardFile, label_key: str) -> Iterator[_Sample]:
    """The samples of a file, in order, once each is whole."""
    current: _Sample | None = None
    with file.path.open("rb") as opened:
        for member in _members(file, opened):
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if not stem or stem.startswith("__"):  # hidden, or of the shard itself
                continue
            key, kind = f"{folder}/{stem}" if folder else stem, extension.rpartition(".")[2].lower()
            if current is None or current.key != key:
                if current is not None:
                    yield _whole(current, file)
                current = _Sample(key)
            if kind in PICTURES:
                if current.offset >= 0:
                    raise DataError(
                        f"{file.path}: {key} has two pictures; expected one member of "
                        f"{', '.join(PICTURES)}"
                    )
                current.offset, current.size = member.offset_data, member.size
            elif kind == CLASS or (kind == JSON and current.label is None):
                label = _label(file, opened, member, label_key if kind == JSON else "")
                current.label = current.label if label is None else label
    if current is not None:
        yield _whole(current, file)


def _members(file: ShardFile, opened: Any) -> Iterator[tarfile.TarInfo]:
    """Members that are files; what tarfile takes for an end is one, or the file is damaged."""
    try:
        with tarfile.open(fileobj=opened, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would hold them all
                if member.isreg() and not member.issparse():
                    yield member
            end = archive.offset
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file.path} is not a readable, uncompressed tar file ({error})") from None
    opened.seek(end)
    if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(
            f"{file.path} is damaged or cut off: from byte {end} on it is no tar file; write it "
            "again"
        )


def _whole(sample: _Sample, file: ShardFile) -> _Sample:
    missing = [
        what
        for what, is_there in (
            (f"picture ({sample.key}.jpg, .png, ...)", sample.offset >= 0),
            (f"label ({sample.key}.cls, or .json with a label)", sample.label is not None),
        )
        if not is_there
    ]
    if missing:
        raise DataError(
            f"{file.path}: {sample.key} has no {' and no '.join(missing)}; the members of a sample "
            "follow each other, as tar --sort=name leaves them"
        )
    return sample


def _label(file: ShardFile, opened: Any, member: tarfile.TarInfo, key: str) -> Any:
    """A whole number or a text, or what a JSON object has under the key; None where it has none."""
    where = f"{file.path}: {member.name}"
    if member.size > LARGEST_LABEL:
        raise DataError(f"{where} has {member.size} bytes, too many for a label")
    opened.seek(member.offset_data)
    data = opened.read(member.size)
    try:
        text = data.decode("utf-8-sig").strip()
        if not key:
            return int(text) if _WHOLE.fullmatch(text) else text or None
        values = json.loads(text)
    except ValueError:
        raise DataError(f"{where} is not {'JSON' if key else 'text'}") from None
    return values.get(key) if isinstance(values, dict) else None
