"""Named image data sets, and folders of parquet files."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunelab.errors import DataError

Array = np.ndarray[Any, Any]
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DIGITS_TEST_SHARE = 0.2
FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and labels of both sides.

    Attributes:
        train_images, test_images: uint8 [N, C, H, W].
        train_labels, test_labels: int64 [N], 0 ... num_classes - 1.
        fingerprint: 16 hexadecimal digits that name the data.
        train_groups: natural client of each training sample, int64 [N], where there is one.
        class_names: of the classes 0, 1, ..., where the data name them.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    num_classes: int
    fingerprint: str
    train_groups: torch.Tensor | None = None
    class_names: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class _Source:
    """One side of a data set before its images are decoded."""

    labels: Array
    images: Callable[[Array], torch.Tensor]
    groups: Array | None = None
    class_names: tuple[str, ...] = ()


def check_dataset(name: str) -> None:
    """Raise DataError, listing the known ones, unless `name` is a known data set or a folder."""
    if name not in DATASETS and not Path(name).is_dir():
        raise DataError(
            f"unknown data set {name!r}; known: {', '.join(DATASETS)}; "
            "or give a folder of parquet files with columns img and label"
        )


@lru_cache(maxsize=2)
def load_dataset(
    name: str, *, num_train: int | None = None, num_test: int | None = None, seed: int = 0
) -> ImageSet:
    """A data set by name, or a folder of parquet files; cached for the process.

    Args:
        name: one of DATASETS, or a folder whose parquet files are called train* and test* (or
            validation*) with columns img or image, label, and optionally client.
        num_train, num_test: keep a stratified subset of so many; only those are decoded.
        seed: decides the subsets.

    Raises:
        DataError: unknown name, no access to the data, or data that are not such images.

    >>> load_dataset("digits").input_shape
    (1, 8, 8)
    """
    check_dataset(name)
    train, test = DATASETS[name]() if name in DATASETS else _parquet_folder(Path(name))
    num_classes = _num_classes(train.labels, test.labels, name)
    train_index = _subset(train.labels, num_train, seed=seed, what=f"{name}, training side")
    test_index = _subset(test.labels, num_test, seed=seed, what=f"{name}, test side")
    train_labels = torch.from_numpy(train.labels[train_index].astype(np.int64))
    test_labels = torch.from_numpy(test.labels[test_index].astype(np.int64))
    train_images, test_images = train.images(train_index), test.images(test_index)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{name}: training images are {tuple(train_images.shape[1:])}, "
            f"test images {tuple(test_images.shape[1:])}"
        )
    return ImageSet(
        name=Path(name).name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        num_classes=num_classes,
        fingerprint=fingerprint(train_images, train_labels, test_images, test_labels),
        train_groups=None if train.groups is None else torch.from_numpy(train.groups[train_index]),
        class_names=train.class_names,
    )


def _num_classes(train: Array, test: Array, name: str) -> int:
    """One more than the largest training label, once all labels are known to be good."""
    for side, labels in (("training", train), ("test", test)):
        if len(labels) == 0:
            raise DataError(f"{name}: the {side} side has no samples")
        if labels.dtype.kind not in "iu":
            raise DataError(f"{name}: {side} labels must be whole numbers, got {labels.dtype}")
    num_classes = int(train.max()) + 1
    for side, labels in (("training", train), ("test", test)):
        wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if len(wrong):
            raise DataError(
                f"{name}: {side} label {labels[wrong[0]]} of row {wrong[0]} lies outside "
                f"0 ... {num_classes - 1}, the training side's classes"
            )
    return num_classes


def _digits() -> tuple[_Source, _Source]:
    """scikit-learn's 1,797 digits of 8×8, a fixed stratified fifth of them for testing."""
    from sklearn.datasets import load_digits  # noqa: PLC0415
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST_SHARE, stratify=labels, random_state=0
    )
    return _in_memory(images[train], labels[train]), _in_memory(images[test], labels[test])


