"""Pictures and folders of parquet files as people have them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prunelab.data.arrays import Array
from prunelab.data.datasets import load_dataset
from prunelab.data.objects import as_samples
from prunelab.data.parquet import read_side, side_files
from prunelab.data.pictures import GROUND, decoded
from prunelab.errors import DataError, DataWarning

ORIENTATION = 0x0112
COLOURS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    load_dataset.cache_clear()
    yield
    load_dataset.cache_clear()


def file_of(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return file_of(Image.fromarray(pixels))


def decode(*files: bytes) -> Array:
    places = ((f"row {row}", data) for row, data in enumerate(files))
    return decoded(places, where="here")


def silently(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


# --- one picture ---------------------------------------------------------------------------------

TURNS: dict[int, Callable[[Array], Array]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_are_upright(orientation: int, kind: str) -> None:
    """As EXIF defines its eight orientations: rows and columns turned or mirrored."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture = Image.fromarray(COLOURS)
    lying = decode(file_of(picture, kind))[0].transpose(1, 2, 0)
    data = file_of(picture, kind, exif=exif)
    if orientation == 1 or kind == "TIFF":  # Pillow turns TIFF itself
        found = silently(lambda: decode(data))
    else:
        with pytest.warns(DataWarning, match="here: 1 pictures were turned upright"):
            found = decode(data)
    assert np.array_equal(found[0].transpose(1, 2, 0), TURNS[orientation](lying))


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_is_none_changes_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = file_of(Image.fromarray(COLOURS), exif=exif)
    assert np.array_equal(silently(lambda: decode(data))[0], COLOURS.transpose(2, 0, 1))


@pytest.mark.parametrize("colour", [0, 255])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_a_glyph_on_a_transparent_ground_stays_visible(colour: int, mode: str) -> None:
    """A glyph of one colour, all of whose shape is in its transparency, on gray 128."""
    alpha = np.zeros((6, 5), np.uint8)
    alpha[2:4, 1:3], alpha[0, 0] = 255, 51
    bands = [Image.fromarray(np.full((6, 5), colour, np.uint8))] * (len(mode) - 1)
    picture = Image.merge(mode, [*bands, Image.fromarray(alpha)])
    with pytest.warns(
        DataWarning, match=r"1 pictures have transparent parts, which were laid on g"
    ):
        found = decode(file_of(picture))
    expected = np.full((6, 5), GROUND)
    expected[2:4, 1:3] = colour
    expected[0, 0] = round(0.2 * colour + 0.8 * GROUND)
    assert found.shape == (1, len(mode) - 1, 6, 5)
    assert (found[0] == expected).all()


def test_an_opaque_alpha_channel_says_nothing() -> None:
    alpha = np.full((6, 5, 1), 255, np.uint8)
    data = file_of(Image.fromarray(np.concatenate([COLOURS, alpha], axis=2)))
    assert np.array_equal(silently(lambda: decode(data))[0], COLOURS.transpose(2, 0, 1))


def test_a_palette_with_a_transparent_colour() -> None:
    picture = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    picture.putpalette([255, 255, 255, 10, 20, 30])
    with pytest.warns(DataWarning, match="transparent parts"):
        found = decode(file_of(picture, transparency=0))
    assert found[0].tolist() == [[[GROUND, v], [v, GROUND]] for v in (10, 20, 30)]


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("1", (1, 1), 1), [255]),
        (Image.new("L", (1, 1), 7), [7]),
        (Image.new("RGB", (1, 1), (7, 8, 9)), [7, 8, 9]),
        (Image.new("CMYK", (1, 1), (0, 0, 0, 0)), [255, 255, 255]),
    ],
)
def test_other_kinds_of_pictures(picture: Image.Image, expected: list[int]) -> None:
    data = file_of(picture, "TIFF")
    assert silently(lambda: decode(data)).ravel().tolist() == expected
    samples = silently(lambda: as_samples([(picture, 0)]))
    assert samples.images.ravel().tolist() == expected


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_more_than_eight_bits_are_refused(mode: str) -> None:
    picture = Image.new(mode, (2, 2))
    with pytest.raises(DataError, match="row 0 has more than 8 bits a channel; scale it"):
        decode(file_of(picture, "TIFF"))
    with pytest.raises(DataError, match="the image of sample 0 has more than 8 bits"):
        as_samples([(picture, 0)])


