"""The folder of one run: config.toml, metrics.jsonl, checkpoint, model, summary and report.

A run may be killed at any moment. The checkpoint is replaced atomically after each round and
records how long metrics.jsonl was; whatever was written after it is cut off on resume, so that
a resumed run leaves the same files as one that was never stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedprune.config import RunConfig, read_toml
from fedprune.errors import RunError
from fedprune.methods.base import RunState
from sparsemodel.checkpoint import load_sparse, save_sparse

CONFIG, METRICS, CHECKPOINT = "config.toml", "metrics.jsonl", "checkpoint.safetensors"
MODEL, SUMMARY, REPORT, LOCK = "model.safetensors", "summary.json", "report.html", ".lock"
# Settings that change no bit of the result, so a resumed run may differ in them.
FREE_ON_RESUME = {"federation.timeout"}


@dataclass
class Totals:
    """Counters of a run so far; they travel in the checkpoint."""

    bytes_up: int = 0
    bytes_down: int = 0
    bytes_up_steady_round: int | None = None
    bytes_down_steady_round: int | None = None
    train_flops: float = 0.0
    dense_flops: float = 0.0
    state_bytes: int = 0
    peak_rss_bytes: int = 0
    seconds: float = 0.0
    test_accuracy: float = 0.0


@dataclass
class RunFolder:
    """An open run folder; use `prepare` to make one and `open_run` to work in it."""

    path: Path
    totals: Totals = field(default_factory=Totals)
    state: RunState | None = None
    started: float = field(default_factory=time.monotonic)

    def append(self, line: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl; it is on disk when this returns."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(self, state: RunState) -> None:
        """Write the checkpoint of a completed round."""
        now = time.monotonic()
        self.totals.seconds += now - self.started
        self.started = now
        metrics = self.path / METRICS
        metadata = {
            "round_index": state.round_index,
            "adjustments": state.adjustments,
            "notes": state.notes,
            "totals": asdict(self.totals),
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
        }
        save_sparse(
            self.path / CHECKPOINT,
            state.weights,
            state.mask,
            metadata={"fedprune": json.dumps(metadata)},
        )
        self.state = state

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json; its presence means that the run is complete."""
        temporary = self.path / f"{SUMMARY}.part"
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.path / SUMMARY)


def prepare(path: Path, config: RunConfig, *, resume: bool) -> None:
    """Make the folder for a new run, or check that this configuration continues the old one.

    Raises:
        RunError: it cannot be used; the message says why and what to do. Nothing is changed.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; give a folder with --out")
    stored = path / CONFIG
    if resume:
        if not stored.exists():
            raise RunError(f"nothing to resume in {path}: it has no {CONFIG}")
        check_same_run(path, config)
        return
    if stored.exists():
        raise RunError(
            f"{path} already holds a run; continue it with --resume or use another --out"
        )
    if path.exists() and any(path.iterdir()):
        raise RunError(f"{path} is not empty and holds no run; give an empty or new folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        stored.write_text(config.toml(), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror}") from None


def discard_unstarted(path: Path) -> None:
    """Remove a folder in which nothing but the configuration was ever written."""
    if {entry.name for entry in path.iterdir()} <= {CONFIG, LOCK}:
        for entry in path.iterdir():
            entry.unlink()
        path.rmdir()


def check_same_run(path: Path, config: RunConfig) -> None:
    """Raise RunError, naming every difference, unless `config` is that of the run in `path`."""
    before, now = RunConfig.parse(read_toml(path / CONFIG)).flat(), config.flat()
    changed = [
        f"{key} was {before[key]!r}, now {now[key]!r}"
        for key in now
        if before[key] != now[key] and key not in FREE_ON_RESUME
    ]
    if changed:
        raise RunError(f"{path} holds a run with other settings: {'; '.join(changed)}")


@contextmanager
def open_run(path: Path, *, wait: float = 20.0) -> Iterator[RunFolder]:
    """The folder, locked against a second process, with its last checkpoint if there is one.

    Raises:
        RunError: another process is still working in it after `wait` seconds.
        CheckpointError: the checkpoint is damaged.
    """
    with (path / LOCK).open("w") as lock:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(f"another process is running in {path}") from None
                time.sleep(0.2)
        folder = RunFolder(path)
        _restore(folder)
        yield folder


def _restore(folder: RunFolder) -> None:
    """Read the last checkpoint and cut what was written to the metrics after it."""
    checkpoint, metrics = folder.path / CHECKPOINT, folder.path / METRICS
    size = 0
    if checkpoint.exists():
        stored = load_sparse(checkpoint)
        try:
            values = json.loads(stored.metadata["fedprune"])
            folder.totals = Totals(**values["totals"])
            folder.state = RunState(
                round_index=values["round_index"],
                weights=stored.state,
                mask=stored.mask,
                adjustments=values["adjustments"],
                notes=values["notes"],
            )
            size = values["metrics_bytes"]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{checkpoint} is not a checkpoint of a run ({error!r}); "
                "move it away to start the run again"
            ) from None
    if metrics.exists() and metrics.stat().st_size > size:
        os.truncate(metrics, size)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl so far; a last line that is still being written is left out."""
    try:
        text = (path / METRICS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json of a finished run.

    Raises:
        RunError: there is none.
    """
    try:
        summary: dict[str, Any] = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "continue it with --resume" if (path / CONFIG).exists() else "it holds no run"
        raise RunError(f"no {SUMMARY} in {path}: {hint}") from None
    except ValueError as error:
        raise RunError(f"{path / SUMMARY} is damaged: {error}") from None
    return summary
