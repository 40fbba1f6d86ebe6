"""Data sets: pictures as they were written, seeds and fingerprints."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from prunelab.data.datasets import DATASETS, _columns, load_dataset
from prunelab.errors import DataError, DataWarning


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    load_dataset.cache_clear()
    yield
    load_dataset.cache_clear()


def encoded(pixels: np.ndarray) -> bytes:  # type: ignore[type-arg]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def random_images(count: int, *, seed: int = 0, shape: tuple[int, ...] = (6, 5, 3)) -> list[bytes]:
    random = np.random.default_rng(seed)
    return [encoded(random.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


def pixels(images: list[bytes]) -> torch.Tensor:
    """[N, C, H, W] of pictures, one by one."""
    arrays = [np.atleast_3d(np.asarray(Image.open(io.BytesIO(image)))) for image in images]
    return torch.stack([torch.from_numpy(a.transpose(2, 0, 1).copy()) for a in arrays])


def write_side(path: Path, images: list[bytes], labels: object, **columns: object) -> None:
    cells = [{"bytes": image, "path": None} for image in images]
    pq.write_table(pa.table({"img": cells, "label": labels, **columns}), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60, 30 and 10 training images of three classes, 5 test images."""
    write_side(tmp_path / "train.parquet", random_images(100), [0] * 60 + [1] * 30 + [2] * 10)
    write_side(tmp_path / "test.parquet", random_images(5, seed=1), [0, 1, 2, 0, 1])
    return tmp_path


# --- named data sets -----------------------------------------------------------------------------


def test_digits_are_scikit_learns_split_once_and_for_all() -> None:
    """1,797 images, a fifth of them (360) for testing; sixteen grey levels spread to 0 ... 255."""
    data = load_dataset("digits")
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert (data.input_shape, data.num_classes, data.name) == ((1, 8, 8), 10, "digits")
    both = torch.cat([data.train_images, data.test_images]).reshape(-1, 64).double() * (16 / 255)
    original = torch.from_numpy(load_digits().data)
    assert sorted(both.round().tolist()) == sorted(original.tolist())
    assert int(data.train_images.max()) == 255
    share = torch.bincount(data.test_labels, minlength=10) / 360
    whole = torch.from_numpy(load_digits().target).bincount(minlength=10) / 1797
    assert (share - whole).abs().max() < 1 / 360
    assert load_dataset("digits", seed=9).fingerprint == data.fingerprint


def test_the_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    def fingerprint(images: list[bytes], labels: list[int]) -> str:
        load_dataset.cache_clear()
        write_side(tmp_path / "train.parquet", images, labels)
        write_side(tmp_path / "test.parquet", random_images(2, seed=9), [0, 1])
        return load_dataset(str(tmp_path)).fingerprint

    images = random_images(4)
    first = fingerprint(images, [0, 1, 0, 1])
    assert len(first) == 16
    assert set(first) <= set("0123456789abcdef")
    assert fingerprint(images, [0, 1, 0, 1]) == first
    others = [fingerprint(images, [0, 1, 1, 1]), fingerprint(random_images(4, seed=1), [0, 1] * 2)]
    assert len({first, *others}) == 3


def test_a_folder_holds_the_pictures_it_was_written_with(folder: Path) -> None:
    data = load_dataset(str(folder))
    assert torch.equal(data.train_images, pixels(random_images(100)))
    assert torch.equal(data.test_images, pixels(random_images(5, seed=1)))
    assert data.train_images.is_contiguous()
    assert data.train_labels.tolist() == [0] * 60 + [1] * 30 + [2] * 10
    assert data.test_labels.tolist() == [0, 1, 2, 0, 1]
    assert (data.num_classes, data.input_shape, data.train_groups) == (3, (3, 6, 5), None)
    assert load_dataset(str(folder)) is data


def test_several_files_of_plain_bytes_are_one_gray_data_set(tmp_path: Path) -> None:
    images = random_images(5, shape=(8, 7))
    for part, rows in enumerate((slice(0, 3), slice(3, 5))):
        table = pa.table({"image": images[rows], "label": list(range(5))[rows]})
        pq.write_table(table, tmp_path / f"train-0000{part}-of-00002.parquet")
    pq.write_table(pa.table({"image": images, "label": [0] * 5}), tmp_path / "validation.parquet")
    data = load_dataset(str(tmp_path))
    assert torch.equal(data.train_images, pixels(images))
    assert data.input_shape == (1, 8, 7)
    # With a test file there, validation is no longer the test side.
    pq.write_table(pa.table({"image": images[:1], "label": [0]}), tmp_path / "test.parquet")
    load_dataset.cache_clear()
    with pytest.warns(DataWarning, match=r"side is test\.parquet; not read: validation\.parquet"):
        assert len(load_dataset(str(tmp_path)).test_labels) == 1


