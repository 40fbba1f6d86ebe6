"""What killed processes leave: temporary folders and children."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from prunelab.runs.temporary import LOCK, YOUNG, sweep, temporary_folder

OWNER = """
import sys
from prunelab.runs.temporary import temporary_folder
with temporary_folder() as folder:
    (folder / "setup").mkdir()
    (folder / "setup" / "images.npy").write_bytes(b"many")
    print(folder, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files of this test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def owner(place: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that works in a temporary folder, and that folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env={**os.environ, "TMPDIR": str(place)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def age(folder: Path) -> None:
    old = time.time() - 2 * YOUNG
    os.utime(folder / LOCK, (old, old))


def test_a_folder_goes_at_the_end(place: Path) -> None:
    with temporary_folder() as folder:
        assert folder.parent == place
        (folder / "file").touch()
    assert list(place.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_by_the_next(place: Path) -> None:
    """One of a process that lives stays, however old, and so does what is not ours."""
    (killed, left), (living, used) = owner(place), owner(place)
    foreign = place / "fedprune-setups-me"
    foreign.mkdir()
    killed.kill()
    killed.communicate()
    assert left.exists()
    sweep()
    assert left.exists()  # too young: its owner might not have locked it yet
    age(left)
    age(used)
    with temporary_folder() as own:
        assert {path.name for path in place.iterdir()} == {used.name, foreign.name, own.name}
        assert (used / "setup" / "images.npy").exists()
    living.communicate("\n")
    assert [path.name for path in place.iterdir()] == [foreign.name]


CHILD = """
import subprocess, sys
from prunelab.runs.children import ended_with_parent
child = subprocess.Popen(ended_with_parent("sleep", "600"))
print(child.pid, flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_child_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = Path("/proc") / parent.stdout.readline().strip()
    while "sleep" not in (child / "comm").read_text():
        time.sleep(0.01)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while child.exists() and "\nState:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.01)
