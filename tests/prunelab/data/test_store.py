"""Image stores: what was written is read, by several processes at once, or refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunelab.data import store as stores
from prunelab.data.batches import Images, Integers, Preprocessing
from prunelab.data.store import SampleStore, open_store, write_store
from prunelab.errors import DataError
from prunelab.runs.seeds import rng
from sparsemodel.storage.sealed import BLANK, CHECKSUM, seal


def pictures(count: int = 12, *, seed: int = 0) -> tuple[Images, Integers]:
    """uint8 [count, 3, 5, 4] and targets 0 ... 2."""
    random = rng(seed)
    return random.integers(0, 256, (count, 3, 5, 4), np.uint8), random.integers(0, 3, count)


def written(folder: Path, *, seed: int = 0, **options: Any) -> SampleStore:
    return write_store(folder, *pictures(seed=seed), num_classes=3, name="pictures", **options)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "pictures"
    written(folder, arrays={"owner": np.arange(12) % 4, "none": np.empty(0, np.int64)})
    return folder


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_what_was_written_is_read(tmp_path: Path, dtype: type[np.uint8] | type[np.float32]) -> None:
    inputs, targets = pictures()
    inputs = inputs.astype(dtype)
    preprocessing = Preprocessing((0.1, 0.2, 0.3), (0.5, 0.5, 1.0))
    write_store(
        tmp_path / "deep" / "store", inputs, targets, num_classes=4, name="mine",
        preprocessing=preprocessing, arrays={"owner": targets + 7},
    )  # fmt: skip
    for verify in (False, True):
        store = open_store(tmp_path / "deep" / "store", verify=verify)
        assert store.inputs.dtype == dtype
        assert np.array_equal(store.inputs, inputs)
        assert np.array_equal(store.targets, targets)
        assert np.array_equal(store.arrays["owner"], targets + 7)
        assert (len(store), store.num_classes, store.name) == (12, 4, "mine")
        assert store.input_shape == (3, 5, 4)
        assert store.preprocessing == preprocessing
        assert isinstance(store.inputs, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            store.inputs[0] = 0
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["store"]


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        (np.arange(8, dtype=np.float32).reshape(4, 2), np.arange(4, dtype=np.float32)),
        (np.zeros((4, 1, 2, 2), np.uint8), np.eye(4, 3, dtype=np.float32)),
        (np.array([[1, 2, -1]] * 4), np.array([[1, -100, -100]] * 4)),
    ],
)
def test_samples_without_classes(tmp_path: Path, inputs: Any, targets: Any) -> None:
    write_store(
        tmp_path / "store", inputs, targets, num_classes=None, name="x", task="regression",
        class_names=("a", "b"),
    )  # fmt: skip
    store = open_store(tmp_path / "store", verify=True)
    assert (store.num_classes, store.task, store.class_names) == (None, "regression", ("a", "b"))
    taken = store.take(np.array([3, 1]))
    for found, expected in zip(taken, (inputs, targets), strict=True):
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected[[3, 1]])


def test_arrays_of_another_memory_layout_are_the_same_store(tmp_path: Path) -> None:
    inputs, targets = pictures()
    store = write_store(
        tmp_path / "a", np.asfortranarray(inputs), targets[::1], num_classes=3, name="pictures"
    )
    assert store.digest == written(tmp_path / "b").digest
    assert np.array_equal(store.inputs, inputs)


@given(rows=st.lists(st.integers(0, 11), max_size=30))
def test_taking_rows_is_indexing(intact: Path, rows: list[int]) -> None:
    store, index = open_store(intact), np.array(rows, np.int64)
    inputs, targets = store.take(index)
    expected, expected_targets = pictures()
    assert np.array_equal(inputs, expected[index])
    assert np.array_equal(targets, expected_targets[index])
    assert inputs.flags.writeable
    assert targets.flags.writeable
    assert type(inputs) is type(targets) is np.ndarray


def test_rows_that_are_not_there_are_refused(intact: Path) -> None:
    for rows in ([0, 12], [-1, 3]):
        with pytest.raises(DataError, match=r"has samples 0 to 11; asked for"):
            open_store(intact).take(np.array(rows))


def test_the_digest_names_the_content(tmp_path: Path) -> None:
    inputs, targets = pictures()
    owner = np.arange(12)

    def digest(name: str, *parts: Any, num_classes: int = 3, **options: Any) -> str:
        store = write_store(tmp_path / name, *parts, num_classes=num_classes, name="x", **options)
        assert open_store(tmp_path / name).digest == store.digest
        return store.digest

    found = {
        digest("a", inputs, targets),
        digest("b", inputs, (targets + 1) % 3),
        digest("c", inputs[:, :, ::-1], targets),
        digest("d", inputs, targets, num_classes=4),
        digest("e", inputs, targets, preprocessing=Preprocessing((0.0,), (1.0,))),
        digest("f", inputs, targets, arrays={"owner": owner}),
        digest("g", inputs, targets, arrays={"owner": owner[::-1]}),
    }
    assert len(found) == 7
    assert digest("h", inputs, targets) in found


# --- writing -------------------------------------------------------------------------------------


def test_the_same_store_is_left_as_it_is_and_another_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    written(folder)
    inode = (folder / "inputs.npy").stat().st_ino
    assert np.array_equal(written(folder).inputs, pictures()[0])
    assert (folder / "inputs.npy").stat().st_ino == inode
    with pytest.raises(DataError, match=r"holds another data set \('pictures', 12 samples\)"):
        written(folder, seed=1)
    assert np.array_equal(open_store(folder, verify=True).inputs, pictures()[0])
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match=r"is no sample store: it has no store\.json"):
        written(folder)
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]
    (folder / "letter.txt").unlink()
    assert len(written(folder)) == 12  # an empty folder is as good as none


def test_several_processes_may_write_at_once(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from prunelab.data.store import write_store

inputs, targets = np.load(sys.argv[1]), np.load(sys.argv[2])
for turn in range(20):
    folder = Path(sys.argv[3], f"store{turn}")
    store = write_store(folder, inputs, targets, num_classes=3, name="pictures")
    assert np.array_equal(store.inputs, inputs)
"""
    inputs, targets = pictures()
    np.save(tmp_path / "inputs.npy", inputs)
    np.save(tmp_path / "targets.npy", targets)
    files = [str(tmp_path / name) for name in ("inputs.npy", "targets.npy", "stores")]
    writers = [subprocess.Popen([sys.executable, "-c", code, *files]) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    found = sorted(path.name for path in (tmp_path / "stores").iterdir())
    assert found == sorted(f"store{turn}" for turn in range(20))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores, "_flush", full)
    with pytest.raises(DataError, match=r"store cannot be written \(No space left"):
        written(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": np.zeros(12, np.uint8)}, r"inputs are uint8 \[12\], expected"),
        ({"inputs": np.zeros((12, 3, 5, 4))}, "inputs are float64"),
        ({"inputs": np.zeros((0, 3, 5, 4), np.uint8)}, r"inputs are uint8 \[0, 3, 5, 4\]"),
        ({"inputs": np.full((12, 3, 5, 4), np.nan, np.float32)}, "not finite"),
        ({"targets": np.zeros(11, np.int64)}, r"targets are \[11\] for 12 inputs"),
        ({"targets": np.zeros(12, np.int32)}, "targets are int32, expected int64"),
        ({"targets": np.zeros(12, np.float32)}, "targets are float32, expected int64"),
        ({"targets": np.zeros((12, 2), np.int64)}, r"targets are \[12, 2\] for 12 inputs"),
        ({"targets": np.full(12, np.inf, np.float32), "num_classes": None}, "target is not finite"),
        ({"targets": np.full(12, 3)}, r"label 3 of row 0 lies outside 0 \.\.\. 2"),
        ({"targets": np.full(12, -1)}, "label -1 of row 0"),
        ({"num_classes": 0}, "0 classes, expected at least 1"),
        ({"arrays": {"inputs": np.zeros(1, np.int64)}}, "cannot be called inputs, targets or rows"),
        ({"arrays": {"../x": np.zeros(1, np.int64)}}, r"'\.\./x' is no name for an array"),
        ({"arrays": {"owner": np.zeros(1)}}, r"'owner' is float64 \[1\], expected int64"),
        ({"preprocessing": Preprocessing((0.0, 0.0), (1.0, 1.0))}, "for 2 channels, the images"),
    ],
)
def test_what_is_no_store_is_not_written(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    inputs, targets = pictures()
    arguments = {"inputs": inputs, "targets": targets, "num_classes": 3, "name": "x", **change}
    with pytest.raises(DataError, match=words):
        write_store(tmp_path / "store", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_lists_are_arrays(tmp_path: Path) -> None:
    inputs, targets = pictures()
    plain = write_store(tmp_path / "plain", inputs, targets, num_classes=3, name="x")
    lists: Any = (list(inputs), targets.tolist())
    assert write_store(tmp_path / "lists", *lists, num_classes=3, name="x").digest == plain.digest


# --- damage --------------------------------------------------------------------------------------


def changed_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        header = json.loads((folder / "store.json").read_text())
        change(header)
        text = json.dumps({**header, CHECKSUM: BLANK})
        (folder / "store.json").write_bytes(seal(text.encode(), "json"))

    return apply


def cut(name: str, size: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:size])

    return apply


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, r"is no sample store: it has no store\.json"),
    "no header": (lambda f: (f / "store.json").unlink(), "is no sample store"),
    "no json": (lambda f: (f / "store.json").write_text("{"), "its checksum does not fit"),
    "a list": (lambda f: (f / "store.json").write_text("[]"), "its checksum does not fit"),
    "no bytes": (lambda f: (f / "store.json").write_bytes(b"\xff\xfe\0"), "damaged"),
    "other kind": (changed_header(lambda h: h.update(of="alpha")), "expected 'store.json', found"),
    "newer": (changed_header(lambda h: h.update(format=5)), "format 5, this release reads 4"),
    "no arrays": (changed_header(lambda h: h.pop("arrays")), "damaged .KeyError: 'arrays'"),
    "no targets": (changed_header(lambda h: h["arrays"].pop("targets")), "damaged .KeyError"),
    "a path": (
        changed_header(lambda h: h["arrays"].update({"../targets": h["arrays"]["targets"]})),
        "is no name for an array",
    ),
    "other shape": (
        changed_header(lambda h: h["arrays"]["inputs"].update(shape=[12, 3, 4, 5])),
        r"inputs\.npy: holds uint8 \[12, 3, 5, 4\], store\.json says uint8 \[12, 3, 4, 5\]",
    ),
    "pickles": (
        lambda f: np.save(f / "targets.npy", np.array([None] * 12), allow_pickle=True),
        r"targets\.npy: holds object",
    ),
    "fewer classes": (changed_header(lambda h: h.update(num_classes=1)), "lies outside 0 ... 0"),
    "many classes": (changed_header(lambda h: h.update(num_classes=1e999)), "damaged .Overflow"),
    "no preprocessing": (
        changed_header(lambda h: h.update(preprocessing={})),
        "expected lists of numbers",
    ),
    "no inputs": (lambda f: (f / "inputs.npy").unlink(), r"inputs\.npy: cannot be read"),
    "cut inputs": (cut("inputs.npy", -1), r"inputs\.npy: damaged: 719 bytes of data for uint8"),
    "cut targets": (cut("targets.npy", 100), r"targets\.npy: cannot be read or is damaged"),
    "empty targets": (cut("targets.npy", 0), r"targets\.npy: cannot be read or is damaged"),
    "cut owners": (cut("owner.npy", -8), r"owner\.npy: damaged"),
    "fewer rows": (
        changed_header(lambda h: h["arrays"]["rows"].update(shape=[11])),
        r"checksums of \[11\] rows, expected \[12\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_refused(intact: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "store"
    shutil.copytree(intact, folder)
    change, words = DAMAGE[damage]
    change(folder)
    with pytest.raises(DataError, match=words) as found:
        open_store(folder)
    assert str(folder) in str(found.value)


@pytest.mark.parametrize("name", ["inputs", "targets", "owner"])
def test_verifying_finds_a_changed_bit(intact: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "store"
    shutil.copytree(intact, folder)
    flip(folder / f"{name}.npy", 128)  # the first byte after the header
    with pytest.raises(DataError, match=rf"{name}\.npy: damaged: its SHA-256 is not the one"):
        open_store(folder, verify=True)


@given(st.recursive(st.none() | st.floats() | st.text(max_size=3), st.lists, max_leaves=3))
def test_a_field_of_any_other_type_is_refused(intact: Path, value: object) -> None:
    header = json.loads((intact / "store.json").read_text())
    for field in {"format", "arrays", "preprocessing"} - ({"format"} if value == 4 else set()):
        with pytest.raises(DataError):
            stores._Header.parse({**header, field: value})


@pytest.mark.parametrize("name", ["targets", "rows", "owner"])
def test_a_changed_bit_of_a_list_is_always_found(intact: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "store"
    shutil.copytree(intact, folder)
    flip(folder / f"{name}.npy", 128)
    with pytest.raises(DataError, match=rf"{name}\.npy: damaged: its SHA-256 is not the one"):
        open_store(folder)


def test_a_changed_bit_of_an_image_is_found_when_it_is_taken(intact: Path, tmp_path: Path) -> None:
    """Image 3 begins after 128 bytes of header and three inputs of 60; the others are good."""
    folder = tmp_path / "store"
    shutil.copytree(intact, folder)
    flip(folder / "inputs.npy", 128 + 3 * 60 + 59)
    store = open_store(folder)
    assert np.array_equal(store.take(np.array([2, 4]))[0], pictures()[0][[2, 4]])
    with pytest.raises(DataError, match=r"inputs\.npy: damaged: sample 3 is not what was written"):
        store.take(np.array([2, 3]))


def test_a_store_made_for_something_else_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "store", made_for="a run")
    assert len(open_store(tmp_path / "store")) == 12
    assert len(open_store(tmp_path / "store", made_for="a run")) == 12
    with pytest.raises(DataError, match="is of another run; write the store again"):
        open_store(tmp_path / "store", made_for="another")


def test_images_that_were_cut_after_opening_are_noticed(intact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(intact, folder)
    store = open_store(folder)
    cut("inputs.npy", 500)(folder)
    with pytest.raises(DataError, match=r"inputs\.npy"):
        store.take(np.arange(12))
