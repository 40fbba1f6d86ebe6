"""Streamed samples against the same images in memory, in every order; files that are no such."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sharded import (
    cells_of,
    images,
    members_of,
    png,
    write_parquet,
    write_shards,
    write_tar,
)

from prunelab.data import parquet_shards, shards, streamed
from prunelab.data.parquet_shards import ParquetShards
from prunelab.data.pictures import decoded
from prunelab.data.samples import ImageSamples
from prunelab.data.shards import Layout, ShardFile, blocks_of
from prunelab.data.sides import SampleSet
from prunelab.data.streamed import StreamedImages, stream
from prunelab.data.tar_shards import TarShards
from prunelab.errors import DataError, DataWarning

KINDS = ("parquet", "tar")
COUNT, ENDS = 50, (17, 18, 18, 50)  # odd sizes, one without a sample
IMAGES = images(COUNT)
LABELS = [number % 7 for number in range(COUNT)]


@pytest.fixture(params=["parquet", "nested", "tar"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind = "tar" if request.param == "tar" else "parquet"
    return write_shards(
        tmp_path / "s", kind, IMAGES, LABELS, ENDS, group=5, nested=request.param == "nested"
    )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in a row group."""
    monkeypatch.setattr(parquet_shards, "MOST_ROWS", 2)


def in_memory() -> ImageSamples:
    return ImageSamples(IMAGES, LABELS)


# --- equal to memory -----------------------------------------------------------------------------


def test_batches_are_those_of_memory(folder: Path, small_blocks: None) -> None:
    samples, expected = stream(folder), in_memory()
    assert len(samples) == COUNT
    assert samples.input_shape == (3, 6, 5)
    assert torch.equal(samples.labels, expected.labels)
    assert torch.equal(samples.ids, expected.ids)
    random = np.random.default_rng(0)
    for rows in (np.arange(COUNT), random.permutation(COUNT), np.array([49, 0, 0, 17, 18])):
        for part in torch.from_numpy(rows).split(7):
            for ours, theirs in zip(samples.batch(part), expected.batch(part), strict=True):
                assert torch.equal(ours, theirs)
            augmented = (
                of.augmented_batch(part, rng=np.random.default_rng(1))[0]
                for of in (samples, expected)
            )
            assert torch.equal(*augmented)


def test_rows_that_are_not_there_are_refused(folder: Path) -> None:
    with pytest.raises(IndexError):
        stream(folder).batch(torch.tensor([COUNT]))


def test_workers_decode_the_same_and_name_what_is_damaged(folder: Path, tmp_path: Path) -> None:
    samples = stream(folder, num_workers=3)
    rows = torch.randperm(COUNT)
    assert torch.equal(samples.pixels(rows), torch.from_numpy(IMAGES)[rows])
    assert samples.opened_with == stream(folder).opened_with
    damaged = write_parquet(tmp_path / "d.parquet", [*cells_of(IMAGES[:3]), b"no"], [0] * 4)
    with pytest.raises(DataError, match=r"d\.parquet: row 3 is not a picture"):
        stream(damaged, num_workers=2).pixels(torch.arange(4))


def test_a_copy_in_another_process_reads_the_same(folder: Path) -> None:
    samples = stream(folder)
    first = samples.pixels(torch.arange(9))
    copied = pickle.loads(pickle.dumps(samples))
    assert torch.equal(copied.pixels(torch.arange(9)), first)
    assert copied.fingerprint == samples.fingerprint