def test_a_subset_is_stratified_and_decided_by_the_seed(folder: Path) -> None:
    """20 of 60 + 30 + 10: 12, 6 and 2, each to within one."""
    data = load_dataset(str(folder), num_train=20, num_test=3, seed=1)
    assert len(data.train_labels) == len(data.train_images) == 20
    counts = data.train_labels.bincount(minlength=3).tolist()
    assert all(abs(n - m) <= 1 for n, m in zip(counts, (12, 6, 2), strict=True))
    assert sorted(data.test_labels.tolist()) == [0, 1, 2]
    assert data.num_classes == 3
    again = load_dataset(str(folder), num_train=20, num_test=3, seed=2)
    assert again.fingerprint != data.fingerprint
    load_dataset.cache_clear()
    assert load_dataset(str(folder), num_train=20, num_test=3, seed=1) is not data
    assert (
        load_dataset(str(folder), num_train=20, num_test=3, seed=1).fingerprint == data.fingerprint
    )


def test_the_smallest_subset_is_not_always_of_the_largest_class(folder: Path) -> None:
    firsts = [load_dataset(str(folder), num_train=1, seed=seed).train_labels for seed in range(20)]
    assert {0, 1} <= {int(labels) for labels in firsts}


def test_rows_outside_the_subset_are_not_decoded(folder: Path) -> None:
    """The rows that were not chosen are turned into garbage, and the subset stays the same."""
    whole = load_dataset(str(folder))
    data = load_dataset(str(folder), num_train=10)
    chosen = {
        int((whole.train_images == image).flatten(1).all(1).nonzero())
        for image in data.train_images
    }
    images = [im if row in chosen else b"?" for row, im in enumerate(random_images(100))]
    write_side(folder / "train.parquet", images, whole.train_labels.tolist())
    load_dataset.cache_clear()
    assert load_dataset(str(folder), num_train=10).fingerprint == data.fingerprint
    first = min(set(range(100)) - chosen)
    with pytest.raises(DataError, match=f"row {first} is not a picture"):
        load_dataset(str(folder))


@pytest.mark.parametrize("size", [{"num_train": 101}, {"num_train": 0}, {"num_test": -1}])
def test_a_subset_that_cannot_be_is_refused(folder: Path, size: dict[str, int]) -> None:
    with pytest.raises(
        DataError, match=f"asked for {next(iter(size.values()))} samples; there are"
    ):
        load_dataset(str(folder), **size)


def test_clients_of_a_folder_become_groups(folder: Path) -> None:
    """Names in alphabetical order are 0, 1, 2; a subset keeps each sample's own group."""
    names = ["zoe", "ann", "bob", "ann"] * 25
    labels = [0] * 60 + [1] * 30 + [2] * 10
    write_side(folder / "train.parquet", random_images(100), labels, client=names)
    whole = load_dataset(str(folder))
    assert whole.train_groups is not None
    assert whole.train_groups.dtype == torch.int64
    assert whole.train_groups.tolist() == [2, 0, 1, 0] * 25
    part = load_dataset(str(folder), num_train=7)
    assert part.train_groups is not None
    for image, group in zip(part.train_images, part.train_groups, strict=True):
        row = int((whole.train_images == image).flatten(1).all(1).nonzero())
        assert group == whole.train_groups[row]


def test_pictures_that_are_not_alike_are_refused(folder: Path) -> None:
    def refuse(odd: bytes, words: str) -> None:
        images = [*random_images(3), odd]
        write_side(folder / "test.parquet", images, [0, 1, 2, 0])
        with pytest.raises(DataError, match=words):
            load_dataset(str(folder))

    refuse(
        random_images(1, shape=(6, 6, 3))[0],
        r"row 3 is uint8 of shape \(3, 6, 6\), the first uint8 of \(3, 6, 5",
    )
    refuse(encoded(np.full((6, 5), 999, np.uint16)), "row 3 has more than 8 bits")
    refuse(random_images(1)[0][:-30], "row 3 is not a picture")
    write_side(folder / "test.parquet", random_images(2, shape=(4, 4, 3)), [0, 1])
    with pytest.raises(
        DataError, match=r"images are torch.uint8 \(3, 6, 5\), test images torch.uint8 \(3, 4, 4\)"
    ):
        load_dataset(str(folder))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 3], "test label 3 of row 1 lies outside 0 ... 2"),
        ([-1, 0], "test.parquet: sample 0 has the label -1"),
        ([0.0, 1.0], r"labels are float64 of shape \[2\], expected whole numbers"),
        (["a", "b"], "row 0 has the label 'a', which is no number as on the other side"),
        ([0, None], "column 'label' has 1 empty cells"),
    ],
)
def test_labels_that_are_no_classes_are_refused(
    folder: Path, labels: list[object], words: str
) -> None:
    write_side(folder / "test.parquet", random_images(2), labels)
    with pytest.raises(DataError, match=words):
        load_dataset(str(folder))


