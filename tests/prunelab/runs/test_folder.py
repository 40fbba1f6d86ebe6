"""The lock of a run folder, against real processes, and files that are not what was written."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from prunelab.errors import RunError
from prunelab.runs.folder import (
    CONFIG,
    LOCK,
    METRICS,
    SUMMARY,
    append_metrics,
    discard_unstarted,
    locked,
    prepare,
    read_config,
    read_metrics,
    read_summary,
    run_name,
    write_metrics,
    write_summary,
)

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


def test_a_folder_that_another_process_holds_is_not_discarded(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    prepare(folder, "seed = 1\n")
    with holder(folder):
        discard_unstarted(folder)
        assert (folder / CONFIG).exists()
    discard_unstarted(folder)
    assert not folder.exists()


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no folder"), locked(tmp_path / "run"):
        pytest.fail("a folder that is gone was held")
    discard_unstarted(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_only_one_of_many_makes_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def make(number: int) -> str:
        try:
            prepare(folder, f"seed = {number}\n")
        except RunError as error:
            return str(error)
        return read_config(folder)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(make, range(8)))
    (made,) = [number for number, text in enumerate(results) if text.startswith("#")]
    assert read_config(folder).endswith(f"\nseed = {made}\n")
    assert sum("already holds a run" in text for text in results) == 7


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    prepare(tmp_path / "run", "seed = 1\n")
    part = tmp_path / "run" / ".checkpoint.safetensors.0123456789abcdef.part"
    part.write_bytes(b"half")
    with locked(tmp_path / "run"):
        assert not part.exists()


def lines_of(folder: Path) -> list[bytes]:
    return (folder / METRICS).read_bytes().splitlines(keepends=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three lines."""
    prepare(tmp_path / "run", "seed = 1\n")
    for number in range(3):
        append_metrics(tmp_path / "run", {"round": number, "loss": 0.5 * number})
    return tmp_path / "run"


def test_metrics_come_back_and_those_written_at_once_are_the_same(run: Path) -> None:
    lines = [{"round": number, "loss": 0.5 * number} for number in range(3)]
    assert read_metrics(run) == lines
    before = (run / METRICS).read_bytes()
    write_metrics(run, lines)
    assert (run / METRICS).read_bytes() == before
    with (run / METRICS).open("ab") as file:
        file.write(b'{"round": 3, "half wr')
    assert read_metrics(run) == lines


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (lambda lines: [lines[1], lines[2]], 1),
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: [lines[1], lines[0], lines[2]], 1),
        (lambda lines: [lines[0], lines[0], lines[1], lines[2]], 2),
        (lambda lines: [lines[0], lines[1].replace(b"0.5", b"0.9"), lines[2]], 2),
        (lambda lines: [lines[0].replace(b" ", b"\r", 1), lines[1], lines[2]], 1),
        (lambda lines: [lines[0], b"\n", lines[1], lines[2]], 2),
    ],
)
def test_metrics_that_are_not_what_was_written_are_refused(
    change: Callable[[list[bytes]], list[bytes]], number: int, run: Path
) -> None:
    (run / METRICS).write_bytes(b"".join(change(lines_of(run))))
    with pytest.raises(RunError, match=rf"metrics\.jsonl is damaged: line {number} is not what"):
        read_metrics(run)
    with pytest.raises(RunError, match=rf"line {number} is not what"):
        write_summary(run, {})


def test_a_line_follows_the_one_before_however_long_that_is(run: Path) -> None:
    lines = read_metrics(run)
    for size in (0, 1, 65_000, 66_000, 300_000, 5):
        lines.append({"text": "é" * size})
        append_metrics(run, lines[-1])
        assert read_metrics(run) == lines
    with (run / METRICS).open("ab") as file:
        file.write(b'{"half')
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged: its last line is cut short"):
        append_metrics(run, {"round": 9})


def test_lines_that_are_missing_at_the_end_are_noticed(run: Path) -> None:
    size = (run / METRICS).stat().st_size
    write_summary(run, {"accuracy": 1.0})
    assert read_summary(run) == {"accuracy": 1.0}
    (run / METRICS).write_bytes(b"".join(lines_of(run)[:2]))
    with pytest.raises(RunError, match="lines are missing at its end"):
        read_metrics(run)
    with pytest.raises(RunError, match=r"is damaged: its first .* bytes are no whole"):
        read_metrics(run, size=size)
    (run / METRICS).unlink()
    with pytest.raises(RunError, match="lines are missing at its end"):
        read_metrics(run)


def test_files_of_another_run_are_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    prepare(other, "seed = 2\n")
    append_metrics(other, {"round": 0})
    write_summary(other, {"accuracy": 0.5})
    write_summary(run, {"accuracy": 1.0})
    assert run_name(run) != run_name(other)
    for name, read in ((SUMMARY, read_summary), (METRICS, read_metrics)):
        own = (run / name).read_bytes()
        (run / name).write_bytes((other / name).read_bytes())
        with pytest.raises(RunError, match=name):
            read(run)
        (run / name).write_bytes(own)
    (run / CONFIG).write_bytes((other / CONFIG).read_bytes())
    for read in (read_summary, read_metrics):
        with pytest.raises(RunError):
            read(run)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes are Linux's")
def test_a_full_disk_is_a_clear_error_and_leaves_nothing_new(run: Path, tmp_path: Path) -> None:
    """No file may grow beyond 20 bytes, as on a disk that is full."""
    before = {path: path.read_bytes() for path in run.iterdir()}
    writes: dict[str, Callable[[], None]] = {
        METRICS: lambda: append_metrics(run, {"round": 3}),
        SUMMARY: lambda: write_summary(run, {"accuracy": 1.0}),
        "another": lambda: prepare(tmp_path / "another", "seed = 123456789\n"),
    }
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        for name, write in writes.items():
            with pytest.raises(RunError, match=rf"{name}.*File too large"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert not (tmp_path / "another").exists()


def test_a_configuration_that_was_changed_is_refused(run: Path) -> None:
    assert read_config(run).endswith("\nseed = 1\n")
    text = (run / CONFIG).read_text()
    for changed in (text.replace("1\n", "2\n"), text[:-9], text.partition("\n")[2], ""):
        (run / CONFIG).write_text(changed)
        with pytest.raises(RunError, match=r"config\.toml: damaged, changed since it was"):
            read_config(run)
