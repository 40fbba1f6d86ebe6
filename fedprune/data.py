"""Named image data sets, their division among clients, and batches.

Test data never leave this module but for evaluation: the server's labelled set and every
client's development split are drawn from the training side.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fedprune.errors import DataError

FASHION_FOLDER = Path("/usr/share/dataset-fashion-mnist")
PARTITION_SCHEMES = ("iid", "dirichlet", "pathological", "natural")
DIGITS_TEST_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and labels of both sides.

    Attributes:
        train_images, test_images: uint8 [N, C, H, W].
        train_labels, test_labels: int64 [N], 0 ... num_classes - 1.
        fingerprint: 16 hexadecimal digits that name the data.
        train_groups: natural client of each training sample, int64 [N], where there is one.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    num_classes: int
    fingerprint: str
    train_groups: torch.Tensor | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


@dataclass(frozen=True, eq=False)
class ClientData:
    """One client's samples: for training, and its development split."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    dev_images: torch.Tensor
    dev_labels: torch.Tensor


def prepare(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, C, H, W] -> float32, (x / 255 − 0.5) / 0.25.

    The constants are fixed: a mean over everybody's images would be data that leave a client.
    """
    return (images.float() / 255.0 - 0.5) / 0.25


# --- named data sets -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One side of a data set before its images are decoded."""

    labels: np.ndarray[Any, Any]
    images: Callable[[np.ndarray[Any, Any]], torch.Tensor]
    groups: np.ndarray[Any, Any] | None = None


@lru_cache(maxsize=2)
def load_dataset(
    name: str, *, num_train: int | None = None, num_test: int | None = None, seed: int = 0
) -> ImageSet:
    """A data set by name, or a folder of parquet files; cached for the process.

    Args:
        name: digits, fashion-mnist, cifar10, cifar100, svhn, or a folder whose parquet files
            are called train* and test* (or validation*) with columns img or image, label,
            and optionally client.
        num_train, num_test: keep a stratified subset of so many; only those are decoded.
        seed: decides the subsets.

    Raises:
        DataError: unknown name, no access to the data, or data that are not such images.

    >>> load_dataset("digits").input_shape
    (1, 8, 8)
    """
    if name in DATASETS:
        train, test = DATASETS[name]()
    elif Path(name).is_dir():
        train, test = _parquet_folder(Path(name))
    else:
        raise DataError(
            f"unknown data set {name!r}; known: {', '.join(DATASETS)}; "
            "or give a folder of parquet files with columns img and label"
        )
    train_index = _subset(train.labels, num_train, seed=seed, what=f"{name}, training side")
    test_index = _subset(test.labels, num_test, seed=seed, what=f"{name}, test side")
    train_labels = torch.from_numpy(train.labels[train_index].astype(np.int64))
    test_labels = torch.from_numpy(test.labels[test_index].astype(np.int64))
    num_classes = int(train.labels.max()) + 1
    for side, labels in (("training", train_labels), ("test", test_labels)):
        if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
            raise DataError(f"{name}: a {side} label lies outside 0 ... {num_classes - 1}")
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
        fingerprint=_fingerprint(train_images, train_labels, test_images, test_labels),
        train_groups=None if train.groups is None else torch.from_numpy(train.groups[train_index]),
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
    """From Debian's package or torchvision's folder ($FEDPRUNE_DATA), else downloaded there."""
    if FASHION_FOLDER.is_dir():
        return (_idx_side(FASHION_FOLDER, "train"), _idx_side(FASHION_FOLDER, "t10k"))
    from torchvision.datasets import FashionMNIST  # noqa: PLC0415

    root = os.environ.get("FEDPRUNE_DATA", str(Path.home() / ".cache" / "fedprune"))
    try:
        sides = [FashionMNIST(root, train=train, download=True) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"fashion-mnist is not in {root} and cannot be downloaded ({error}); install "
            "Debian's dataset-fashion-mnist, or set FEDPRUNE_DATA to torchvision's folder"
        ) from None
    train, test = (_in_memory(s.data.numpy()[:, None], s.targets.numpy()) for s in sides)
    return train, test


def _idx_side(folder: Path, prefix: str) -> _Source:
    def read(kind: str, header: int) -> np.ndarray[Any, Any]:
        path = next(iter(sorted(folder.glob(f"{prefix}-{kind}-idx*"))), None)
        if path is None:
            raise DataError(f"no {prefix}-{kind} file in {folder}; reinstall the package")
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        return np.frombuffer(data, np.uint8, offset=header)

    labels = read("labels", 8)
    return _in_memory(read("images", 16).reshape(len(labels), 1, 28, 28), labels)