def test_gray_pictures_among_coloured_ones_become_rgb() -> None:
    gray = file_of(Image.fromarray(COLOURS[..., 0]))
    with pytest.warns(DataWarning, match="here: 2 pictures are gray among coloured ones"):
        found = decode(gray, png(1), gray)
    assert np.array_equal(found[[0, 2]], np.stack([np.stack([COLOURS[..., 0]] * 3)] * 2))
    assert np.array_equal(found[1], decode(png(1))[0])
    assert silently(lambda: decode(gray, gray)).shape == (2, 1, 6, 5)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_read(data: st.DataObject) -> None:
    """Bytes changed, cut out or cut off: a picture, or one clear error."""
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    whole = bytearray(file_of(Image.fromarray(COLOURS), kind, **options))
    for _ in range(data.draw(st.integers(0, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    try:
        found = decode(bytes(whole[:cut] if data.draw(st.booleans()) else whole))
    except DataError as error:
        assert "row 0" in str(error)  # noqa: PT017
        return
    assert found.dtype == np.uint8
    assert found.ndim == 4


# --- which files ---------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def found(folder: Path, *sides: str) -> list[str]:
    paths = side_files(folder, sides or ("train",))
    return [path.relative_to(folder).as_posix() for path in paths]


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet"],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["train-00000-of-00001-0123456789abcdef.parquet"],
        ["train_0.parquet", "train_1.parquet", "train_10.parquet"],
        ["train0.parquet", "train1.parquet"],
        ["train-part-0.parquet", "train-part-1.parquet"],
        ["data/train.parquet"],
        ["default/train/0000.parquet", "default/train/0001.parquet"],
        ["train/part-0.parquet", "train/part-1.parquet"],
        ["train/train.parquet"],
        ["training.parquet"],
    ],
)
def test_files_of_a_side(tmp_path: Path, names: list[str]) -> None:
    folder = touch(tmp_path / "train", *names, "test.parquet", "README.md", "train.csv")
    assert silently(lambda: found(folder)) == names


@pytest.mark.parametrize(
    "odd",
    [
        ".ipynb_checkpoints/train-checkpoint.parquet",
        ".cache/train.parquet",
        "_old/train.parquet",
        "backup/train.parquet",
        "train_predictions.parquet",
        "train_backup.parquet",
        "train copy.parquet",
        "train (1).parquet",
    ],
)
def test_copies_and_by_products_are_not_read(tmp_path: Path, odd: str) -> None:
    touch(tmp_path, "train.parquet", odd)
    with pytest.warns(DataWarning, match=r"the train side is train\.parquet; not read: ") as seen:
        assert found(tmp_path) == ["train.parquet"]
    assert odd in str(seen[0].message)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train_a.parquet", "train_b.parquet"], r"train_a\.parquet, train_b\.parquet could each"),
        (["a/train.parquet", "b/train.parquet"], "train files lie in .*a and in .*b; name one"),
        (["train.parquet", "train-00000-of-00001.parquet"], "numbered in different ways"),
        (["train-0-of-2.parquet", "train-0-of-3.parquet"], "numbered in different ways"),
        (["train-0-of-3.parquet", "train-2-of-3.parquet"], "2 of the 3 train files are there"),
        ([".hidden/train.parquet"], r"no train\*\.parquet in"),
        (["test.parquet"], r"no train\*\.parquet in"),
    ],
)
def test_folders_that_leave_it_open(tmp_path: Path, names: list[str], words: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=words):
        found(tmp_path)


def test_validation_is_the_test_side_where_there_is_no_other(tmp_path: Path) -> None:
    touch(tmp_path, "validation.parquet", ".old/test.parquet")
    assert found(tmp_path, "test", "validation") == ["validation.parquet"]
    touch(tmp_path, "test.parquet")
    with pytest.warns(DataWarning, match=r"the test side is test\.parquet; not read: \.old"):
        assert found(tmp_path, "test", "validation") == ["test.parquet"]


# --- their columns -------------------------------------------------------------------------------


def side(folder: Path, name: str, **columns: Any) -> None:
    pq.write_table(pa.table(columns), folder / name)


def cells(*seeds: int) -> list[dict[str, Any]]:
    return [{"bytes": png(seed), "path": None} for seed in seeds]


