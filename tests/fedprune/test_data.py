"""Data sets and their division: nothing lost, nothing shared, seeds decide everything."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from fedprune.batches import augment, batches, prepare
from fedprune.config import PARTITIONS
from fedprune.data import DATASETS, ImageSet, _columns, load_dataset
from fedprune.errors import DataError
from fedprune.partition import (
    client_data,
    label_histogram,
    partition,
    split_server_set,
)


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    load_dataset.cache_clear()
    yield
    load_dataset.cache_clear()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    share = torch.tensor(label_histogram(data.test_labels, 10)) / 360
    whole = torch.tensor(label_histogram(torch.from_numpy(load_digits().target), 10)) / 1797
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
    assert len(load_dataset(str(tmp_path)).test_labels) == 1


def test_a_subset_is_stratified_and_decided_by_the_seed(folder: Path) -> None:
    """20 of 60 + 30 + 10: 12, 6 and 2, each to within one."""
    data = load_dataset(str(folder), num_train=20, num_test=3, seed=1)
    assert len(data.train_labels) == len(data.train_images) == 20
    counts = label_histogram(data.train_labels, 3)
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
        random_images(1, shape=(6, 6, 3))[0], r"row 3 has shape \(3, 6, 6\), the first \(3, 6, 5"
    )
    refuse(random_images(1, shape=(6, 5))[0], r"row 3 has shape \(1, 6, 5\)")
    refuse(encoded(np.full((6, 5), 999, np.uint16)), "row 3 has more than 8 bits")
    refuse(random_images(1)[0][:-30], "row 3 is not a picture")
    write_side(folder / "test.parquet", random_images(2, shape=(4, 4, 3)), [0, 1])
    with pytest.raises(
        DataError, match=r"training images are \(3, 6, 5\), test images \(3, 4, 4\)"
    ):
        load_dataset(str(folder))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 3], "test label 3 of row 1 lies outside 0 ... 2"),
        ([-1, 0], "test label -1 of row 0"),
        ([0.0, 1.0], "whole numbers, got float64"),
        (["a", "b"], "whole numbers, got object"),
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
    (folder / "test.parquet").unlink()
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
    assert (data.num_classes, data.input_shape) == (6, (1, 28, 28))

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


def test_a_data_set_of_the_hub_gives_the_same_pictures() -> None:
    images = random_images(6)
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": image, "path": None} for image in images], "fine_label": [5, 4] * 3}
    ).cast_column("image", datasets.Image())
    side = _columns(table, "image", "fine_label")
    assert side.labels.tolist() == [5, 4] * 3
    assert torch.equal(side.images(np.array([1, 4])), pixels(images)[[1, 4]])


def test_importing_is_light_and_no_network_is_a_clear_error(tmp_path: Path) -> None:
    code = """
