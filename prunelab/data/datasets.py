"""Named image data sets, and folders of parquet files."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunelab.data.checked import Array, checked, checked_labels, count_classes, whole_numbers
from prunelab.data.parquet import read_side
from prunelab.data.pictures import decoded
from prunelab.errors import DataError

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
        train_images, test_images: uint8 or float32 [N, C, H, W].
        train_labels, test_labels: int64 [N], 0 ... num_classes - 1.
        num_classes: 0: counted by the training labels (see `count_classes`).
        fingerprint: 16 hexadecimal digits that name the data; "": of their content.
        train_groups: natural client of each training sample, int64 [N], where there is one.
        class_names: of the classes 0, 1, ..., where the data name them.

    Raises:
        DataError: what `checked` cannot take, sides that are not alike, labels that are no such
            classes, or groups of another length.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    num_classes: int = 0
    fingerprint: str = ""
    train_groups: torch.Tensor | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        found: dict[str, Any] = {}
        for side, called in (("train", "training"), ("test", "test")):
            found[f"{side}_images"], found[f"{side}_labels"] = checked(
                getattr(self, f"{side}_images"), getattr(self, f"{side}_labels"),
                where=f"{self.name}, {called} side",
            )  # fmt: skip
        for name, value in found.items():
            object.__setattr__(self, name, value)
        kinds = [f"{i.dtype} {tuple(i.shape[1:])}" for i in (self.train_images, self.test_images)]
        if kinds[0] != kinds[1] or self.train_images.dim() != 4:
            raise DataError(
                f"{self.name}: training images are {kinds[0]}, test images {kinds[1]}; expected "
                "[N, C, H, W], [N, H, W, C] or [N, H, W], both sides alike: give vectors [N, D] as "
                "images [N, 1, 1, D]"
            )
        num_classes = self.num_classes or count_classes(
            self.train_labels, self.test_labels, where=self.name
        )
        largest = max(int(labels.max()) for labels in (self.train_labels, self.test_labels))
        if largest >= num_classes:
            raise DataError(f"{self.name}: label {largest} lies outside 0 ... {num_classes - 1}")
        object.__setattr__(self, "num_classes", num_classes)
        object.__setattr__(self, "fingerprint", self.fingerprint or fingerprint(*found.values()))
        if self.train_groups is not None:
            groups = whole_numbers(self.train_groups, f"{self.name}: natural clients")
            if groups.shape != self.train_labels.shape:
                raise DataError(
                    f"{self.name}: {len(groups)} natural clients for {len(self.train_labels)} "
                    "training samples; expected one each"
                )
            object.__setattr__(self, "train_groups", groups)

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
        name: one of DATASETS, or a folder of parquet files (see `parquet.side_files`) of the sides
            train and test (or validation) with columns img or image, label, and optionally client.
        num_train, num_test: keep a stratified subset of so many; only those are decoded.
        seed: decides the subsets.

    Raises:
        DataError: unknown name, no access to the data, or data that are not such images.

    >>> load_dataset("digits").input_shape
    (1, 8, 8)
    """
    check_dataset(name)
    train, test = DATASETS[name]() if name in DATASETS else _parquet_folder(Path(name))
    sides = {"training": train, "test": test}
    labels = [checked_labels(s.labels, where=f"{name}, {w} side") for w, s in sides.items()]
    num_classes = count_classes(*labels, where=name)
    train_index, test_index = (
        _subset(own.numpy(), count, seed=seed, what=f"{name}, {what} side")
        for own, count, what in zip(labels, (num_train, num_test), sides, strict=True)
    )
    return ImageSet(
        name=Path(name).name,
        train_images=train.images(train_index),
        train_labels=labels[0][train_index],
        test_images=test.images(test_index),
        test_labels=labels[1][test_index],
        num_classes=num_classes,
        train_groups=None if train.groups is None else torch.from_numpy(train.groups[train_index]),
        class_names=train.class_names,
    )


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
    sides = []
    # A validation file is the test side only where there is no test file.
    for names in (("train",), ("test", "validation")):
        side = read_side(folder, names)
        images = _decoding(side.cells, str(folder))
        sides.append(_Source(side.labels, images, side.groups, side.class_names))
    return sides[0], sides[1]


def _columns(dataset: Any, image: str, label: str) -> _Source:
    import datasets  # noqa: PLC0415

    undecoded = dataset.cast_column(image, datasets.Image(decode=False))

    def cells(index: Array) -> Iterator[tuple[str, Any]]:
        for row, cell in zip(index.tolist(), undecoded.select(index)[image], strict=True):
            yield f"row {row}", cell["bytes"] or Path(cell["path"]).read_bytes()

    return _Source(
        dataset.with_format("numpy")[label][:],
        _decoding(cells, "the hub's data set"),
        class_names=tuple(getattr(dataset.features[label], "names", ())),
    )


def _decoding(
    cells: Callable[[Array], Iterable[tuple[str, Any]]], where: str
) -> Callable[[Array], torch.Tensor]:
    return lambda index: torch.from_numpy(decoded(cells(index), where=where))


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
