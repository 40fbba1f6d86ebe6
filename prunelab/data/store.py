"""A folder of samples that a process opens in milliseconds, with numpy alone.

    inputs.npy   uint8 or float32 [N, ...], such as images [N, C, H, W]; or token ids, int64 [N, T],
                 -1 behind the end of a text
    targets.npy  classes, int64 [N]; tokens, int64 [N, T]; or numbers, float32 [N] or [N, K]
    rows.npy     int64 [N], CRC-32 of each input and its target
    NAME.npy     further int64 arrays, such as which samples are whose
    store.json   format version, name, task, classes, preprocessing; type, shape and SHA-256 of each
                 array

Reading is by memory map, or by `SampleStore.take`, which checks the samples that it takes and
leaves no other in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from prunelab.data.batches import Integers, Preprocessing
from prunelab.errors import DataError
from sparsemodel.storage.sealed import read_sealed_json, sealed_json

FORMAT = 4  # 3: without names of features; 2: images alone; 1: without checksums of rows
HEADER = "store.json"
INPUTS, TARGETS, ROWS = "inputs", "targets", "rows"
_CHUNK = 1 << 20  # bytes read at a time to check a digest
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_INPUT_TYPES = ("uint8", "float32", "int64")
_TARGET_TYPES = ("int64", "float32")
IMAGE_TASK = "classification"

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class SampleStore:
    """An open store; its arrays are memory maps that cannot be written to.

    Attributes:
        name: of the data set, for people.
        task: what the samples are for, a name in prunelab.training.task.TASKS.
        num_classes: targets are 0 ... num_classes - 1; None where they are no classes.
        class_names: of the classes, or of several targets, where the data name them.
        feature_names: of the columns that inputs came from, where they came from some.
        preprocessing: what the inputs want before a network sees them.
        digest: 32 hexadecimal digits that name all of its content.
        inputs: [N, ...]. Pages that were touched count as memory of the process; to keep a few
            samples, use `take`.
        targets: [N] or [N, ...].
        rows: int64 [N], checksums of the samples.
        arrays: further int64 arrays by name.
    """

    folder: Path
    name: str
    task: str
    num_classes: int | None
    class_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    preprocessing: Preprocessing
    digest: str
    inputs: Array
    targets: Array
    rows: Integers
    arrays: Mapping[str, Integers]

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one input: (channels, height, width) of an image."""
        return tuple(self.inputs.shape[1:])

    def take(self, rows: Integers) -> tuple[Array, Array]:
        """Copies of the inputs and targets of these rows (int64 [n]), in their order.

        They are read from the file into place: nothing but them is held in memory.

        Raises:
            DataError: rows that the store has not, or samples that are not what was written.
        """
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise DataError(
                f"{self.folder} has samples 0 to {len(self) - 1}; asked for "
                f"{int(rows.min())} to {int(rows.max())}"
            )
        taken = np.empty((len(rows), *self.inputs.shape[1:]), self.inputs.dtype)
        path, size = _file(self.folder, INPUTS), self.inputs.nbytes
        with _about(path), path.open("rb", buffering=0) as file:
            start_of_data = path.stat().st_size - size
            for start, end in _runs(rows):
                file.seek(start_of_data + int(rows[start]) * (size // len(self)))
                _read_into(file, taken[start:end])
        targets = np.array(self.targets[rows])
        wrong = np.flatnonzero(_row_checks(taken, targets) != self.rows[rows])
        if len(wrong):
            raise DataError(f"{path}: damaged: sample {rows[wrong[0]]} is not what was written")
        return taken, targets


def write_store(
    folder: Path,
    inputs: Array,
    targets: Array,
    *,
    num_classes: int | None,
    name: str,
    task: str = IMAGE_TASK,
    class_names: Sequence[str] = (),
    feature_names: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    arrays: Mapping[str, Integers] | None = None,
    made_for: str = "",
) -> SampleStore:
    """Write a store in one step: a reader meets no folder, or the whole one.

    Several processes may write the same store at once. A folder that holds exactly this store
    already is left as it is.

    Args:
        inputs: uint8, float32 or int64 [N, ...], N >= 1.
        targets: int64 [N], with `num_classes`; without, int64 or float32 [N, ...].
        task, class_names, feature_names: as of `SampleStore`.
        preprocessing: by default `Preprocessing()`.
        arrays: further int64 arrays; names of small letters, digits and _.
        made_for: what the store belongs to; `open_store` may ask for it.

    Raises:
        DataError: arrays that are no such data, a folder that holds something else, or one
            that cannot be written.
    """
    further = dict(arrays or {})
    if further.keys() & {INPUTS, TARGETS, ROWS}:
        raise DataError(f"{folder}: further arrays cannot be called {INPUTS}, {TARGETS} or {ROWS}")
    content: dict[str, Array] = {
        key: np.ascontiguousarray(array)
        for key, array in {INPUTS: inputs, TARGETS: targets, **further}.items()
    }
    content[ROWS] = _row_checks(content[INPUTS], content[TARGETS])
    with _about(folder):
        described = {key: _Described.of(array) for key, array in content.items()}
        header = _Header(
            name, num_classes, preprocessing or Preprocessing(), described, made_for, task,
            tuple(class_names), tuple(feature_names),
        )  # fmt: skip
        _check_targets(content[TARGETS], num_classes)
        if content[INPUTS].dtype == np.float32 and not np.isfinite(content[INPUTS]).all():
            raise DataError("an input has values that are not finite")
    _put_in_place(folder, content, header)
    store = open_store(folder, verify=True)
    if store.digest != header.digest():
        raise DataError(
            f"{folder} holds another data set ({store.name!r}, {len(store)} samples); "
            "remove it or name another folder"
        )
    return store


def open_store(folder: Path, *, verify: bool = False, made_for: str | None = None) -> SampleStore:
    """Open what `write_store` wrote.

    Args:
        verify: read the inputs once and compare their digest. Without it all else is checked,
            and those inputs that `SampleStore.take` takes.
        made_for: what the store has to belong to; None: anything.

    Raises:
        DataError: no store, one of another format version, a damaged one, or one of something
            else.
    """
    path, cure = folder / HEADER, "write the store again"
    try:
        values = read_sealed_json(path, of=HEADER, error=DataError, cure=cure)
    except FileNotFoundError:
        raise DataError(f"{folder} is no sample store: it has no {HEADER}") from None
    with _about(path):
        header = _Header.parse(values)
    if made_for not in (None, header.made_for):
        raise DataError(f"{folder} is of another run; {cure}")
    arrays: dict[str, Any] = {}
    for name, described in header.arrays.items():
        with _about(_file(folder, name)):
            arrays[name] = _mapped(_file(folder, name), described, verify=verify or name != INPUTS)
    inputs, targets, rows = (arrays.pop(name) for name in (INPUTS, TARGETS, ROWS))
    with _about(folder):
        _check_targets(targets, header.num_classes)
    return SampleStore(
        folder=folder,
        name=header.name,
        task=header.task,
        num_classes=header.num_classes,
        class_names=header.class_names,
        feature_names=header.feature_names,
        preprocessing=header.preprocessing,
        digest=header.digest(),
        inputs=inputs,
        targets=targets,
        rows=rows,
        arrays=arrays,
    )


# --- what a store says of itself -----------------------------------------------------------------


@dataclass(frozen=True)
class _Described:
    """One array of a store, as its header tells of it."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @classmethod
    def of(cls, array: Array) -> _Described:
        return cls(str(array.dtype), array.shape, hashlib.sha256(array.data).hexdigest())


@dataclass(frozen=True)
class _Header:
    """What store.json says.

    Raises:
        DataError: arrays of such types and shapes are no store.
    """

    name: str
    num_classes: int | None
    preprocessing: Preprocessing
    arrays: dict[str, _Described]
    made_for: str = ""
    task: str = IMAGE_TASK
    class_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"{name!r} is no name for an array" for name in self.arrays if not _NAME.fullmatch(name)
        ]
        problems += [
            f"array {name!r} is {array.dtype} {list(array.shape)}, expected int64"
            for name, array in self.arrays.items()
            if name not in (INPUTS, TARGETS) and array.dtype != "int64"
        ]
        inputs, targets, rows = (self.arrays[name] for name in (INPUTS, TARGETS, ROWS))
        has_classes = self.num_classes is not None
        if inputs.dtype not in _INPUT_TYPES or len(inputs.shape) < 2 or 0 in inputs.shape:
            problems.append(
                f"inputs are {inputs.dtype} {list(inputs.shape)}, expected "
                f"{' or '.join(_INPUT_TYPES)} [N, ...]"
            )
        elif targets.shape[:1] != inputs.shape[:1] or (has_classes and len(targets.shape) != 1):
            problems.append(
                f"targets are {list(targets.shape)} for {inputs.shape[0]} inputs, expected one each"
            )
        elif rows.shape != inputs.shape[:1]:
            problems.append(f"checksums of {list(rows.shape)} rows, expected [{inputs.shape[0]}]")
        elif inputs.dtype == "uint8" and len(inputs.shape) == 4:
            self.preprocessing.normalization(inputs.shape[1])
        if targets.dtype not in (("int64",) if has_classes else _TARGET_TYPES):
            problems.append(f"targets are {targets.dtype}, expected int64, or float32 of no class")
        if self.num_classes is not None and self.num_classes < 1:
            problems.append(f"{self.num_classes} classes, expected at least 1")
        if problems:
            raise DataError("; ".join(problems))

    def values(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "format": FORMAT,
            **asdict(self),
            "preprocessing": self.preprocessing.to_dict(),
            "class_names": list(self.class_names),
            "feature_names": list(self.feature_names),
        }

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> _Header:
        """What `values` gave; anything else is a DataError."""
        try:
            if values["format"] != FORMAT:
                raise DataError(f"format {values['format']!r}, this release reads {FORMAT}")
            arrays = {
                name: _Described(
                    str(array["dtype"]), tuple(map(int, array["shape"])), str(array["sha256"])
                )
                for name, array in values["arrays"].items()
            }
            preprocessing = Preprocessing.from_dict(values["preprocessing"])
            num_classes = values["num_classes"]
            return cls(
                str(values["name"]), None if num_classes is None else int(num_classes),
                preprocessing, arrays, str(values["made_for"]), str(values["task"]),
                tuple(map(str, values["class_names"])), tuple(map(str, values["feature_names"])),
            )  # fmt: skip
        except DataError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise DataError(f"damaged ({type(error).__name__}: {error})") from None

    def digest(self) -> str:
        text = json.dumps(self.values(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _check_targets(targets: Array, num_classes: int | None) -> None:
    if num_classes is None:
        if targets.dtype == np.float32 and not np.isfinite(targets).all():
            raise DataError("a target is not finite")
        return
    wrong = np.flatnonzero((targets < 0) | (targets >= num_classes))
    if len(wrong):
        raise DataError(
            f"label {targets[wrong[0]]} of row {wrong[0]} lies outside 0 ... {num_classes - 1}"
        )


def _row_checks(inputs: Array, targets: Array) -> Integers:
    """CRC-32 of each input and its target, int64 [N]; both are contiguous."""
    if not len(inputs) == len(targets) > 0:
        return np.empty(0, np.int64)  # refused by the header
    pairs = zip(inputs, targets.reshape(len(targets), -1), strict=True)
    checks = [zlib.crc32(target.data, zlib.crc32(each.data)) for each, target in pairs]
    return np.array(checks, np.int64)


# --- files ---------------------------------------------------------------------------------------


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _put_in_place(folder: Path, content: Mapping[str, Array], header: _Header) -> None:
    """Write everything aside and rename it, unless something has the name already."""
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        for name, array in content.items():
            with _file(part, name).open("xb") as file:
                np.save(file, array, allow_pickle=False)
                _flush(file)
        with (part / HEADER).open("xb") as file:
            file.write(sealed_json(HEADER, header.values()))
            _flush(file)
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Errors inside become DataErrors that name the file or folder they are about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read or is damaged ({error})") from None


def _mapped(path: Path, expected: _Described, *, verify: bool) -> Array:
    """The file's array as a memory map, once it is known to be what the header says."""
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise DataError(f"version {version} of numpy's format, expected (1, 0)")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # whatever Python's own parser raises
            raise DataError(f"cannot be read or is damaged ({error})") from None
        start = file.tell()
        if fortran or str(dtype) != expected.dtype or shape != expected.shape:
            raise DataError(
                f"holds {dtype} {list(shape)}, {HEADER} says {expected.dtype} "
                f"{list(expected.shape)}"
            )
        size = path.stat().st_size - start
        if size != dtype.itemsize * math.prod(shape):
            raise DataError(f"damaged: {size:,} bytes of data for {dtype} {list(shape)}")
        if verify:
            sha = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                sha.update(chunk)
            if sha.hexdigest() != expected.sha256:
                raise DataError(f"damaged: its SHA-256 is not the one in {HEADER}")
    if size == 0:  # nothing to map
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=start, shape=shape)


def _runs(rows: Integers) -> Iterator[tuple[int, int]]:
    """Slices of `rows` whose samples lie one after the other."""
    if len(rows):
        breaks = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
        yield from zip([0, *breaks], [*breaks, len(rows)], strict=True)


def _read_into(file: Any, array: Array) -> None:
    """Fill a contiguous array with the file's next bytes."""
    view = array.data.cast("B")
    while len(view):
        count = file.readinto(view)
        if not count:
            raise DataError("damaged: it ends too early")
        view = view[count:]