def test_workers_of_a_loader_read_the_same(folder: Path) -> None:
    """Forked when a file is open already."""
    samples = stream(folder)
    samples.pixels(torch.arange(3))

    class Items(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(samples)

        def __getitem__(self, row: int) -> Any:
            return samples.pixels(torch.tensor([row]))[0]

    loader = torch.utils.data.DataLoader(Items(), batch_size=10, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), torch.from_numpy(IMAGES))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_order_of_reading_gives_each_row_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cells of any size in files, groups and blocks of any size; little is kept between reads."""
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=30))
    ends = sorted(data.draw(st.lists(st.integers(0, len(sizes)), max_size=3)))
    cells = [bytes([number]) * size for number, size in enumerate(sizes)]
    folder, start, files = tmp_path_factory.mktemp("any"), 0, []
    kind = data.draw(st.sampled_from(KINDS))
    for number, end in enumerate([*ends, len(sizes)]):
        path, own = folder / f"{number}.{kind}", cells[start:end]
        if kind == "tar":
            files.append(write_tar(path, members_of(own, [1] * len(own))))
        else:
            column = pa.array(own, pa.binary())
            group = data.draw(st.integers(1, 31))
            files.append(write_parquet(path, column, pa.array([1] * len(own)), group=group))
        start = end
    opened = [ShardFile.at(path) for path in files]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_shards, "BLOCK_BYTES", data.draw(st.integers(1, 2000)))
        kept = data.draw(st.integers(0, 200))
        source = TarShards(opened) if kind == "tar" else ParquetShards(opened, kept=kept)
        rows = st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=40)
        for wanted in data.draw(st.lists(rows, max_size=8)):
            asked = np.sort(np.array(wanted))
            assert [cell for _, cell in source.cells(asked)] == [cells[row] for row in asked]
    assert source.layout.starts[-1] == len(source.labels) == len(sizes)


def test_reading_in_order_keeps_nothing_and_opens_each_group_once(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    open_file = parquet_shards._opened
    monkeypatch.setattr(
        parquet_shards, "_opened", lambda file: (opened.append(file.path), open_file(file))[1]
    )
    samples = stream(write_shards(tmp_path, "parquet", IMAGES, LABELS, ENDS, group=5))
    opened.clear()
    for part in torch.arange(COUNT).split(7):
        samples.batch(part)
    source: Any = samples._shards
    assert len(opened) <= len(source._groups)
    assert not source._blocks


# --- the order of training -----------------------------------------------------------------------


def test_order_of_what_fits_is_that_of_memory(folder: Path) -> None:
    rows = torch.arange(COUNT)[::2]
    order = stream(folder).training_order(rows, rng=np.random.default_rng(3))
    assert np.array_equal(order, np.random.default_rng(3).permutation(len(rows)))


def test_order_by_hand() -> None:
    """Runs of two blocks; a window takes four rows, so that a run is a window."""
    layout = blocks_of([2, 2, 2, 2], [10, 10, 10, 10], [0, 0, 1, 1])
    order = layout.order(np.arange(8), window=20, rng=np.random.default_rng(0))
    halves = {frozenset(half.tolist()) for half in (order[:4], order[4:])}
    assert halves == {frozenset(range(4)), frozenset(range(4, 8))}


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 30)), min_size=1, max_size=12),
    cuts=st.sets(st.integers(1, 12)),
    window=st.integers(1, 120),
    seed=st.integers(0, 9),
    share=st.floats(0.2, 1),
)
def test_orders_visit_all_and_use_few_blocks_at_a_time(
    blocks: list[tuple[int, int]], cuts: set[int], window: int, seed: int, share: float
) -> None:
    counts, sizes = zip(*blocks, strict=True)
    runs = np.cumsum([number in cuts for number in range(len(blocks))])
    layout: Layout = blocks_of(counts, sizes, runs)
    random = np.random.default_rng(seed)
    rows = random.permutation(sum(counts))[: max(1, int(share * sum(counts)))]
    order = layout.order(rows, window=window, rng=random)
    assert sorted(order.tolist()) == list(range(len(rows)))
    used = layout.block_of(rows[order])
    first = {block: int(np.flatnonzero(used == block)[0]) for block in set(used.tolist())}
    last = {block: int(np.flatnonzero(used == block)[-1]) for block in first}
    for place in range(len(used)):
        open_now = [block for block in first if first[block] <= place <= last[block]]
        assert sum(sizes[block] for block in open_now) <= window + max(sizes)


def test_an_epoch_in_that_order_reads_each_block_about_once(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 600
    pictures = images(count, (1, 4, 4))
    write_shards(tmp_path, "parquet", pictures, [0, 1] * (count // 2), [200, 400, count], group=20)
    samples = stream(tmp_path)
    source: Any = samples._shards
    window = int(source.layout.sizes.sum()) // 6
    monkeypatch.setattr(streamed, "WINDOW", window)
    source._kept = window + 2 * int(source.layout.sizes.max())
    read: list[int] = []
    keep = ParquetShards._keep
    monkeypatch.setattr(
        ParquetShards, "_keep", lambda self, block, v: (read.append(block), keep(self, block, v))[1]
    )
    rows = torch.arange(count)
    order = samples.training_order(rows, rng=np.random.default_rng(0))
    assert not np.array_equal(order, np.random.default_rng(0).permutation(count))
    for part in rows[torch.from_numpy(order)].split(16):
        assert torch.equal(samples.pixels(part), torch.from_numpy(pictures)[part])
    num_blocks = len(source.layout.sizes)
    assert {0, *read} == set(range(num_blocks))  # the first was read when it was opened
    assert len(read) <= 1.3 * num_blocks


# --- labels, names, files ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_numbered_in_sorted_order_over_all_files(kind: str, tmp_path: Path) -> None:
    names = ["cow", "bee", "ant", "cow", "ant"]
    samples = stream(write_shards(tmp_path, kind, IMAGES[:5], names, [2, 5]))
    assert samples.class_names == ("ant", "bee", "cow")
    assert samples.labels.tolist() == [2, 1, 0, 2, 0]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, 0, 2], pa.uint8()), [1, 0, 2]),
        (pa.array([True, False, True]), [1, 0, 1]),
        (pa.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]]), [1, 0, 2]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1]),
    ],
)
def test_labels_of_any_type_of_column(column: Any, expected: list[int], tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", cells_of(IMAGES[:3]), column)
    assert stream(tmp_path).labels.tolist() == expected


def test_names_that_files_give_to_numbers(tmp_path: Path) -> None:
    features = {"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}}
    table = pa.table({"img": cells_of(IMAGES[:2]), "label": [1, 0]})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "a.parquet"
    )
    assert stream(tmp_path).class_names == ("x", "y")


def test_columns_of_other_names(tmp_path: Path) -> None:
    table = pa.table({"picture": cells_of(IMAGES[:2]), "kind": ["b", "a"], "label": [5, 5]})
    pq.write_table(table, tmp_path / "a.parquet")
    samples = stream(tmp_path, columns="image=picture,label=kind")
    assert samples.labels.tolist() == [1, 0]
    assert stream(**samples.opened_with).class_names == ("a", "b")
    members = [("1.png", cells_of(IMAGES)[0]), ("1.json", b'{"kind": 3, "label": 5}')]
    tar = write_tar(tmp_path / "a.tar", members)
    assert stream(tar, columns={"label": "kind"}).labels.tolist() == [3]


def test_members_of_webdataset(tmp_path: Path) -> None:
    """JSON beside or instead of a class, folders, hidden and other members, capitals."""
    cell = png(np.zeros((3, 3), np.uint8))
    members = [
        ("__meta__.json", b"{}"),
        ("a/001.JPG", cell), ("a/001.json", b'{"label": 2, "more": 1}'), ("a/001.txt", b"caption"),
        ("a/._002.jpg", b"resource fork"),
        ("a/002.json", b'{"other": 0}'), ("a/002.image.png", cell), ("a/002.cls", b" 1\n"),
        ("b/001.png", cell), ("b/001.cls", b"0"), ("b/001.json", b'{"label": 2}'),
    ]  # fmt: skip
    samples = stream(write_tar(tmp_path / "x.tar", members))
    assert samples.labels.tolist() == [2, 1, 0]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_each_format(form: int, tmp_path: Path) -> None:
    folder = "/".join(["deep" * 5] * 7)
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as archive:
        for name, content in members_of(cells_of(IMAGES[:4]), [0, 1, 0, 1]):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert torch.equal(stream(tmp_path).pixels(torch.arange(4)), torch.from_numpy(IMAGES[:4]))


def test_which_files_are_taken(tmp_path: Path) -> None:
    """A folder, a file, a pattern and a list; sides by name, hidden files passed over."""
    for name, start in (("train-0", 0), ("train-1", 5), ("test-0", 10), (".old", 0)):
        write_parquet(tmp_path / f"{name}.parquet", cells_of(IMAGES[start:][:5]), [0] * 5)
    both = torch.from_numpy(IMAGES[:10])
    paths: list[Any] = [
        tmp_path, str(tmp_path), f"{tmp_path}/train-*.parquet",
        [tmp_path / "train-0.parquet", str(tmp_path / "train-1.parquet")],
    ]  # fmt: skip
    for path in paths:
        samples = stream(path)
        assert torch.equal(samples.pixels(torch.arange(10)), both)
        again = stream(**samples.opened_with)
        assert again.fingerprint == samples.fingerprint
    test = stream(tmp_path / "test-0.parquet")
    assert torch.equal(test.pixels(torch.arange(5)), torch.from_numpy(IMAGES[10:15]))
    assert SampleSet("x", stream(tmp_path), test).num_classes == 1
    assert SampleSet("x", ImageSamples(IMAGES, [0] * COUNT), test).num_classes == 1
    other = write_parquet(tmp_path / "more.parquet", cells_of(IMAGES[:5]), [0] * 5)
    assert len(stream(other)) == 5


def test_a_folder_without_sides_is_read_whole(tmp_path: Path) -> None:
    for name in ("b/1.tar", "a/2.tar"):
        (tmp_path / name).parent.mkdir()
        start = 0 if name.startswith("a") else 5
        write_tar(tmp_path / name, members_of(cells_of(IMAGES[start:][:5]), [0] * 5))
    assert torch.equal(
        stream(tmp_path).pixels(torch.arange(10)), torch.from_numpy(IMAGES[:10])
    )  # in the order of their paths


# --- pictures ------------------------------------------------------------------------------------


def turned() -> bytes:
    """A JPEG that says it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.moveaxis(IMAGES[0], 0, -1)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def transparent() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.moveaxis(images(1, (4, 6, 5))[0], 0, -1), "RGBA").save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_are_those_of_folders_in_memory(tmp_path: Path) -> None:
    cells = [cells_of(IMAGES)[0], transparent(), png(images(1, (1, 6, 5))[0, 0])]
    write_parquet(tmp_path / "a.parquet", cells, [0, 1, 0])
    with pytest.warns(DataWarning):
        expected = decoded(((str(k), cell) for k, cell in enumerate(cells)), where="here")
    samples = stream(tmp_path)
    with pytest.warns(DataWarning) as seen:
        found = samples.pixels(torch.arange(3))
    assert torch.equal(found, torch.from_numpy(expected))
    said = sorted(str(warning.message).partition("some ")[2] for warning in seen)
    assert [line[:20] for line in said] == ["pictures are gray am", "pictures have transp"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each is said once
        samples.pixels(torch.arange(3))


def test_turned_pictures_are_upright(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [turned()], [0])
    with pytest.warns(DataWarning, match=r"some pictures were turned upright"):
        assert stream(tmp_path).input_shape == (3, 5, 6)


def test_resize_brings_to_one_size(tmp_path: Path) -> None:
    cells = [png(image) for size in (4, 9) for image in images(2, (size, size))]
    write_tar(tmp_path / "a.tar", members_of(cells, [0, 1, 0, 1]))
    with pytest.raises(DataError, match=r"sample 2 has shape \(1, 9, 9\), the first .*resize=\(4"):
        stream(tmp_path).pixels(torch.arange(4))
    samples = stream(tmp_path, resize=(3, 5))
    for row, image in enumerate([*images(2, (4, 4)), *images(2, (9, 9))]):
        expected = decoded([("here", png(image))], where="here", resize=(3, 5))
        assert np.array_equal(samples.pixels(torch.tensor([row])).numpy(), expected)
    assert stream(tmp_path, resize=9).input_shape == (1, 9, 9)
    assert torch.equal(
        stream(tmp_path, resize=9).pixels(torch.tensor([2]))[0, 0],
        torch.from_numpy(images(2, (9, 9))[0]),
    )
    assert stream(tmp_path, resize=9).fingerprint != stream(tmp_path, resize=8).fingerprint


def test_gray_first(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [png(IMAGES[0, 0]), *cells_of(IMAGES[:1])], [0, 1])
    with pytest.raises(DataError, match="row 1 has 3 channels, the first has 1; with channels=3"):
        stream(tmp_path).pixels(torch.arange(2))
    with pytest.warns(DataWarning, match="gray among coloured"):
        found = stream(tmp_path, channels=3).pixels(torch.arange(2))
    assert torch.equal(found[0], torch.from_numpy(IMAGES[0, :1]).expand(3, -1, -1))
    (tmp_path / "a.parquet").unlink()
    write_parquet(tmp_path / "b.parquet", cells_of(IMAGES[:1]), [0])
    with pytest.raises(DataError, match="3 channels, more than channels=1"):
        stream(tmp_path, channels=1)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changes_is_noticed(kind: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, kind, IMAGES, LABELS, [20, COUNT])
    samples = stream(folder)
    before = samples.fingerprint
    changed = folder / f"train-000001.{kind}"
    stamp = changed.stat().st_mtime_ns
    data = bytearray(changed.read_bytes())
    data[700] ^= 1
    changed.write_bytes(bytes(data))
    os.utime(changed, ns=(stamp + 1, stamp + 1))
    assert torch.equal(samples.pixels(torch.arange(20)), torch.from_numpy(IMAGES[:20]))
    with pytest.raises(DataError, match=f"train-000001.{kind} has changed since it was opened"):
        samples.pixels(torch.arange(COUNT))
    assert samples.fingerprint == before
    with pytest.raises(DataError, match="has changed"):
        shards.fingerprint_of(samples._shards.files)
    changed.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        samples.pixels(torch.arange(COUNT))


def test_content_alone_decides_the_fingerprint(tmp_path: Path) -> None:
    prints = {}
    for name, pictures in (("a", IMAGES), ("b", IMAGES), ("c", images(COUNT, seed=1))):
        folder = write_shards(tmp_path / name, "tar", pictures, LABELS, [20, COUNT])
        prints[name] = stream(folder).fingerprint
    assert prints["a"] == prints["b"] != prints["c"]


Write = Callable[[Path], object]


def write_bytes(data: bytes, *names: str) -> Write:
    return lambda folder: [(folder / name).write_bytes(data) for name in names]


def rows_of(cells: Sequence[Any], labels: Any) -> Write:
    return lambda folder: write_parquet(folder / "a.parquet", cells, labels)


def tar_of(*members: tuple[str, bytes], mode: str = "w") -> Write:
    return lambda folder: write_tar(folder / "a.tar", members, mode=mode)


def cut(at: int) -> Write:
    def write(folder: Path) -> None:
        path = write_tar(folder / "a.tar", members_of(CELLS, [0, 1]))
        path.write_bytes(path.read_bytes()[:at])

    return write


def table_of(**columns: Any) -> Write:
    return lambda folder: pq.write_table(pa.table(columns), folder / "a.parquet")


CELLS = cells_of(IMAGES[:2])
CELL = CELLS[0]
REFUSED: dict[str, tuple[Write, str]] = {
    "empty folder": (lambda folder: None, r"holds no \.parquet and no \.tar"),
    "compressed": (write_bytes(b"", "a.tar.gz"), r"a\.tar\.gz is compressed: decompress"),
    "both kinds": (
        write_bytes(b"", "a.parquet", "a.tar"),
        r"holds \.parquet and \.tar files; give a pattern",
    ),
    "other side": (write_bytes(b"", "test-0.parquet"), r"no train\*\.parquet in"),
    "missing shard": (
        write_bytes(b"", "train-00000-of-00002.parquet"), r"1 of the 2 train files are there",
    ),
    "no parquet": (write_bytes(b"PAR1 no", "a.parquet"), r"cannot read .*a\.parquet"),
    "no rows": (rows_of([], pa.array([], pa.int64())), "no samples in 1 files"),
    "no image column": (table_of(pixels=CELLS, label=[0, 1]), r"expected columns img"),
    "no label column": (table_of(img=CELLS), r"expected columns img .* and label, got"),
    "empty label": (rows_of(CELLS, [1, None]), r"a\.parquet: row 1 has no label"),
    "float label": (rows_of(CELLS, [0.0, 1.5]), r"row 0 has the label 0\.0; expected a whole"),
    "nan": (rows_of(CELLS, [float("nan"), 1.0]), "row 0 has the label nan"),
    "negative label": (rows_of(CELLS, [0, -1]), r"sample 1 has the label -1"),
    "huge label": (rows_of(CELLS, pa.array([0, 2**63], pa.uint64())), r"label"),
    "texts and numbers": (
        tar_of(*members_of(CELLS, [0, "cat"])), r"some labels are texts \('cat'\), others numbers",
    ),
    "no picture": (rows_of([b"no", CELL], [0, 1]), r"row 0 is not a picture"),
    "no bytes": (rows_of([[1, 2], [3]], [0, 1]), r"row 0 holds a list, expected the bytes"),
    "null picture": (rows_of([None, CELL], [0, 1]), r"row 0 holds a NoneType"),
    "path alone": (
        table_of(img=[{"bytes": None, "path": "x.png"}] * 2, label=[0, 1]),
        "row 0 holds a NoneType",
    ),
    "no tar": (write_bytes(b"x" * 2000, "a.tar"), r"not a readable, uncompressed tar"),
    "empty tar file": (write_bytes(b"", "a.tar"), r"not a readable, uncompressed tar"),
    "tar of nothing": (tar_of(), "no samples in 1 files"),
    "gzip in disguise": (
        tar_of(("1.png", CELL), ("1.cls", b"0"), mode="w:gz"), "uncompressed tar",
    ),
    "cut in a member": (cut(700), "not a readable, uncompressed tar"),
    "cut in a header": (cut(1024 + 700 - 200), "cut off|uncompressed"),
    "cut between members": (cut(2048), r"damaged or cut off: from byte 2048"),
    "member without label": (
        tar_of(("1.png", CELL), ("2.png", CELL), ("2.cls", b"0")), r"1 has no label \(1\.cls",
    ),
    "member without picture": (
        tar_of(("1.png", CELL), ("1.cls", b"0"), ("2.cls", b"0")), r"2 has no picture",
    ),
    "members apart": (
        tar_of(("1.png", CELL), ("2.png", CELL), ("1.cls", b"0"), ("2.cls", b"0")),
        "follow each other",
    ),
    "two pictures": (tar_of(("1.png", CELL), ("1.jpg", CELL)), "1 has two pictures"),
    "empty class": (tar_of(("1.png", CELL), ("1.cls", b" \n")), "1 has no label"),
    "binary class": (tar_of(("1.png", CELL), ("1.cls", b"\xff\xfe")), r"1\.cls is not text"),
    "bad JSON": (tar_of(("1.png", CELL), ("1.json", b"{")), r"1\.json is not JSON"),
    "JSON list": (tar_of(("1.png", CELL), ("1.json", b"[1]")), "1 has no label"),
    "JSON label": (tar_of(("1.png", CELL), ("1.json", b'{"label": {}}')), r"1 has the label \{\}"),
    "large class": (
        tar_of(("1.png", CELL), ("1.cls", b"0" * (2 << 20))), "too many for a label",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    write, message = REFUSED[case]
    write(tmp_path)
    with pytest.raises(DataError, match=message):
        stream(tmp_path)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("nowhere", {}, "no such folder, file or pattern"),
        ([], {}, "the list of files is empty"),
        (["a.parquet", "a.tar"], {}, r"all \.parquet or all \.tar"),
        ("a.zip", {}, r"got \.zip"),
        (["gone.tar"], {}, "cannot be read"),
        ("a.parquet", {"resize": (0, 3)}, "expected N or HxW"),
        ("a.parquet", {"channels": 2}, "channels must be 1 or 3"),
        ("a.parquet", {"columns": "label=kind"}, "columns img .* and kind, got"),
        ("a.parquet", {"columns": "client=x"}, "parquet shards have no column for 'client'"),
        ("a.parquet", {"num_workers": -1}, "num_workers must be"),
    ],
)
def test_refused_arguments(
    path: Any,
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "a.parquet", CELLS, [0, 1])
    (tmp_path / "a.zip").touch()
    with pytest.raises(DataError, match=message):
        stream(path, **options)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_damage_is_one_clear_error_or_a_picture(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    """Bytes changed or cut off anywhere: nothing but a DataError, and no sample is lost."""
    folder = tmp_path_factory.mktemp("damaged")
    path = next(write_shards(folder, kind, IMAGES[:6], LABELS[:6], [6], group=3).iterdir())
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        try:
            samples: StreamedImages = stream(path)
            assert len(samples.pixels(torch.arange(len(samples)))) == len(samples)
        except DataError:
            return
    assert len(samples) == 6


def test_no_changed_bit_loses_samples(tmp_path: Path) -> None:
    """The second bit of each byte up to the end of the first row group, changed in turn."""
    path = next(write_shards(tmp_path, "parquet", IMAGES[:6], LABELS[:6], [6], group=3).iterdir())
    content = path.read_bytes()
    first = pq.ParquetFile(path).metadata.row_group(0)
    for place in range(4, 4 + first.column(0).total_compressed_size):
        damaged = bytearray(content)
        damaged[place] ^= 2
        path.write_bytes(bytes(damaged))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            try:
                assert len(stream(path)) == 6
            except DataError:
                continue
