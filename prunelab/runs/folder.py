"""What every run folder holds, whoever runs in it: names of files, metrics, summary, lock.

Every file carries a checksum of its content (`sparsemodel.storage.sealed`). That of config.toml
names the run, and all other files carry it too, so that nothing of another run is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prunelab.errors import RunError
from sparsemodel.storage.files import PARTS, write_atomically
from sparsemodel.storage.sealed import (
    BLANK,
    CHECKSUM,
    checksum,
    is_whole,
    read_sealed,
    read_sealed_json,
    seal,
    sealed_json,
)

CONFIG, METRICS, SUMMARY = "config.toml", "metrics.jsonl", "summary.json"
MODEL, REPORT, LOCK = "model.safetensors", "report.html", ".lock"
CURE = "take it from a copy of this run, or start the run again in another folder"
_LINES = "metrics_lines"  # of a summary: how many lines the finished run's metrics have
_BLOCK = 1 << 16  # bytes of a file's end that are read at first


def default_path(stem: str, *, resume: bool) -> Path:
    """runs/STEM, numbered from the second on: a new one, or with `resume` the latest there is."""

    def numbered(number: int) -> Path:
        return Path("runs") / (stem if number == 1 else f"{stem}-{number}")

    number = 1
    while numbered(number).exists():
        number += 1
    return numbered(max(1, number - 1) if resume else number)


def prepare(path: Path, config: str) -> None:
    """Make the folder of a new run, with its configuration (TOML text) in it.

    Raises:
        RunError: the folder is in use or cannot be written; nothing is changed then.
    """
    refuse_used(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with locked(path):
            refuse_used(path)  # another process may have come first
            write_atomically(path / CONFIG, seal(f"# {BLANK}\n{config}".encode(), CONFIG))
    except OSError as error:
        discard_unstarted(path)
        raise RunError(f"cannot write to {path}: {error.strerror}") from None


def read_config(path: Path) -> str:
    """The configuration (TOML text) that `prepare` left in a folder.

    Raises:
        RunError: the folder holds no run, or its configuration is not what was written.
    """
    return _config(path).decode()


def run_name(path: Path) -> str:
    """32 hexadecimal digits that name the run in a folder: its configuration's checksum.

    Raises:
        RunError: as `read_config`.
    """
    return checksum(_config(path))


def check_run(file: Path, run: str | None) -> None:
    """Raise RunError unless a file names the run of the folder it lies in."""
    if run != run_name(file.parent):
        raise RunError(f"{file} belongs to another run than {file.parent / CONFIG}; {CURE}")


def discard_unstarted(path: Path) -> None:
    """Remove a folder in which nothing but the configuration was ever written.

    One that another process works in stays: only who holds the lock may remove it.
    """
    with suppress(RunError, OSError), locked(path, wait=0):
        if {entry.name for entry in path.iterdir()} <= {CONFIG, LOCK}:
            for entry in path.iterdir():
                entry.unlink()
            path.rmdir()


@contextmanager
def locked(path: Path, *, wait: float = 20.0) -> Iterator[None]:
    """Hold a folder against a second process; the system lets go of it when a process dies.

    Files that a killed process left half written are removed.

    Raises:
        RunError: another process still works in it after `wait` seconds, or there is no folder.
    """
    if not path.is_dir():  # the lock would make it
        raise RunError(f"there is no folder {path}; another process may have removed it")
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=wait, poll_interval=0.2)
    except Timeout:
        raise RunError(f"another process is running in {path}") from None
    except OSError as error:
        raise RunError(f"cannot lock {path} ({error.strerror})") from None
    try:
        for part in path.glob(PARTS):
            part.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def append_metrics(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line to metrics.jsonl; it is on disk when this returns.

    Raises:
        RunError: the line before is cut short, or the file cannot be written.
    """
    last = _last_checksum(path)
    with _writing(path / METRICS), (path / METRICS).open("ab") as file:
        file.write(_sealed_line(line, after=last))
        file.flush()
        os.fsync(file.fileno())


