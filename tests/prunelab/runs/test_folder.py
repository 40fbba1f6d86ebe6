"""The lock of a run folder, against real processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prunelab.errors import RunError
from prunelab.runs.folder import CONFIG, LOCK, discard_unstarted, locked, prepare

HOLDER = """
import sys
from pathlib import Path
from prunelab.runs.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder until a line comes or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_second_process_gives_up_after_its_wait(tmp_path: Path) -> None:
    with (
        holder(tmp_path),
        pytest.raises(RunError, match="another process is running in"),
        locked(tmp_path, wait=0.3),
    ):
        pytest.fail("two processes hold one folder")


def test_second_process_goes_on_when_the_first_lets_go(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        with locked(tmp_path, wait=20):
            pass
        assert process.wait() == 0


def test_killed_process_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        with locked(tmp_path, wait=0):
            pass


def test_lock_ends_with_an_error_inside_and_can_be_taken_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), locked(tmp_path, wait=0):
        raise ValueError("stop")
    with (
        locked(tmp_path, wait=0),
        pytest.raises(RunError, match="another process"),
        locked(tmp_path, wait=0),
    ):
        pytest.fail("one folder is held twice")


def test_folder_that_was_locked_but_never_used_is_discarded(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    prepare(folder, "seed = 1\n")
    with locked(folder):
        assert {entry.name for entry in folder.iterdir()} == {CONFIG, LOCK}
    discard_unstarted(folder)
    assert not folder.exists()