def _in_memory(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> _Source:
    return _Source(labels, lambda index: torch.from_numpy(images[index].copy()))


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
    for prefixes in (("train",), ("test", "validation", "valid")):
        files = sorted(path for path in folder.rglob("*.parquet") if path.name.startswith(prefixes))
        if not files:
            raise DataError(
                f"no {prefixes[0]}*.parquet in {folder}; expected train*.parquet and test*.parquet"
            )
        try:
            tables = [pyarrow.parquet.read_table(path) for path in files]
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
    labels = table["label"].to_numpy()
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where}: labels must be whole numbers, got {labels.dtype}")
    groups = None
    if "client" in table.column_names:
        _, groups = np.unique(table["client"].to_numpy(zero_copy_only=False), return_inverse=True)
        groups = groups.astype(np.int64)
    column = table[image]

    def images(index: np.ndarray[Any, Any]) -> torch.Tensor:
        cells = column.take(index).to_pylist()
        return _decoded([c["bytes"] if isinstance(c, dict) else c for c in cells], index, where)

    return _Source(labels, images, groups)


def _columns(dataset: Any, image: str, label: str) -> _Source:
    import datasets  # noqa: PLC0415

    undecoded = dataset.cast_column(image, datasets.Image(decode=False))

    def images(index: np.ndarray[Any, Any]) -> torch.Tensor:
        cells = undecoded.select(index)[image]
        data = [c["bytes"] or Path(c["path"]).read_bytes() for c in cells]
        return _decoded(data, index, "the hub's data set")

    return _Source(np.asarray(dataset[label]), images)


def _decoded(encoded: list[bytes], index: np.ndarray[Any, Any], where: str) -> torch.Tensor:
    """Pictures in any format Pillow reads -> uint8 [N, C, H, W]."""
    import io  # noqa: PLC0415

    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415

    arrays: list[np.ndarray[Any, Any]] = []
    for row, data in zip(index, encoded, strict=True):
        try:
            with Image.open(io.BytesIO(data)) as picture:
                gray = picture.mode in ("L", "1", "I", "I;16")
                array = np.asarray(picture.convert("L" if gray else "RGB"))
        except (UnidentifiedImageError, OSError, TypeError) as error:
            raise DataError(f"{where}: row {row} is not a picture ({error})") from None
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        if arrays and array.shape != arrays[0].shape:
            raise DataError(
                f"{where}: the picture of row {row} has shape {array.shape}, the first "
                f"{arrays[0].shape}; all must be alike"
            )
        arrays.append(array)
    return torch.from_numpy(np.stack(arrays))


DATASETS: dict[str, Callable[[], tuple[_Source, _Source]]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": lambda: _hub("uoft-cs/cifar10", None, "img", "label"),
    "cifar100": lambda: _hub("uoft-cs/cifar100", None, "img", "fine_label"),
    "svhn": lambda: _hub("ufldl-stanford/svhn", "cropped_digits", "image", "label"),
}


def _subset(
    labels: np.ndarray[Any, Any], count: int | None, *, seed: int, what: str
) -> np.ndarray[Any, Any]:
    """Ascending indices of a stratified subset, class shares kept to within one sample."""
    if len(labels) == 0:
        raise DataError(f"{what}: there are no samples")
    if count is None or count == len(labels):
        return np.arange(len(labels))
    if count > len(labels):
        raise DataError(f"{what}: asked for {count} samples, there are {len(labels)}")
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    # The k-th of n_c samples of a class gets (k + u) / n_c: taking the smallest of all keeps
    # every class's share.
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = (np.arange(len(members)) + random.random()) / len(members)
    return np.sort(np.argsort(rank, kind="stable")[:count])