def write_metrics(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write metrics.jsonl anew, in one step."""
    last, written = run_name(path), []
    for line in lines:
        written.append(_sealed_line(line, after=last))
        last = checksum(written[-1])
    write_file(path / METRICS, b"".join(written))


def read_metrics(path: Path, *, size: int | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl so far; a last line that is still being written is left out.

    Args:
        size: read the first so many bytes, which have to be there; None: all.

    Raises:
        RunError: they are not what was written, or lines are missing at the end.
    """
    if size is None and not (path / METRICS).exists() and not (path / SUMMARY).exists():
        return []
    lines, _ = _metrics(path, size)
    if size is None and (path / SUMMARY).exists() and len(lines) != _summary(path)[_LINES]:
        raise RunError(f"{path / METRICS} is damaged: lines are missing at its end; {CURE}")
    return lines


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json; its presence means that the run is complete."""
    values = {**summary, _LINES: len(_metrics(path)[0])}
    write_file(path / SUMMARY, sealed_json(_summary_of(path), values))


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json of a finished run.

    Raises:
        RunError: there is none, it is damaged, or of another run.
    """
    summary = _summary(path)
    del summary[_LINES]
    return summary


def write_file(path: Path, content: bytes) -> None:
    """Replace a file in one step; its folder must exist.

    Raises:
        RunError: it cannot be written; what was there stays.
    """
    with _writing(path):
        write_atomically(path, content)


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{file}: cannot be written ({error.strerror})") from None


def refuse_used(path: Path) -> None:
    """Raise RunError unless a new run can have the folder."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; give a folder")
    # Listed once: another process may be making it.
    names = [entry.name for entry in path.iterdir()] if path.exists() else []
    if CONFIG in names:
        raise RunError(
            f"{path} already holds a run; continue it with --resume or use another --out "
            "(in Python: resume=True, or another folder)"
        )
    if any(name != LOCK and not fnmatch(name, PARTS) for name in names):
        raise RunError(f"{path} is not empty and holds no run; give an empty or new folder")


def _config(path: Path) -> bytes:
    try:
        return read_sealed(path / CONFIG, CONFIG, error=RunError, cure=CURE)
    except FileNotFoundError:
        raise RunError(f"no run in {path}: it has no {CONFIG}; give the folder of a run") from None


def _summary_of(path: Path) -> str:
    return f"summary of run {run_name(path)}"


def _summary(path: Path) -> dict[str, Any]:
    if not (path / SUMMARY).exists():
        hint = "continue it with --resume" if (path / CONFIG).exists() else "it holds no run"
        raise RunError(f"no {SUMMARY} in {path}: {hint}")
    return read_sealed_json(path / SUMMARY, of=_summary_of(path), error=RunError, cure=CURE)


def _sealed_line(line: Mapping[str, Any], *, after: str) -> bytes:
    return seal((json.dumps({CHECKSUM: BLANK, **line}) + "\n").encode(), after)


def _last_checksum(path: Path) -> str:
    """What the next line of metrics.jsonl has to follow; only the end of the file is read."""
    file, block, lines = path / METRICS, _BLOCK, [b""]
    if file.exists():
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            while True:
                opened.seek(max(0, size - block))
                lines = opened.read().split(b"\n")
                if len(lines) > 2 or block >= size:
                    break
                block *= 4
    if lines[-1]:
        raise RunError(f"{file} is damaged: its last line is cut short; {CURE}")
    return checksum(lines[-2]) if len(lines) > 1 else run_name(path)


def _metrics(path: Path, size: int | None = None) -> tuple[list[dict[str, Any]], str]:
    """Whole lines, each known to follow the one before it, and the last one's checksum."""
    file = path / METRICS
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror})") from None
    *complete, begun = data[:size].split(b"\n")
    if size is not None and (len(data) < size or begun):
        raise RunError(f"{file} is damaged: its first {size:,} bytes are no whole lines; {CURE}")
    last, lines = run_name(path), []
    for number, text in enumerate(complete, start=1):
        line = text + b"\n"
        if not is_whole(line, last):
            raise RunError(
                f"{file} is damaged: line {number} is not what was written, or is of another "
                f"run; {CURE}"
            )
        lines.append(json.loads(line))
        del lines[-1][CHECKSUM]
        last = checksum(line)
    return lines, last