def _fashion_mnist() -> tuple[_Source, _Source]:
    """From torchvision's folder under $FEDPRUNE_DATA or Debian's package, else downloaded."""
    root = Path(os.environ.get("FEDPRUNE_DATA", Path.home() / ".cache" / "fedprune"))
    folders = (root / "FashionMNIST" / "raw", DEBIAN_FASHION_MNIST)
    folder = next((found for found in folders if found.is_dir()), None)
    if folder is None:
        from torchvision.datasets import FashionMNIST  # noqa: PLC0415

        folder = folders[0]
        try:
            FashionMNIST(root, download=True)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"fashion-mnist is not in {folder} and cannot be downloaded ({error}); install "
                "Debian's dataset-fashion-mnist, or set FEDPRUNE_DATA to torchvision's folder"
            ) from None
    train, test = _idx_side(folder, "train"), _idx_side(folder, "t10k")
    return replace(train, class_names=FASHION), test


def _idx_side(folder: Path, prefix: str) -> _Source:
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", num_dims=3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", num_dims=1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {prefix} images but {len(labels)} labels")
    return _in_memory(images[:, None], labels)


def _read_idx(folder: Path, name: str, *, num_dims: int) -> Array:
    """An idx file of bytes, plain or gzipped: four magic bytes, big-endian sizes, the data."""
    packed = folder / f"{name}.gz"
    try:
        data = gzip.decompress(packed.read_bytes()) if packed.exists() else b""
        data = data or (folder / name).read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {folder / name} or {packed.name} ({error})") from None
    header = 4 + 4 * num_dims
    sizes = np.frombuffer(data[4:header].ljust(4 * num_dims, b"\0"), ">u4").tolist()
    if data[:4] != bytes((0, 0, 8, num_dims)) or len(data) != header + math.prod(sizes):
        raise DataError(f"{folder / name} is damaged: not an idx file of {num_dims} dimensions")
    return np.frombuffer(data, np.uint8, offset=header).reshape(sizes)


def _in_memory(images: Array, labels: Array) -> _Source:
    return _Source(labels, lambda index: torch.from_numpy(images[index]))


def _hub(path: str, config: str | None, image: str, label: str) -> tuple[_Source, _Source]:
    """A data set of the Hugging Face hub, through its local cache."""
    import datasets  # noqa: PLC0415

    try:
        loaded = datasets.load_dataset(path, config)
    except Exception as error:  # the hub client raises many kinds; the cure is one
        raise DataError(
            f"cannot load {path} from the hub ({type(error).__name__}: {str(error)[:200]}); "
            "give a folder of parquet files with columns img and label as the data set instead"
        ) from None
    train, test = (_columns(loaded[split], image, label) for split in ("train", "test"))
    return train, test


def _parquet_folder(folder: Path) -> tuple[_Source, _Source]:
    import pyarrow.parquet  # noqa: PLC0415

    sides = []
    everything = sorted(folder.rglob("*.parquet"))
    for prefixes in (("train",), ("test", "validation")):
        # A validation file is the test side only where there is no test file.
        found = ([p for p in everything if p.name.startswith(prefix)] for prefix in prefixes)
        files = next(filter(None, found), None)
        if files is None:
            raise DataError(
                f"no {prefixes[0]}*.parquet in {folder}; expected train*.parquet and test*.parquet"
            )
        try:
            # Not read_table, to_numpy or take: they import pandas and more, for half a second.
            tables = [pyarrow.parquet.ParquetFile(path).read() for path in files]
            table = pyarrow.concat_tables(tables)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise DataError(f"cannot read {files[0]}: {error}") from None
        names = set(table.column_names)
        image = next((name for name in ("img", "image") if name in names), None)
        if image is None or "label" not in names:
            raise DataError(
                f"{files[0]}: expected columns img (or image) and label, got {sorted(names)}"
            )
        sides.append(_table_side(table, image, str(folder)))
    return sides[0], sides[1]