import sys, fedprune.data
heavy = {"datasets", "flwr", "flwr_datasets", "PIL", "pyarrow", "sklearn", "torchvision"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
try:
    fedprune.data.load_dataset("cifar10")
except fedprune.data.DataError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("cannot load uoft-cs/cifar10 from the hub")
    assert "give a folder of parquet files" in result.stdout


# --- division ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 12), st.integers(0, 99))
def test_the_server_takes_at_most_half_of_a_class(
    labels: list[int], per_class: int, seed: int
) -> None:
    values = np.array(labels)
    server, rest = split_server_set(torch.tensor(labels), per_class=per_class, seed=seed)
    assert server.dtype == rest.dtype == np.int64
    assert sorted([*server, *rest]) == list(range(len(labels)))
    assert (np.diff(server) > 0).all()
    assert (np.diff(rest) > 0).all()
    for label in range(5):
        expected = min(per_class, int((values == label).sum()) // 2)
        assert (values[server] == label).sum() == expected


def test_the_server_set_is_drawn_by_its_seed() -> None:
    labels = torch.arange(200) % 4
    sets = [split_server_set(labels, per_class=5, seed=seed)[0].tolist() for seed in (0, 0, 1)]
    assert sets[0] == sets[1] != sets[2]
    with pytest.raises(DataError, match="got -1"):
        split_server_set(labels, per_class=-1, seed=0)


def divide(
    labels: torch.Tensor, num_clients: int, scheme: str, **settings: object
) -> list[list[int]]:
    arguments = {"seed": 0, "groups": torch.arange(len(labels)) % (num_clients + 3), **settings}
    shares = partition(labels, num_clients=num_clients, scheme=scheme, **arguments)  # type: ignore[arg-type]
    assert all(share.dtype == np.int64 for share in shares)
    return [share.tolist() for share in shares]


@pytest.mark.parametrize("scheme", PARTITIONS)
@settings(max_examples=8, deadline=None)
@given(num_clients=st.integers(3, 9), seed=st.integers(0, 2**62), extra=st.integers(0, 70))
def test_every_sample_is_in_exactly_one_share(
    scheme: str, num_clients: int, seed: int, extra: int
) -> None:
    labels = torch.arange(60 + extra) % 5 * 3  # classes 0, 3, 6, 9, 12: gaps do not matter
    shares = divide(labels, num_clients, scheme, seed=seed, alpha=5.0)
    assert len(shares) == num_clients
    assert all(share and share == sorted(share) for share in shares)
    assert sorted(index for share in shares for index in share) == list(range(len(labels)))


@pytest.mark.parametrize("scheme", PARTITIONS)
def test_a_partition_is_decided_by_its_seed_alone_and_is_silent(
    scheme: str, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = torch.arange(300) % 10
    first = divide(labels, 8, scheme, seed=1)
    np.random.seed(3)  # noqa: NPY002 - the global stream must not matter
    state, torch_state = np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index,union-attr] # noqa: NPY002
    bars = datasets.utils.are_progress_bars_disabled()
    assert divide(labels, 8, scheme, seed=1) == first
    assert divide(labels, 8, scheme, seed=2) != first
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index,union-attr] # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert datasets.utils.are_progress_bars_disabled() == bars
    assert capfd.readouterr() == ("", "")


def test_iid_shares_are_even_and_mixed() -> None:
    """103 samples sorted by class among 4: sizes 26, 26, 26, 25, both classes in every share."""
    labels = (torch.arange(103) >= 50).long()
    shares = divide(labels, 4, "iid")
    assert sorted(map(len, shares)) == [25, 26, 26, 26]
    assert all(set(labels[share].tolist()) == {0, 1} for share in shares)


def test_dirichlet_counts_are_the_cuts_of_the_drawn_shares() -> None:
    """A class of n samples is cut at ⌊n · cumulative shares⌋; its shares are a draw of its own."""
    labels = torch.tensor([0] * 100 + [1] * 70 + [2] * 45)
    shares = divide(labels, 4, "dirichlet", alpha=0.8, seed=11)
    random = np.random.default_rng(11)
    for label, count in enumerate((100, 70, 45)):
        cuts = (np.cumsum(random.dirichlet([0.8] * 4)) * count).astype(int)[:-1]
        expected = np.diff([0, *cuts, count]).tolist()
        assert [labels[share].tolist().count(label) for share in shares] == expected


def test_dirichlet_does_not_follow_the_order_of_the_file() -> None:
    """One class of 400: shares of neighbours in the file would be four intervals."""
    shares = divide(torch.zeros(400, dtype=torch.int64), 4, "dirichlet", alpha=100.0)
    assert all(max(share) - min(share) + 1 > 2 * len(share) for share in shares)


def test_dirichlet_concentration_sets_the_skew() -> None:
    labels = torch.arange(4000) % 10

    def largest_class_share(alpha: float) -> float:
        shares = divide(labels, 8, "dirichlet", alpha=alpha)
        return sum(max(np.bincount(labels[s])) / len(s) for s in shares) / len(shares)

    assert largest_class_share(1000.0) < 0.13
    assert largest_class_share(0.1) > 0.35


def test_dirichlet_that_cannot_fill_all_shares_is_refused() -> None:
    with pytest.raises(DataError, match=r"50 samples among 25 clients with alpha 0\.01: no draw"):
        divide(torch.arange(50) % 2, 25, "dirichlet", alpha=0.01)


@pytest.mark.parametrize(("clients", "per_client"), [(8, 2), (5, 2), (4, 3), (1, 10), (30, 1)])
def test_pathological_clients_have_their_number_of_classes(clients: int, per_client: int) -> None:
    """8 clients of 2 classes: 16 parts of 10 classes, so six classes have two clients, four one."""
    labels = torch.arange(400) % 10
    shares = divide(labels, clients, "pathological", classes_per_client=per_client)
    held = [set(labels[share].tolist()) for share in shares]
    assert all(len(classes) == per_client for classes in held)
    users = [sum(label in classes for classes in held) for label in range(10)]
    assert sum(users) == clients * per_client
    assert max(users) - min(users) <= 1
    for label in range(10):  # a class is cut evenly among its clients
        counts = [
            labels[s].tolist().count(label) for s in shares if label in set(labels[s].tolist())
        ]
        assert max(counts) - min(counts) <= 1


def test_pathological_clients_draw_which_classes_go_together() -> None:
    """2 of 10 classes each: in file order client 0 would always hold classes 0 and 1."""
    labels = torch.arange(100) % 10
    pairs = {
        tuple(labels[divide(labels, 5, "pathological", seed=seed)[0]].unique().tolist())
        for seed in range(6)
    }
    assert len(pairs) > 2


def test_pathological_partitions_that_would_lose_samples_are_refused() -> None:
    labels = torch.arange(100) % 10
    for clients, per_client in ((4, 2), (5, 11), (5, 0)):
        words = f"{clients} clients of {per_client} classes each cannot hold 10 classes"
        with pytest.raises(DataError, match=words):
            divide(labels, clients, "pathological", classes_per_client=per_client)
    rare = torch.tensor([0] * 20 + [7])
    with pytest.raises(DataError, match="class 7 has 1 samples for 2 clients"):
        divide(rare, 2, "pathological")


def test_natural_groups_stay_whole_and_are_dealt_evenly() -> None:
    """7 groups among 3 clients: 3, 2 and 2 of them."""
    groups = torch.arange(70) % 7 * 11
    shares = divide(torch.zeros(70, dtype=torch.int64), 3, "natural", groups=groups)
    held = [set(groups[share].tolist()) for share in shares]
    assert sorted(map(len, held)) == [2, 2, 3]
    assert set.union(*held) == set(groups.tolist())


def test_partitions_that_cannot_be_are_refused() -> None:
    labels = torch.arange(10) % 2
    for scheme in PARTITIONS:
        with pytest.raises(DataError, match="10 training samples among 11 clients"):
            divide(labels, 11, scheme)
    with pytest.raises(DataError, match="among 0 clients"):
        divide(labels, 0, "iid")
    with pytest.raises(DataError, match="'sharded'; expected one of iid, dirichlet"):
        divide(labels, 2, "sharded")
    with pytest.raises(DataError, match="3 clients but only 2 natural groups"):
        divide(labels, 3, "natural", groups=labels)
    with pytest.raises(DataError, match="column 'client'"):
        divide(labels, 3, "natural", groups=None)


def numbered(count: int) -> ImageSet:
    """Sample i has label i and pixels i."""
    labels = torch.arange(count)
    images = labels.to(torch.uint8).reshape(-1, 1, 1, 1)
    return ImageSet("numbered", images, labels, images[:0], labels[:0], count, "0" * 16)


@pytest.mark.parametrize(
    ("count", "share", "num_dev"),
    [(0, 0.1, 0), (1, 0.1, 0), (2, 0.1, 1), (9, 0.1, 1), (40, 0.1, 4), (3, 0.99, 2)],
)
def test_a_client_keeps_a_part_for_development(count: int, share: float, num_dev: int) -> None:
    indices = torch.arange(50)[torch.randperm(50, generator=seeded())][:count]
    data = client_data(numbered(50), indices, dev_share=share, seed=4)
    dev, train = data.dev_labels.tolist(), data.train_labels.tolist()
    assert len(dev) == num_dev
    assert sorted(dev + train) == sorted(indices.tolist())
    assert data.dev_images.flatten().tolist() == dev
    assert data.train_images.flatten().tolist() == train


def test_the_development_split_is_drawn_by_its_seed() -> None:
    splits = [
        client_data(numbered(50), torch.arange(50), seed=seed).dev_labels.tolist()
        for seed in (0, 0, 1)
    ]
    assert splits[0] == splits[1] != splits[2]


def test_label_histogram_counts_absent_classes_too() -> None:
    assert label_histogram(torch.tensor([3, 0, 3]), 5) == [1, 0, 0, 2, 0]
    assert label_histogram(torch.tensor([], dtype=torch.int64), 2) == [0, 0]


# --- batches -------------------------------------------------------------------------------------


def test_prepare_uses_fixed_constants() -> None:
    """(51 / 255 − 0.5) / 0.25 = −1.2; float images are taken as prepared."""
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    torch.testing.assert_close(prepare(images).flatten(), torch.tensor([-2.0, -1.2, 2.0]))
    values = torch.tensor([0.25, 300.0], dtype=torch.float64)
    assert prepare(values).dtype == torch.float32
    assert prepare(values).tolist() == [0.25, 300.0]


@given(st.integers(0, 40), st.integers(2, 12), st.integers(0, 9))
def test_batches_are_a_shuffle_without_a_lonely_sample(
    num_samples: int, batch_size: int, seed: int
) -> None:
    found = list(batches(num_samples, batch_size=batch_size, generator=seeded(seed)))
    assert sorted(torch.cat(found).tolist() if found else []) == list(range(num_samples))
    sizes = [len(batch) for batch in found]
    assert all(size == batch_size for size in sizes[:-1])
    assert all(2 <= size <= batch_size + 1 for size in sizes) or num_samples == 1
    again = list(batches(num_samples, batch_size=batch_size, generator=seeded(seed)))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_batches_are_shuffled_anew_with_the_same_generator() -> None:
    generator = seeded()
    first, second = (
        torch.cat(list(batches(50, batch_size=8, generator=generator))) for _ in range(2)
    )
    assert not torch.equal(first, second)
    assert first.tolist() != list(range(50))


@pytest.mark.parametrize(
    ("shape", "pad"), [((120, 3, 32, 32), 4), ((120, 1, 8, 8), 1), ((120, 2, 28, 20), 4)]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augment_equals_a_loop_over_images(
    shape: tuple[int, ...], pad: int, dtype: torch.dtype
) -> None:
    images = torch.randint(1, 256, shape, generator=seeded(1), dtype=torch.uint8).to(dtype)
    result = augment(images, generator=seeded(2))
    assert result.shape == images.shape
    assert result.dtype == dtype
    generator = seeded(2)
    tops, lefts = torch.randint(0, 2 * pad + 1, (2, shape[0]), generator=generator)
    flips = torch.rand(shape[0], generator=generator) < 0.5
    assert set(tops.tolist()) == set(lefts.tolist()) == set(range(2 * pad + 1))
    height, width = shape[2:]
    for image, found, top, left, flip in zip(images, result, tops, lefts, flips, strict=True):
        padded = torch.zeros(shape[1], height + 2 * pad, width + 2 * pad, dtype=dtype)
        padded[:, pad : pad + height, pad : pad + width] = image
        crop = padded[:, top : top + height, left : left + width]
        assert torch.equal(found, crop.flip(2) if flip else crop)
