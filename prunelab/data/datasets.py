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
from typing import TYPE_CHECKING, Any

import numpy as np

from prunelab.data.arrays import Array, count_classes, label_array
from prunelab.data.folders import read_classes, side_folders
from prunelab.data.parquet import has_side, read_side
from prunelab.data.pictures import decoded
from prunelab.data.reading import TEST_NAMES, Reading
from prunelab.errors import DataError, close_names
from prunelab.runs.seeds import rng

if TYPE_CHECKING:
    import torch

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
        from prunelab.data.checked import checked, checked_groups  # noqa: PLC0415 - need torch

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
            count = len(self.train_labels)
            groups = checked_groups(self.train_groups, count, where=self.name)
            object.__setattr__(self, "train_groups", groups)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


Resize = tuple[int, int] | None


@dataclass(frozen=True)
class Source:
    """One side of a data set before its images are decoded.

    Attributes:
        labels: int64 [N].
        images: (rows, height and width that pictures are brought to) -> the images.
        groups: natural client of each, int64 [N], where there is one.
        class_names: of the classes 0, 1, ..., where the data name them.
    """

    labels: Array
    images: Callable[[Array, Resize], Array]
    groups: Array | None = None
    class_names: tuple[str, ...] = ()

    def at(self, rows: Array) -> Source:
        """Some of the samples."""
        return Source(
            self.labels[rows],
            lambda index, resize: self.images(rows[index], resize),
            None if self.groups is None else self.groups[rows],
            self.class_names,
        )


def check_dataset(name: str) -> None:
    """Raise DataError, listing the known ones, unless `name` is a known data set or a folder."""
    if name not in DATASETS and not Path(name).is_dir():
        if Path(name).exists():
            raise DataError(
                f"{name} is a file of another kind; give a folder, a table (.csv, .tsv, .parquet) "
                "or arrays (.npz, or the folder of inputs.npy and targets.npy)"
            )
        raise DataError(
            f"unknown data set {name!r}; known: {', '.join(DATASETS)}; or give a folder of class "
            "folders or of parquet files, a table (.csv, .tsv, .parquet), arrays (.npz), or "
            "module:function; "
            f"there is no file or folder of that name in {Path.cwd()}{close_names(name, DATASETS)}"
        )


@lru_cache(maxsize=2)
def load_dataset(
    name: str, *, num_train: int | None = None, num_test: int | None = None, seed: int = 0
) -> ImageSet:
    """A data set of images by name or folder; cached for the process.

    Args:
        name: one of DATASETS; a folder of class folders; or a folder of parquet files (see
            `parquet.side_files`) of the sides train and test (or val) with columns img or
            image, label, and optionally client. Without a test side a fifth of every class is it.
        num_train, num_test: keep a stratified subset of so many; only those are decoded.
        seed: decides the subsets.

    Raises:
        DataError: unknown name, no access to the data, or data that are not such images.

    >>> load_dataset("digits").input_shape
    (1, 8, 8)
    """
    check_dataset(name)
    train, test = sources(name, seed=seed)
    num_classes = num_classes_of(train, test, where=name)  # of all: a subset has the same ones
    train, test = cut(train, test, num_train=num_train, num_test=num_test, seed=seed, where=name)
    assert test is not None
    import torch  # noqa: PLC0415 - what needs no tensors takes `sources`

    def images(side: Source) -> torch.Tensor:
        return torch.from_numpy(side.images(np.arange(len(side.labels)), None))

    return ImageSet(
        name=Path(name).name,
        train_images=images(train),
        train_labels=torch.from_numpy(train.labels),
        test_images=images(test),
        test_labels=torch.from_numpy(test.labels),
        num_classes=num_classes,
        train_groups=None if train.groups is None else torch.from_numpy(train.groups),
        class_names=train.class_names,
    )


def sources(
    name: str, how: Reading | None = None, *, seed: int = 0
) -> tuple[Source, Source | None]:
    """Both sides of a data set of DATASETS or a folder, with nothing decoded.

    Args:
        how: how they are taken.
        seed: decides what is set aside for the test where there is no test side.

    Raises:
        DataError: as `load_dataset`.
    """
    how = how or Reading()
    test: Source | None
    if name in DATASETS:
        train, test = DATASETS[name]()
    elif next(Path(name).rglob("*.parquet"), None) is not None:
        train, test = _parquet_folder(Path(name), how)
    else:
        train, test = _class_folders(Path(name), how)
    labels = [
        label_array(side.labels, where=f"{name}, {what} side")
        for what, side in (("training", train), ("test", test))
        if side is not None
    ]
    train = replace(train, labels=labels[0])
    if test is not None:
        return train, replace(test, labels=labels[1])
    held = held_out(train.labels, share=how.test_share, seed=seed, where=name)
    rows = np.arange(len(train.labels))
    return train.at(rows[~held]), train.at(rows[held]) if held.any() else None


