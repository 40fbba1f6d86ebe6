"""What every run folder holds, whoever runs in it: names of files, metrics, summary, lock."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prunelab.errors import RunError
from sparsemodel.storage.files import write_atomically

CONFIG, METRICS, SUMMARY = "config.toml", "metrics.jsonl", "summary.json"
MODEL, REPORT, LOCK = "model.safetensors", "report.html", ".lock"


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
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; give a folder")
    if (path / CONFIG).exists():
        raise RunError(
            f"{path} already holds a run; continue it with --resume or use another --out "
            "(in Python: resume=True, or another folder)"
        )
    if path.exists() and any(path.iterdir()):
        raise RunError(f"{path} is not empty and holds no run; give an empty or new folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG).write_text(config, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror}") from None


def discard_unstarted(path: Path) -> None:
    """Remove a folder in which nothing but the configuration was ever written."""
    if {entry.name for entry in path.iterdir()} <= {CONFIG, LOCK}:
        for entry in path.iterdir():
            entry.unlink()
        path.rmdir()


@contextmanager
def locked(path: Path, *, wait: float = 20.0) -> Iterator[None]:
    """Hold a folder against a second process; the system lets go of it when a process dies.

    Raises:
        RunError: another process still works in it after `wait` seconds.
    """
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=wait, poll_interval=0.2)
    except Timeout:
        raise RunError(f"another process is running in {path}") from None
    try:
        yield
    finally:
        lock.release()


def append_metrics(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line to metrics.jsonl; it is on disk when this returns."""
    with (path / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl so far; a last line that is still being written is left out."""
    try:
        text = (path / METRICS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json; its presence means that the run is complete."""
    write_atomically(path / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json of a finished run.

    Raises:
        RunError: there is none, or it is damaged.
    """
    try:
        summary: dict[str, Any] = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "continue it with --resume" if (path / CONFIG).exists() else "it holds no run"
        raise RunError(f"no {SUMMARY} in {path}: {hint}") from None
    except ValueError as error:
        raise RunError(f"{path / SUMMARY} is damaged: {error}") from None
    return summary