def test_columns_are_found_by_name_in_each_file(tmp_path: Path) -> None:
    """Another order, further columns, other integers, another name of the picture's column."""
    side(tmp_path, "train-0-of-3.parquet", img=cells(0, 1), label=pa.array([0, 1], pa.int64()))
    side(
        tmp_path, "train-1-of-3.parquet",
        label=pa.array([2], pa.int32()), note=["x"], img=cells(2), when=pa.array([1], pa.date32()),
    )  # fmt: skip
    side(tmp_path, "train-2-of-3.parquet", image=[png(3)], label=pa.array([1], pa.uint8()))
    side(tmp_path, "test.parquet", img=cells(0), label=[0])
    data = silently(lambda: load_dataset(str(tmp_path)))
    assert data.train_labels.tolist() == [0, 1, 2, 1]
    expected = decode(png(0), png(1), png(2), png(3))
    assert np.array_equal(data.train_images.numpy(), expected)
    part = load_dataset(str(tmp_path), num_train=3, seed=4)
    rows = [
        int((data.train_images == image).flatten(1).all(1).nonzero()) for image in part.train_images
    ]
    assert part.train_labels.tolist() == data.train_labels[rows].tolist()


def test_files_without_rows_are_passed_over(tmp_path: Path) -> None:
    side(tmp_path, "train-0-of-2.parquet", img=cells(), label=pa.array([], pa.int64()))
    side(tmp_path, "train-1-of-2.parquet", img=cells(1), label=[0])
    assert read_side(tmp_path, ("train",)).labels.tolist() == [0]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": [0]}, r"train_1\.parquet: expected columns img \(or image\) and label"),
        (
            {"img": [b""], "label": [2**40]},
            r"train_1\.parquet: sample 0 has the label 1099511627776",
        ),
        (
            {"img": [b""], "label": pa.array([2**63 + 5], pa.uint64())},
            r"train_1\.parquet: sample 0 has the label 9223372036854775813",
        ),
        ({"img": [b""], "label": [1.0]}, r"train_1\.parquet: labels are float64"),
        ({"img": [b""], "label": [None]}, r"train_1\.parquet: column 'label' has 1 empty cells"),
        (
            {"img": [b""], "label": [[1, 1]]},
            r"train_1\.parquet: labels are int64 of shape \[1, 2\]",
        ),
        (
            {"img": ["a.png"], "label": [0]},
            r"train_1\.parquet: row 0 holds a str, expected the bytes",
        ),
        ({"img": [None], "label": [0]}, r"train_1\.parquet: row 0 holds a NoneType"),
        ({"img": [{"path": "a"}], "label": [0]}, r"row 0 holds a NoneType, expected the bytes"),
        ({"img": [b"?"], "label": [0]}, r"train_1\.parquet: row 0 is not a picture of a kind"),
        ({"img": [b""], "label": [0], "client": ["a"]}, r"train_0\.parquet has no column 'client'"),
    ],
)
def test_the_file_at_fault_is_named(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    side(tmp_path, "train_0.parquet", img=cells(0), label=[0])
    side(tmp_path, "train_1.parquet", **columns)
    side(tmp_path, "test.parquet", img=cells(0), label=[0])
    with pytest.raises(DataError, match=words):
        load_dataset(str(tmp_path))


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays(
        [pa.array([b""]), pa.array([0]), pa.array([1])], ["img", "label", "label"]
    )
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet has two columns 'label'; rename one"):
        read_side(tmp_path, ("train",))


@pytest.mark.parametrize(
    ("clients", "words"),
    [
        (["a", 1], "column 'client' holds int and text"),
        ([[1], [2]], "column 'client' holds list"),
        ([float("nan"), 1.0], "column 'client': row 0 has no value"),
        (["a", None], "column 'client' has 1 empty cells"),
    ],
)
def test_clients_that_are_no_names(tmp_path: Path, clients: list[Any], words: str) -> None:
    for row, client in enumerate(clients):
        side(tmp_path, f"train_{row}.parquet", img=cells(0), label=[0], client=[client])
    with pytest.raises(DataError, match=words):
        read_side(tmp_path, ("train",))


def test_gaps_are_said_and_kept(tmp_path: Path) -> None:
    side(tmp_path, "train.parquet", img=cells(*range(24)), label=[0, 10, 20] * 8)
    side(tmp_path, "test.parquet", img=cells(0), label=[20])
    with pytest.warns(
        DataWarning, match=r"the network gets 21 outputs, but no sample has the class 1"
    ):
        assert load_dataset(str(tmp_path)).num_classes == 21
