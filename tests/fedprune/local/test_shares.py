"""A client's own samples out of a store: the same as in memory, without torch, and no others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.local.data import ClientData, Split, split
from fedprune.local.shares import open_client, share_of, write_shares
from prunelab.data.batches import Images, Integers
from prunelab.data.store import open_store, write_store
from prunelab.errors import DataError
from prunelab.runs.seeds import rng

SHARES = [np.array([1, 4, 5, 6]), np.array([0]), np.array([2, 3, 9, 11, 13, 14, 19])]


def pictures(count: int = 20) -> tuple[Images, Integers]:
    random = rng(0)
    return random.integers(0, 256, (count, 1, 4, 4), np.uint8), random.integers(0, 5, count)


def in_memory(indices: Integers, *, seed: int) -> ClientData:
    images, labels = pictures()
    rows = split(indices, seed=seed)
    parts = (Split(images[own], labels[own]) for own in (rows.train, rows.dev, rows.test))
    return ClientData(*parts, num_classes=5, task="classification")


def equal(a: ClientData, b: ClientData) -> bool:
    pairs = ((a.train, b.train), (a.dev, b.dev), (a.test, b.test))
    return all(
        np.array_equal(one.inputs, two.inputs) and np.array_equal(one.targets, two.targets)
        for one, two in pairs
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shares(tmp_path / "store", *pictures(), SHARES, num_classes=5, name="pictures")
    return tmp_path / "store"


@pytest.mark.parametrize("client", range(3))
def test_a_client_reads_what_it_would_have_in_memory(folder: Path, client: int) -> None:
    found = open_client(folder, client, seed=4)
    expected = in_memory(SHARES[client], seed=4)
    assert equal(found, expected)
    assert found.num_classes == 5
    assert found.input_shape == (1, 4, 4)
    assert found.label_histogram() == expected.label_histogram()
    assert found.train.inputs.flags.writeable
    assert len(found.dev) == min(1, len(SHARES[client]) - 1)


def test_all_of_a_nodes_own_folder_is_the_clients(tmp_path: Path) -> None:
    write_store(tmp_path / "own", *pictures(), num_classes=5, name="own")
    expected = in_memory(np.arange(20), seed=1)
    assert equal(open_client(tmp_path / "own", 77, seed=1), expected)


def test_a_client_that_is_not_there_is_refused(folder: Path) -> None:
    for client in (-1, 3):
        with pytest.raises(DataError, match=f"has shares for 3 clients, 0 first; not {client}"):
            open_client(folder, client, seed=0)


@pytest.mark.parametrize("shares", [[], [[0, 1], [1, 2]], [[0, 20]], [[-1, 0]]])
def test_shares_that_cannot_be_are_not_written(tmp_path: Path, shares: list[list[int]]) -> None:
    arrays = [np.array(share) for share in shares]
    with pytest.raises(DataError, match="indices 0 to 19, each at most once"):
        write_shares(tmp_path / "store", *pictures(), arrays, num_classes=5, name="x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arrays",
    [
        {"shares": [0, 1, 2]},
        {"share_ends": [3]},
        {"shares": [[0, 1]], "share_ends": [2]},
        {"shares": [0, 1], "share_ends": [3]},
        {"shares": [1, 0], "share_ends": [2]},
        {"shares": [0, 20], "share_ends": [2]},
        {"shares": [-1, 2], "share_ends": [2]},
        {"shares": [0, 1], "share_ends": [-1]},
    ],
)
def test_damaged_shares_are_refused(tmp_path: Path, arrays: dict[str, Any]) -> None:
    values = {name: np.array(value) for name, value in arrays.items()}
    store = write_store(tmp_path / "x", *pictures(), num_classes=5, name="x", arrays=values)
    with pytest.raises(DataError, match="is damaged"):
        share_of(store, 0)


ABSENT = (
    "torch torchvision pyarrow datasets flwr_datasets flwr sklearn scipy pandas PIL matplotlib "
    "safetensors typer rich"
)

WITHOUT_TORCH = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT.split()!r}:
            raise ImportError(f"{{name}} was asked for")

sys.meta_path.insert(0, Absent())

from pathlib import Path
import numpy as np
from fedprune.local.shares import open_client, write_shares
from prunelab.data.batches import Preprocessing, augment, batches
from prunelab.runs.seeds import rng
from prunelab.runs.threads import computing

data = open_client(Path(sys.argv[1]), 2, seed=4)
random = rng(7, 1)
total = 0.0
for rows in batches(len(data.train), batch_size=4, rng=random):
    total += float(Preprocessing().apply(augment(data.train.inputs[rows], rng=random)).sum())
write_shares(
    Path(sys.argv[2]), data.train.inputs, data.train.targets, [np.arange(3)],
    num_classes=data.num_classes, name="again",
)
assert not set(sys.modules) & set({ABSENT.split()!r})
print(data.train.targets.tolist(), total)
"""


def test_a_client_needs_numpy_alone(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(folder), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(open_client(folder, 2, seed=4).train.targets.tolist()))
    assert len(open_store(tmp_path / "again")) == 6


MEMORY = """
import json, sys
from pathlib import Path
import numpy as np
from fedprune.local.shares import open_client

def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])

np.random.default_rng(0)
before = peak()
data = open_client(Path(sys.argv[1]), 3, seed=0)
print(json.dumps([peak() - before, data.train.inputs.nbytes + data.dev.inputs.nbytes]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the peak of a process")
def test_a_client_holds_its_own_samples_and_nothing_else(tmp_path: Path) -> None:
    """50,000 images of CIFAR-10's size are 146 MiB; a tenth of them, scattered, is 14.6 MiB."""
    count = 50_000
    images = rng(0).integers(0, 256, (count, 3, 32, 32), np.uint8)
    order = rng(1).permutation(count)
    shares = [np.sort(order[part::10]) for part in range(10)]
    write_shares(
        tmp_path / "cifar", images, np.arange(count) % 10, shares, num_classes=10, name="cifar"
    )
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "cifar")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, own = json.loads(done.stdout)
    assert own == 5_000 * 3 * 32 * 32
    assert own <= grown + (1 << 20)
    assert grown < own + 12 * (1 << 20)