def cut(
    train: Source,
    test: Source | None,
    *,
    num_train: int | None,
    num_test: int | None,
    seed: int,
    where: str,
) -> tuple[Source, Source | None]:
    """Stratified subsets of so many of both sides; None: all."""
    rows = subset(train.labels, num_train, seed=seed, what=f"{where}, training side")
    if test is None:
        return train.at(rows), None
    others = subset(test.labels, num_test, seed=seed, what=f"{where}, test side")
    return train.at(rows), test.at(others)


def num_classes_of(train: Source, test: Source | None, *, where: str) -> int:
    """The number of classes that are named, or else are there."""
    sides = [side.labels for side in (train, test) if side is not None]
    return len(train.class_names) or count_classes(*sides, where=where)


def held_out(labels: Array | None, *, share: float, seed: int, where: str, count: int = 0) -> Array:
    """Which samples are set aside for the test, truth values [N].

    Args:
        labels: int64 [N], of which the share of every class is set aside; None: of `count` samples
            without classes.
        share: 0: none.

    Raises:
        DataError: so few samples that nothing would be set aside.
    """
    groups = np.zeros(count, np.int64) if labels is None else labels
    held = np.zeros(len(groups), dtype=bool)
    for label in np.unique(groups).tolist():
        members = rng(seed, label).permutation(np.flatnonzero(groups == label))
        held[members[: int(share * len(members))]] = True
    if share and not held.any():
        raise DataError(
            f"{where}: too few samples to set {share:.0%} of every class aside for the test; give "
            "a test side, or a larger share"
        )
    return held


def _digits() -> tuple[Source, Source]:
    """scikit-learn's 1,797 digits of 8×8, a fixed stratified fifth of them for testing."""
    from sklearn.datasets import load_digits  # noqa: PLC0415
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST_SHARE, stratify=labels, random_state=0
    )
    return _in_memory(images[train], labels[train]), _in_memory(images[test], labels[test])


def _fashion_mnist() -> tuple[Source, Source]:
    """From torchvision's folder under $FEDPRUNE_DATA or Debian's package, else downloaded."""
    root = Path(os.environ.get("FEDPRUNE_DATA", Path.home() / ".cache" / "fedprune"))
    folders = (root / "FashionMNIST" / "raw", DEBIAN_FASHION_MNIST)
    # A download that failed leaves a folder without files.
    folder = next((found for found in folders if any(found.glob("train-images-*"))), None)
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


def _idx_side(folder: Path, prefix: str) -> Source:
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


def _in_memory(images: Array, labels: Array) -> Source:
    def taken(index: Array, resize: Resize) -> Array:
        if resize is None:
            return images[index]
        cells = ((f"sample {row}", images[row]) for row in index.tolist())
        return decoded(cells, where="data", resize=resize)

    return Source(labels, taken)


def _hub(path: str, config: str | None, image: str, label: str) -> tuple[Source, Source]:
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


def _parquet_folder(folder: Path, how: Reading) -> tuple[Source, Source | None]:
    sides: list[Source] = []
    for names in (("train",), TEST_NAMES):
        if sides and not has_side(folder, names):
            return sides[0], None
        known = sides[0].class_names if sides else how.class_names
        side = read_side(folder, names, columns=dict(how.columns), class_names=known)
        images = _decoding(side.cells, str(folder))
        sides.append(Source(side.labels, images, side.groups, side.class_names))
    return sides[0], sides[1]


def _class_folders(folder: Path, how: Reading) -> tuple[Source, Source | None]:
    train_folder, test_folder = side_folders(folder)
    train = read_classes(train_folder, class_names=how.class_names)
    source = Source(
        train.labels, _decoding(train.cells, str(folder)), class_names=train.class_names
    )
    if test_folder is None:
        return source, None
    test = read_classes(test_folder, class_names=train.class_names)
    return source, Source(test.labels, _decoding(test.cells, str(folder)))


def _columns(dataset: Any, image: str, label: str) -> Source:
    import datasets  # noqa: PLC0415

    undecoded = dataset.cast_column(image, datasets.Image(decode=False))

    def cells(index: Array) -> Iterator[tuple[str, Any]]:
        for row, cell in zip(index.tolist(), undecoded.select(index)[image], strict=True):
            yield f"row {row}", cell["bytes"] or Path(cell["path"]).read_bytes()

    return Source(
        dataset.with_format("numpy")[label][:],
        _decoding(cells, "the hub's data set"),
        class_names=tuple(getattr(dataset.features[label], "names", ())),
    )


def _decoding(
    cells: Callable[[Array], Iterable[tuple[str, Any]]], where: str
) -> Callable[[Array, Resize], Array]:
    return lambda index, resize: decoded(cells(index), where=where, resize=resize)


DATASETS: dict[str, Callable[[], tuple[Source, Source]]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": lambda: _hub("uoft-cs/cifar10", None, "img", "label"),
    "cifar100": lambda: _hub("uoft-cs/cifar100", None, "img", "fine_label"),
    "svhn": lambda: _hub("ufldl-stanford/svhn", "cropped_digits", "image", "label"),
}


def subset(labels: Array, count: int | None, *, seed: int, what: str) -> Array:
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
    import torch  # noqa: PLC0415 - there are tensors

    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(str(tuple(tensor.shape)).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
