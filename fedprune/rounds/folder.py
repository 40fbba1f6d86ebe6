"""The folder of one run: config.toml, metrics.jsonl, checkpoint, model, summary and report.

A run may be killed at any moment. The checkpoint is replaced atomically after each round and
records how long metrics.jsonl was; whatever was written after it is cut off on resume, so that
a resumed run leaves the same files as one that was never stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedprune.config import RunConfig, read_toml
from fedprune.methods.base import RunState
from fedprune.rounds.ledger import Totals
from prunelab.errors import RunError
from prunelab.runs import folder as runfolder
from prunelab.runs.folder import (
    CONFIG,
    METRICS,
    MODEL,
    REPORT,
    SUMMARY,
    discard_unstarted,
    read_metrics,
    read_summary,
)
from sparsemodel.storage.state_file import load_state, save_state

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "METRICS",
    "MODEL",
    "REPORT",
    "SUMMARY",
    "RunFolder",
    "check_same_run",
    "default_folder",
    "discard_unstarted",
    "has_checkpoint",
    "open_run",
    "prepare",
    "read_metrics",
    "read_summary",
]

CHECKPOINT = "checkpoint.safetensors"
# Settings that change no bit of the result, so a resumed run may differ in them.
FREE_ON_RESUME = {"federation.timeout"}


@dataclass
class RunFolder:
    """An open run folder; use `prepare` to make one and `open_run` to work in it."""

    path: Path
    totals: Totals = field(default_factory=Totals)
    state: RunState | None = None
    started: float = field(default_factory=time.monotonic)

    def append(self, line: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl; it is on disk when this returns."""
        runfolder.append_metrics(self.path, line)

    def save(self, state: RunState) -> None:
        """Write the checkpoint of a completed round."""
        now = time.monotonic()
        self.totals.seconds += now - self.started
        self.started = now
        metrics = self.path / METRICS
        metadata = {
            "round_index": state.round_index,
            "memory": state.memory,
            "notes": state.notes,
            "totals": asdict(self.totals),
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
        }
        save_state(
            self.path / CHECKPOINT,
            state.model,
            metadata={"fedprune": json.dumps(metadata)},
        )
        self.state = state

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json; its presence means that the run is complete."""
        runfolder.write_summary(self.path, summary)


def default_folder(config: RunConfig, *, resume: bool) -> Path:
    """runs/DATASET-METHOD-dDENSITY-sSEED, numbered; with resume, the latest of them."""
    dataset, method = Path(config.data.dataset).name, config.method
    name = f"{dataset}-{method.name}-d{method.target_density:g}-s{config.seed}"
    return runfolder.default_path(name, resume=resume)


def prepare(path: Path, config: RunConfig, *, resume: bool) -> None:
    """Make the folder for a new run, or check that this configuration continues the old one.

    Raises:
        RunError: it cannot be used; the message says why and what to do. Nothing is changed.
    """
    if not resume:
        runfolder.prepare(path, config.toml())
        return
    if not (path / CONFIG).exists():
        raise RunError(f"nothing to resume in {path}: it has no {CONFIG}")
    check_same_run(path, config)


def has_checkpoint(path: Path) -> bool:
    """Whether a run folder holds a completed start or round to continue from."""
    return (path / CHECKPOINT).exists()


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
    with runfolder.locked(path, wait=wait):
        folder = RunFolder(path)
        _restore(folder)
        yield folder


def _restore(folder: RunFolder) -> None:
    """Read the last checkpoint and cut what was written to the metrics after it."""
    checkpoint, metrics = folder.path / CHECKPOINT, folder.path / METRICS
    size = 0
    if checkpoint.exists():
        model, stored = load_state(checkpoint)
        try:
            values = json.loads(stored["fedprune"])
            folder.totals = Totals(**values["totals"])
            folder.state = RunState(
                round_index=values["round_index"],
                model=model,
                memory=values["memory"],
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