def test_folders_that_are_no_data_set_are_refused(folder: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), folder / "test.parquet")
    with pytest.raises(
        DataError, match=r"test\.parquet: expected columns img .*got \['label', 'te"
    ):
        load_dataset(str(folder))
    write_side(folder / "test.parquet", [], pa.array([], pa.int64()))
    with pytest.raises(DataError, match=r"test side has no samples|expected columns"):
        load_dataset(str(folder))
    (folder / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot read"):
        load_dataset(str(folder))
    (folder / "test.parquet").rename(folder / "all.parquet")
    (folder / "train.parquet").unlink()
    with pytest.raises(DataError, match=r"expected train\*\.parquet and test\*\.parquet"):
        load_dataset(str(folder))


def test_an_unknown_name_lists_the_known_ones_and_folders() -> None:
    with pytest.raises(DataError, match=f"'mnost'; known: {', '.join(DATASETS)}; or give a folder"):
        load_dataset("mnost")


def write_idx(path: Path, values: np.ndarray) -> None:  # type: ignore[type-arg]
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    data = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_is_read_from_idx_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    monkeypatch.setenv("FEDPRUNE_DATA", str(tmp_path))
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28))
    for prefix, count in (("train", 6), ("t10k", 2)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte{suffix}", images[:count])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(count))
    data = load_dataset("fashion-mnist", num_train=4)
    kept = data.train_labels.tolist()
    assert len(kept) == 4
    assert np.array_equal(data.train_images[:, 0].numpy(), images[kept])
    assert np.array_equal(data.test_images[:, 0].numpy(), images[:2])
    assert (data.num_classes, data.input_shape) == (10, (1, 28, 28))

    write_idx(raw / f"t10k-labels-idx1-ubyte{suffix}", np.arange(3))
    with pytest.raises(DataError, match="2 t10k images but 3 labels"):
        load_dataset("fashion-mnist")
    damaged = raw / f"t10k-labels-idx1-ubyte{suffix}"
    write_idx(damaged, np.zeros((2, 2)))
    with pytest.raises(DataError, match="damaged"):
        load_dataset("fashion-mnist")
    damaged.write_bytes(damaged.read_bytes()[:9])
    with pytest.raises(DataError, match=r"damaged|cannot read"):
        load_dataset("fashion-mnist")
    damaged.unlink()
    with pytest.raises(DataError, match="cannot read"):
        load_dataset("fashion-mnist")


def test_the_folder_that_a_failed_download_leaves_hides_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    monkeypatch.setenv("FEDPRUNE_DATA", str(tmp_path))
    monkeypatch.setattr("prunelab.data.datasets.DEBIAN_FASHION_MNIST", packaged)
    for prefix in ("train", "t10k"):
        write_idx(packaged / f"{prefix}-images-idx3-ubyte", np.zeros((3, 28, 28)))
        write_idx(packaged / f"{prefix}-labels-idx1-ubyte", np.arange(3))
    assert len(load_dataset("fashion-mnist").train_labels) == 3


def test_a_data_set_of_the_hub_gives_the_same_pictures() -> None:
    images = random_images(6)
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": image, "path": None} for image in images], "fine_label": [5, 4] * 3}
    ).cast_column("image", datasets.Image())
    side = _columns(table, "image", "fine_label")
    assert side.labels.tolist() == [5, 4] * 3
    assert np.array_equal(side.images(np.array([1, 4]), None), pixels(images)[[1, 4]])


def test_importing_is_light_and_no_network_is_a_clear_error(tmp_path: Path) -> None:
    code = """
import sys, prunelab.data.datasets
heavy = {"datasets", "flwr", "flwr_datasets", "PIL", "pyarrow", "sklearn", "torchvision"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
try:
    prunelab.data.datasets.load_dataset("cifar10")
except prunelab.data.datasets.DataError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("cannot load uoft-cs/cifar10 from the hub")
    assert "give a folder of parquet files" in result.stdout