def _fingerprint(*tensors: torch.Tensor) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(str(tuple(tensor.shape)).encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()[:16]


# --- division among server and clients ---------------------------------------------------------------


def split_server_set(
    labels: torch.Tensor, *, per_class: int, seed: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Set a few labelled samples of each class aside for the server.

    Args:
        labels: int64 [N], of the training side.
        per_class: how many of each class; at most half of a class is taken.

    Returns:
        Server's and remaining indices, both ascending, disjoint, together 0 ... N - 1.
    """
    random = np.random.default_rng(seed)
    values = labels.numpy()
    chosen = [
        random.permutation(members)[: min(per_class, len(members) // 2)]
        for label in np.unique(values)
        for members in [np.flatnonzero(values == label)]
    ]
    server = np.sort(np.concatenate(chosen)).astype(np.int64)
    return server, np.setdiff1d(np.arange(len(values), dtype=np.int64), server)


def partition(
    labels: torch.Tensor,
    *,
    num_clients: int,
    scheme: str,
    alpha: float = 0.5,
    classes_per_client: int = 2,
    groups: torch.Tensor | None = None,
    seed: int,
) -> list[np.ndarray[Any, Any]]:
    """Divide samples among clients with flwr-datasets' partitioners.

    Args:
        labels: int64 [N].
        scheme: iid; dirichlet (label shares drawn with concentration `alpha`); pathological
            (`classes_per_client` labels each); natural (by `groups`, several groups a client
            where there are more groups than clients).

    Returns:
        For each client its ascending indices; every sample is in exactly one.

    Raises:
        DataError: more clients than samples, groups missing or too few, or a scheme that
            cannot be met with these numbers.
    """
    if scheme not in PARTITION_SCHEMES:
        raise DataError(
            f"unknown partition {scheme!r}; expected one of {', '.join(PARTITION_SCHEMES)}"
        )
    if num_clients > len(labels):
        raise DataError(
            f"{num_clients} clients but only {len(labels)} training samples; use fewer clients"
        )
    if scheme == "natural":
        groups = _merged_groups(groups, num_clients, seed)
    shares = _flower_partition(labels, num_clients, scheme, alpha, classes_per_client, groups, seed)
    assert sum(map(len, shares)) == len(labels)
    empty = [client for client, share in enumerate(shares) if len(share) == 0]
    if empty:
        raise DataError(f"clients {empty} would have no sample; use fewer clients")
    return shares


def _merged_groups(groups: torch.Tensor | None, num_clients: int, seed: int) -> torch.Tensor:
    """As many groups as clients: a seeded even dealing of the natural ones."""
    if groups is None:
        raise DataError("a natural partition needs a column 'client' in the data")
    found = groups.unique()
    if len(found) < num_clients:
        raise DataError(f"{num_clients} clients but only {len(found)} natural groups")
    order = np.random.default_rng(seed).permutation(len(found))
    owner = torch.empty(len(found), dtype=torch.int64)
    owner[torch.from_numpy(order)] = torch.arange(len(found)) % num_clients
    return owner[torch.searchsorted(found, groups)]


def _flower_partition(
    labels: torch.Tensor,
    num_clients: int,
    scheme: str,
    alpha: float,
    classes_per_client: int,
    groups: torch.Tensor | None,
    seed: int,
) -> list[np.ndarray[Any, Any]]:
    import datasets  # noqa: PLC0415
    from flwr_datasets import partitioner as flower  # noqa: PLC0415

    columns = {"index": np.arange(len(labels)), "label": labels.numpy()}
    if groups is not None:
        columns["group"] = groups.numpy()
    makers: dict[str, Callable[[], Any]] = {
        "iid": lambda: flower.IidPartitioner(num_partitions=num_clients),
        "dirichlet": lambda: flower.DirichletPartitioner(
            num_partitions=num_clients,
            partition_by="label",
            alpha=alpha,
            min_partition_size=min(2, len(labels) // num_clients),
            self_balancing=False,
            seed=seed,
        ),
        "pathological": lambda: flower.PathologicalPartitioner(
            num_partitions=num_clients,
            partition_by="label",
            num_classes_per_partition=classes_per_client,
            class_assignment_mode="deterministic",
            seed=seed,
        ),
        "natural": lambda: flower.NaturalIdPartitioner(partition_by="group"),
    }
    table = datasets.Dataset.from_dict(columns)
    if scheme == "iid":
        # The partitioner cuts in order, so the order is drawn first.
        table = table.select(np.random.default_rng(seed).permutation(len(labels)))
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        divider = makers[scheme]()
        divider.dataset = table
        parts = [np.asarray(divider.load_partition(k)["index"]) for k in range(num_clients)]
    except ValueError as error:
        raise DataError(f"{scheme} partition into {num_clients} clients: {error}") from None
    finally:
        if bars:
            datasets.enable_progress_bar()
    return [np.sort(part.astype(np.int64)) for part in parts]


def client_data(
    dataset: ImageSet, indices: torch.Tensor, *, dev_share: float = 0.1, seed: int
) -> ClientData:
    """A client's samples, a seeded `dev_share` of them (at least one of two) for development."""
    order = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))]
    num_dev = max(1, round(dev_share * len(order))) if len(order) > 1 else 0
    dev, train = order[:num_dev].sort().values, order[num_dev:].sort().values
    return ClientData(
        train_images=dataset.train_images[train],
        train_labels=dataset.train_labels[train],
        dev_images=dataset.train_images[dev],
        dev_labels=dataset.train_labels[dev],
    )


def label_histogram(labels: torch.Tensor, num_classes: int) -> list[int]:
    """How many samples of each class."""
    counts: list[int] = torch.bincount(labels, minlength=num_classes).tolist()
    return counts


# --- batches ------------------------------------------------------------------------------------


def batches(
    num_samples: int, *, batch_size: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Shuffled index batches; a last batch of one joins the batch before it.

    Batch norm cannot be trained on a single value, and no sample should be left out for that.
    """
    order = torch.randperm(num_samples, generator=generator)
    starts = list(range(0, num_samples, batch_size))
    if len(starts) > 1 and num_samples - starts[-1] == 1:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], num_samples], strict=True):
        yield order[start:end]


def augment(images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Random crop of the zero-padded image and random horizontal flip, drawn for each image.

    Args:
        images: [N, C, H, W]; padding is H / 8 on every side (4 for CIFAR's 32).
    """
    n, _, height, width = images.shape
    pad = math.ceil(height / 8)
    padded = functional.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    rows = top[:, None] + torch.arange(height)
    columns = torch.arange(width).repeat(n, 1)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + left[:, None]
    sample = torch.arange(n)[:, None, None]
    # Indexing dimensions 0, 2, 3 around the slice puts channels last.
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