def _table_side(table: Any, image: str, where: str) -> _Source:
    groups = None
    for name in {"label", "client"}.intersection(table.column_names):
        if table[name].null_count:
            raise DataError(f"{where}: column {name!r} has {table[name].null_count} empty cells")
    if "client" in table.column_names:
        _, groups = np.unique(table["client"].to_pylist(), return_inverse=True)
        groups = groups.astype(np.int64)
    column = table[image]

    def images(index: Array) -> torch.Tensor:
        cells = [column[row].as_py() for row in index.tolist()]
        return _decoded(
            [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells], index, where
        )

    return _Source(np.array(table["label"].to_pylist()), images, groups, _class_names(table))


def _class_names(table: Any) -> tuple[str, ...]:
    """Names of the classes that Hugging Face's libraries leave in a table's metadata."""
    try:
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(map(str, features["label"]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


def _columns(dataset: Any, image: str, label: str) -> _Source:
    import datasets  # noqa: PLC0415

    undecoded = dataset.cast_column(image, datasets.Image(decode=False))

    def images(index: Array) -> torch.Tensor:
        cells = undecoded.select(index)[image]
        data = [cell["bytes"] or Path(cell["path"]).read_bytes() for cell in cells]
        return _decoded(data, index, "the hub's data set")

    names = getattr(dataset.features[label], "names", ())
    return _Source(dataset.with_format("numpy")[label][:], images, class_names=tuple(names))


def _decoded(encoded: list[Any], index: Array, where: str) -> torch.Tensor:
    """Pictures of 8 bits a channel, in any format of Pillow's -> contiguous uint8 [N, C, H, W]."""
    from PIL import Image  # noqa: PLC0415

    arrays: list[Array] = []
    for row, data in zip(index, encoded, strict=True):
        try:
            with Image.open(io.BytesIO(data)) as picture:
                mode = picture.mode
                array = np.asarray(picture.convert("L" if mode in ("1", "L", "LA") else "RGB"))
        except (OSError, SyntaxError, ValueError, TypeError) as error:
            raise DataError(f"{where}: row {row} is not a picture ({error})") from None
        if mode.startswith(("I", "F")):
            # Pillow would clip such pixels to 255.
            raise DataError(f"{where}: the picture of row {row} has more than 8 bits a channel")
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        if arrays and array.shape != arrays[0].shape:
            raise DataError(
                f"{where}: the picture of row {row} has shape {array.shape}, the first "
                f"{arrays[0].shape}; all must be alike"
            )
        arrays.append(array)
    # np.stack keeps the channels last of pictures, and torch trains narrow networks on such
    # images out of bounds (oneDNN's issue 6035).
    return torch.from_numpy(np.ascontiguousarray(np.stack(arrays)))


DATASETS: dict[str, Callable[[], tuple[_Source, _Source]]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": lambda: _hub("uoft-cs/cifar10", None, "img", "label"),
    "cifar100": lambda: _hub("uoft-cs/cifar100", None, "img", "fine_label"),
    "svhn": lambda: _hub("ufldl-stanford/svhn", "cropped_digits", "image", "label"),
}


def _subset(labels: Array, count: int | None, *, seed: int, what: str) -> Array:
    """Ascending indices of a stratified subset, class shares kept to within one sample."""
    if count is None or count == len(labels):
        return np.arange(len(labels))
    if not 1 <= count <= len(labels):
        raise DataError(f"{what}: asked for {count} samples; there are {len(labels)}")
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    # The k-th of n_c samples of a class gets (k + u) / n_c: taking the smallest of all keeps
    # every class's share.
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = (np.arange(len(members)) + random.random()) / len(members)
    return np.sort(np.argsort(rank, kind="stable")[:count])


def fingerprint(*tensors: torch.Tensor) -> str:
    """16 hexadecimal digits of the shapes and bytes of arrays."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(str(tuple(tensor.shape)).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
