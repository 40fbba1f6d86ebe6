"""A node's own data are read without torch, to the bytes that a process with torch writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from light import run_light
from PIL import Image

from prunelab.data.given import load_sample_set
from prunelab.data.own_store import RunSamples, write_own_store
from prunelab.data.reading import reading
from prunelab.data.samples import stored
from prunelab.data.store import open_store
from prunelab.errors import DataError

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (6, 3, 9, 7), dtype=np.uint8)
FLOATS = RANDOM.standard_normal((6, 2, 4, 4), np.float32)
MAIN = ("-m", "prunelab.data.own_store")


def class_folders(root: Path) -> Path:
    for row, name in enumerate(["dog", "ant", "dog"]):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[row].transpose(1, 2, 0)).save(root / name / f"{row}.png")
    return root


def table(root: Path) -> Path:
    root.mkdir()
    (root / "own.csv").write_text("a,b,label\n1,.5,ant\n3,,dog\n".replace(",,", ",4,"))
    return root / "own.csv"


def numbers(root: Path) -> Path:
    root.mkdir()
    (root / "train.tsv").write_text("a\ttarget\n1\t2.5\n3\t4.25\n")
    return root


def array_folder(root: Path) -> Path:
    root.mkdir()
    np.save(root / "inputs.npy", PIXELS)
    np.save(root / "targets.npy", np.array([2, 0, 1, 1, 0, 2], np.uint8))
    return root


def array_file(root: Path) -> Path:
    root.mkdir()
    hot = np.array([[1, 0, 1], [0, 0, 0]] * 3)
    np.savez(root / "own.npz", inputs=FLOATS, targets=hot)
    return root / "own.npz"


RUN = RunSamples("classification", 3, ("zebra", "ant", "dog"))


@pytest.mark.parametrize(
    ("made", "run", "resize"),
    [
        (class_folders, RUN, ""),
        (class_folders, RUN, "5x12"),
        (table, RUN, ""),
        (numbers, RunSamples("regression", None, ()), ""),
        (array_folder, RunSamples("classification", 3, ()), ""),
        (array_folder, RunSamples("classification", 3, ()), "4"),
        (array_file, RunSamples("multi-label"), ""),
    ],
)
def test_a_store_has_the_same_bytes_without_torch(
    made: Any, run: RunSamples, resize: str, tmp_path: Path
) -> None:
    path = str(made(tmp_path / "own"))
    options = (f"--expected={json.dumps(run.to_dict())}", f"--resize={resize}")
    done = run_light(*MAIN, path, str(tmp_path / "light"), *options)
    assert done.returncode == 0, done.stderr
    how = reading(resize=resize, task=run.task, test_share=0)
    write_own_store(path, tmp_path / "store", how=how, expected=run)
    for file in (tmp_path / "store").iterdir():
        assert file.read_bytes() == (tmp_path / "light" / file.name).read_bytes()
    # What a run reads of the same data, by tensors.
    inputs, targets = stored(load_sample_set(path, how=how).train)
    store = open_store(tmp_path / "light")
    assert np.array_equal(store.inputs, inputs)
    names = run.class_names or ()
    shift = 1 if names == RUN.class_names else 0  # the run has a class before those found here
    assert np.array_equal(store.targets, targets + shift)


def test_parquet_and_what_is_of_torch_say_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    (tmp_path / "given.py").write_text("def own(): return [((), 0)]\n")
    for path, line in (
        ("train.parquet", "train.parquet: parquet needs pyarrow: pip install pyarrow"),
        (".", "parquet needs pyarrow: pip install pyarrow"),
        ("given:own", "given:own needs torch: pip install 'fedprune[torch]'"),
        ("digits", "digits needs sklearn: pip install 'fedprune[torch]'"),
    ):
        done = run_light(*MAIN, path, "store", cwd=tmp_path)
        assert done.returncode == 3
        assert done.stderr.strip().endswith(line)
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"inputs.npy": PIXELS}, "targets.npy"),
        ({"inputs.npy": PIXELS, "targets.npy": np.arange(5)}, "6 images but 5 labels"),
        ({"inputs.npy": PIXELS.astype(np.int32), "targets.npy": np.arange(6)}, "images are int32"),
        ({"inputs.npy": PIXELS.astype(object), "targets.npy": np.arange(6)}, "cannot be read"),
        (
            {"inputs.npy": PIXELS, "targets.npy": np.arange(6), "store.json": np.arange(1)},
            "is a sample store",
        ),
    ],
)
def test_arrays_that_are_no_samples_are_refused(
    files: dict[str, Any], words: str, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name, array in files.items():
        with (own / name).open("wb") as file:
            np.save(file, array)
    with pytest.raises(DataError, match=words):
        write_own_store(str(own), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_an_npz_without_its_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=PIXELS, y=np.arange(6))
    with pytest.raises(DataError, match="has the arrays x, y; expected inputs and targets"):
        write_own_store(str(tmp_path / "own.npz"), tmp_path / "store")
    (tmp_path / "own.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="its arrays cannot be read"):
        write_own_store(str(tmp_path / "own.npz"), tmp_path / "store")


def test_a_store_is_mapped_and_not_read(tmp_path: Path) -> None:
    """Opening one of 64 MB takes no memory for its inputs, on any machine that maps files."""
    np.save(tmp_path / "inputs.npy", np.zeros((4096, 1, 128, 128), np.uint8))
    np.save(tmp_path / "targets.npy", np.zeros(4096, np.int64))
    write_own_store(str(tmp_path), tmp_path / "store", expected=RunSamples(num_classes=2))
    code = """
import re
from pathlib import Path
from prunelab.data.store import open_store

def resident():
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\\s+(\\d+)", text)[1]) * 1024

before = resident()
store = open_store(Path("store"))
opened = resident() - before
taken, _ = store.take(store.rows[:0].astype("int64"))
import numpy as np
store.take(np.arange(64))
print(store.inputs.nbytes, opened, resident() - before, type(store.inputs).__name__)
"""
    done = run_light("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size, opened, after, kind = done.stdout.split()
    assert (int(size), kind) == (1 << 26, "memmap")
    assert int(opened) < 1 << 21
    assert int(after) < 1 << 23
