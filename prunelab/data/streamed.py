"""Labelled images that stay in their files: a batch is read and decoded when it is asked for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunelab.data.arrays import Array, note
from prunelab.data.batches import Integers
from prunelab.data.parquet_shards import ParquetShards
from prunelab.data.pictures import pixels, resized
from prunelab.data.reading import reading
from prunelab.data.samples import Pairs
from prunelab.data.shards import BLOCK_BYTES, ShardFile, Shards, fingerprint_of, shard_files
from prunelab.data.tar_shards import TarShards
from prunelab.data.tensors import augmented, prepare
from prunelab.errors import DataError

WINDOW = 64 << 20
"""Bytes of encoded pictures among which training draws its order."""


class StreamedImages(Pairs):
    """Samples of sharded files; a batch is (float32 [B, C, H, W], int64 [B]). `stream` makes one.

    In memory are labels, ids and where pictures lie, 32 bytes a sample, and at most about `WINDOW`
    bytes of encoded pictures. Rows in order are read from front to back. Other orders are right,
    too, and fast in tar files; of parquet a whole block is read for one row, so that training asks
    for an order in which blocks serve many rows (`training_order`).

    Attributes:
        labels: int64 [N]; ids: the row numbers.
        class_names: of the classes 0, 1, ..., where labels are texts or the files name them.
        input_shape: (channels, height, width) of one image.
        opened_with: arguments of `stream` that open the same again.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        name: str,
        resize: tuple[int, int] | None,
        channels: int | None,
        num_workers: int,
        opened_with: dict[str, Any],
    ) -> None:
        self._shards, self.name, self._resize = shards, name, resize
        self._num_workers = num_workers
        self.opened_with = opened_with
        if not len(shards.labels):
            raise DataError(f"{name}: no samples in {len(shards.files)} files")
        self.labels, self.class_names = shards.labels.finished(where=name)
        self.ids = torch.arange(len(self.labels))
        self._said: set[str] = set()
        self._lock = threading.Lock()
        place, cell = next(shards.cells(np.zeros(1, np.int64)))
        shape = self._decoded(cell, place).shape
        if channels is not None and channels < shape[0]:
            raise DataError(f"{place} has {shape[0]} channels, more than channels={channels}")
        self.input_shape = channels or int(shape[0]), int(shape[1]), int(shape[2])

    @cached_property
    def fingerprint(self) -> str:
        """Of the contents of the files, not of decoded images; computed when first asked for."""
        return fingerprint_of(self._shards.files, resize=self._resize, shape=self.input_shape)

    def __len__(self) -> int:
        return len(self.labels)

    def raw(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.pixels(rows), self.labels[rows]

    def augmented_batch(self, rows: Tensor, *, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A batch of random crops and flips, drawn for each image (see `augment`)."""
        return prepare(augmented(self.pixels(rows), rng=rng)), self.labels[rows]

    def pixels(self, rows: Tensor) -> Tensor:
        """The images of these rows as they are stored, uint8 [B, C, H, W].

        Raises:
            DataError: a picture that is damaged or unlike the first, or a file that has changed.
        """
        wanted = self.ids[rows].numpy()  # refuses rows that are not there
        images = np.empty((len(wanted), *self.input_shape), np.uint8)
        order = np.argsort(wanted, kind="stable")

        def decode(number: int, found: tuple[str, Any]) -> None:
            place, cell = found
            images[number] = self._fitted(self._decoded(cell, place), place)

        with self._lock:
            cells = self._shards.cells(wanted[order])
            if self._num_workers:
                with ThreadPoolExecutor(self._num_workers) as pool:
                    list(pool.map(decode, order.tolist(), cells))
            else:
                for number, found in zip(order.tolist(), cells, strict=True):
                    decode(number, found)
        return torch.from_numpy(images)

    def training_order(self, rows: Tensor, *, rng: np.random.Generator) -> Integers:
        """Places in `rows`, shuffled as well as reading allows: see `Layout.order`."""
        return self._shards.layout.order(rows.numpy(), window=WINDOW, rng=rng)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _decoded(self, cell: Any, place: str) -> Array:
        seen: Counter[str] = Counter()
        array = pixels(cell, place=place, seen=seen)
        for what in seen:
            self._say(what)
        if self._resize is None or array.shape[1:] == self._resize:
            return array
        return resized(array, self._resize, place=place)

    def _fitted(self, array: Array, place: str) -> Array:
        channels, *size = self.input_shape
        if list(array.shape[1:]) != size:
            raise DataError(
                f"the picture of {place} has shape {array.shape}, the first {self.input_shape}; "
                f"bring all to one size, with resize={tuple(size)} for instance"
            )
        if len(array) > channels:
            raise DataError(
                f"the picture of {place} has {len(array)} channels, the first has {channels}; "
                f"with channels={len(array)} all have so many"
            )
        if len(array) < channels:
            self._say("pictures are gray among coloured ones, and were taken as RGB")
        return array

    def _say(self, what: str) -> None:
        """A line for each thing that is done to pictures, the first time."""
        if what not in self._said:
            self._said.add(what)
            note(f"{self.name}: some {what}")


def stream(
    path: str | Path | Sequence[str | Path],
    *,
    resize: int | str | tuple[int, int] | None = None,
    columns: Mapping[str, str] | str | None = None,
    channels: int | None = None,
    num_workers: int = 0,
) -> StreamedImages:
    """Open sharded pictures that need not go into memory: parquet files, or WebDataset's tars.

    Parquet files have the columns img (or image) with the bytes of pictures, and label. Tar files
    have members KEY.jpg (.png, .webp, ...) and KEY.cls, or KEY.json with a "label". Labels are
    whole numbers or names of classes, which are numbered in sorted order. Pictures are treated as
    those of folders in memory are: upright, opaque, gray or RGB.

    Args:
        path: a folder, of which the files of the side train are taken or, where no name speaks of
            a side, all; a file; a pattern such as "shards/train-*.tar"; or a list of files.
        resize: height and width, or one number for both, to bring pictures to (see `reading`).
        columns: what the columns of pictures and labels are called, such as {"image": "picture",
            "label": "kind"} or "label=kind"; of tar files the name of the label in KEY.json.
        channels: 3: gray pictures become RGB, where the first is gray; None: as many as the first
            picture has.
        num_workers: threads that decode; 0: the caller's own, which is faster for small pictures
            (below about 64×64).

    Returns:
        Samples for `score`, `train`, `kept.of` and whatever else takes samples.

    Raises:
        DataError: no such files, or files that are damaged, of another kind or without labels.
    """
    how = reading(resize=resize, columns=columns)
    names = dict(how.columns)
    if channels not in (None, 1, 3):
        raise DataError(f"channels must be 1 or 3, got {channels!r}")
    if num_workers < 0:
        raise DataError(f"num_workers must be 0 or more, got {num_workers}")
    suffix, found = shard_files(path)
    other = sorted(names.keys() - ({"label"} if suffix == ".tar" else {"image", "label"}))
    if other:
        raise DataError(f"columns: {suffix} shards have no column for {other[0]!r}")
    files = [ShardFile.at(file.absolute()) for file in found]
    # A batch may lie across two windows, and a block is read whole.
    kept = WINDOW + 2 * BLOCK_BYTES
    shards = (
        TarShards(files, columns=names)
        if suffix == ".tar"
        else ParquetShards(files, kept=kept, columns=names)
    )
    one = path if isinstance(path, str | Path) else None
    return StreamedImages(
        shards,
        name=found[0].parent.name if one is None else Path(one).name,
        resize=how.resize,
        channels=channels,
        num_workers=num_workers,
        opened_with={
            "path": [str(f.path) for f in files] if one is None else str(Path(one).absolute()),
            "resize": None if how.resize is None else list(how.resize),
            "columns": names,
            "channels": channels,
        },
    )
