"""Pictures in parquet files, read block by block: a row group, or a part of a large one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np

from prunelab.data.arrays import Array
from prunelab.data.batches import Integers
from prunelab.data.parquet import picture_columns
from prunelab.data.shards import BLOCK_BYTES, Labels, ShardFile, blocks_of
from prunelab.data.tables import named_classes
from prunelab.errors import DataError

MOST_ROWS = 1024  # of a block: sizes in a file's metadata are of values that may repeat
_LABELS_AT_ONCE = 1 << 14
_BUFFER = 1 << 20


class ParquetShards:
    """Samples of parquet files with columns img (or image) and label, or what `columns` names.

    Labels are read at once. Of pictures, one place is open at a time, behind which blocks are read
    in order; a block is let go when each of its rows was asked for, or when the blocks together
    exceed `kept` bytes.

    Args:
        kept: bytes of blocks that are not read to their end.

    Raises:
        DataError: files that are damaged, or without these columns.
    """

    def __init__(
        self, files: Sequence[ShardFile], *, kept: int, columns: Mapping[str, str] | None = None
    ) -> None:
        self.files, self._kept = files, kept
        self.labels = Labels()
        rows: list[int] = []
        sizes: list[int] = []
        runs: list[int] = []
        self._groups: list[tuple[int, int]] = []  # file and row group of each run
        self._columns: list[str] = []
        for number, file in enumerate(files):
            with _reading(file):
                opened = _opened(file)
                schema = opened.schema_arrow
                image, label, _ = picture_columns(file.path, schema.names, columns or {})
                self._columns.append(_bytes_column(schema, image))
                self._read_labels(opened, file, label)
            if not self.labels.names:
                self.labels.names = named_classes(schema).get(label, ())
            for group in range(opened.num_row_groups):
                parts = _blocks(opened.metadata.row_group(group), image)
                rows += [part[0] for part in parts]
                sizes += [part[1] for part in parts]
                runs += [len(self._groups)] * len(parts)
                self._groups.append((number, group))
        self.layout = blocks_of(rows, sizes, runs)
        self._file_starts = self._starts_of_files()
        self._forget()

    def cells(self, rows: Integers) -> Iterator[tuple[str, Any]]:
        """The place and the bytes of the picture of each row; rows ascend."""
        run, first = -1, -1
        for block, members in groupby(rows.tolist(), key=self._block_of(rows)):
            if self.layout.runs[block] != run:
                run, first = int(self.layout.runs[block]), block
            number, _ = self._groups[run]
            file = self.files[number]
            file.check()
            values, asked = self._block(block, first=first)
            start = int(self.layout.starts[block])
            for row in members:
                asked[row - start] = True
                place = row - int(self._file_starts[number])
                yield f"{file.path}: row {place}", values[row - start].as_py()
            if asked.all():
                self._blocks.pop(block, None)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open: another process opens its own."""
        return {**self.__dict__, "_blocks": OrderedDict(), "_batches": None}

    def _forget(self) -> None:
        self._blocks: OrderedDict[int, tuple[Any, Array]] = OrderedDict()
        self._batches: Iterator[Any] | None = None  # of the run that is open
        self._run = self._next = self._from = -1  # what is kept begins with the last

    def _block_of(self, rows: Integers) -> Any:
        blocks = iter(self.layout.block_of(rows).tolist())
        return lambda row: next(blocks)

    def _block(self, block: int, *, first: int) -> tuple[Any, Array]:
        """The pictures of a block, and which of them were asked for.

        Args:
            first: of the blocks of this run that are wanted now.
        """
        if block not in self._blocks:
            self._read_to(block, first=first)
        self._blocks.move_to_end(block)
        return self._blocks[block]

    def _read_to(self, block: int, *, first: int) -> None:
        """Read from where the place is, or from the beginning of the block's run.

        What is passed on the way is kept, since to come back means to begin anew; but not what
        was passed before.
        """
        run = int(self.layout.runs[block])
        number, group = self._groups[run]
        batches, place = self._batches, self._next
        if batches is None or self._run != run or place > block:
            begin = place = int(np.searchsorted(self.layout.runs, run))
            with _reading(self.files[number]):
                batches = _opened(self.files[number]).iter_batches(
                    int(self.layout.starts[begin + 1] - self.layout.starts[begin]),
                    row_groups=[group], columns=[self._columns[number]], use_threads=False,
                )  # fmt: skip
            self._run, self._from = run, first
        self._batches = None  # whatever stops what follows, nobody goes on from it
        with _reading(self.files[number], group):
            for passed in range(place, block + 1):
                values = next(batches).column(0)
                if "." in self._columns[number]:
                    values = values.field(0)
                expected = int(self.layout.starts[passed + 1] - self.layout.starts[passed])
                if len(values) != expected:
                    raise ValueError(f"{len(values)} rows where {expected} are said to be")
                if passed >= self._from and passed not in self._blocks:
                    self._keep(passed, values)
        self._batches, self._next = batches, block + 1

    def _keep(self, block: int, values: Any) -> None:
        self._blocks[block] = values, np.zeros(len(values), np.bool_)
        size = sum(kept.nbytes for kept, _ in self._blocks.values())
        while size > self._kept and len(self._blocks) > 1:
            _, (oldest, _) = self._blocks.popitem(last=False)
            size -= oldest.nbytes

    def _read_labels(self, opened: Any, file: ShardFile, label: str) -> None:
        row = 0
        for batch in opened.iter_batches(_LABELS_AT_ONCE, columns=[label], use_threads=False):
            for value in batch.column(0).to_pylist():
                self.labels.add(value, f"{file.path}: row {row}")
                row += 1
        if row != opened.metadata.num_rows:
            raise ValueError(f"{row} labels where {opened.metadata.num_rows} are said to be")

    def _starts_of_files(self) -> Integers:
        """The row at which each file begins."""
        number_of = np.array([number for number, _ in self._groups], np.int64)
        blocks = np.searchsorted(number_of[self.layout.runs], np.arange(len(self.files)))
        return self.layout.starts[blocks]


def _opened(file: ShardFile) -> Any:
    import pyarrow.parquet  # noqa: PLC0415

    # A whole column of a row group would be in memory without the buffer.
    opened = pyarrow.parquet.ParquetFile(
        file.path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
    )
    file.check()
    return opened


@contextmanager
def _reading(file: ShardFile, group: int | None = None) -> Iterator[None]:
    """One error for all that damaged files come to."""
    import pyarrow  # noqa: PLC0415

    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, StopIteration, pyarrow.ArrowException) as error:
        what = "" if group is None else f", row group {group}"
        reason = str(error) or "it ends too early"
        raise DataError(f"cannot read {file.path}{what}: {reason}") from None


def _bytes_column(schema: Any, image: str) -> str:
    """The column that holds the bytes: Hugging Face's libraries have bytes and a path."""
    kind = schema.field(image).type
    names = [kind.field(number).name for number in range(kind.num_fields)]
    return f"{image}.bytes" if "bytes" in names else image


def _blocks(group: Any, image: str) -> list[tuple[int, int]]:
    """Rows and bytes of each block of a row group."""
    columns = [group.column(number) for number in range(group.num_columns)]
    size = sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema.partition(".")[0] == image
    )
    rows = group.num_rows
    step = max(1, min(MOST_ROWS, BLOCK_BYTES * rows // max(size, 1)))
    counts = [min(step, rows - start) for start in range(0, rows, step)]
    return [(count, max(1, size * count // rows)) for count in counts]
