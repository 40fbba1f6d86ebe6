"""The folder of one run: config.toml, metrics.jsonl, checkpoint, model, summary and report.

A run may be killed at any moment. The checkpoint is replaced atomically after each round and
records how long metrics.jsonl was; whatever was written after it is cut off on resume, so that
a resumed run leaves the same files as one that was never stopped.
"""

from __future__ import annotations

import json
import os
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedprune.config import RunConfig, parse_toml
from fedprune.errors import ConfigError
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
from prunelab.runs.settings import OR_ELSEWHERE, differences
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state, save_state

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "METRICS",
    "MODEL",
    "REPORT",
    "SUMMARY",
    "Checkpoint",
    "RunFolder",
    "check_usable",
    "default_folder",
    "discard_unstarted",
    "has_checkpoint",
    "open_run",
    "prepare",
    "read_checkpoint",
    "read_metrics",
    "read_model",
    "read_summary",
    "save_model",
    "stored_config",
    "stored_settings",
]

CHECKPOINT = "checkpoint.safetensors"
_KEPT = "kept:"
T = TypeVar("T")
# Settings that change no bit of the result, so a resumed run may differ in them.
FREE_ON_RESUME = {"federation.timeout", "federation.quorum", "federation.attempts"}


@dataclass(frozen=True)
class Checkpoint:
    """A completed start or round: what a run continues from.

    Attributes:
        metrics_bytes: how long metrics.jsonl was then.
    """

    state: RunState
    totals: Totals
    metrics_bytes: int


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
            "run": runfolder.run_name(self.path),
            "round_index": state.round_index,
            "memory": state.memory,
            "notes": state.notes,
            "totals": asdict(self.totals),
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
        }
        save_state(
            self.path / CHECKPOINT,
            _joined(state),
            metadata={"fedprune": json.dumps(metadata)},
        )
        self.state = state

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json; its presence means that the run is complete."""
        runfolder.write_summary(self.path, summary)


def default_folder(config: RunConfig, *, resume: bool) -> Path:
    """runs/DATASET-METHOD-dDENSITY-sSEED, numbered; with resume, the latest of them."""
    dataset, method = Path(config.data.dataset).name.replace(":", "."), config.method
    name = f"{dataset}-{method.name}-d{method.target_density:g}-s{config.seed}"
    return runfolder.default_path(name, resume=resume)


def prepare(path: Path, config: RunConfig, *, resume: bool) -> None:
    """Make the folder for a new run, or check that this configuration continues the old one.

    Raises:
        RunError: it cannot be used; the message says why and what to do. Nothing is changed.
    """
    check_usable(path, config, resume=resume)
    if not resume:
        runfolder.prepare(path, config.toml())


def check_usable(path: Path, config: RunConfig, *, resume: bool) -> None:
    """Raise RunError where `prepare` would; nothing is made."""
    if not resume:
        runfolder.refuse_used(path)
        return
    if not (path / CONFIG).exists():
        raise RunError(f"nothing to resume in {path}: it has no {CONFIG}")
    changed = differences(config.flat(), stored_config(path).flat(), free=FREE_ON_RESUME)
    if changed:
        raise RunError(
            f"{path} holds a run with other settings: {'; '.join(changed)}; {OR_ELSEWHERE}"
        )
    if not (path / SUMMARY).exists():
        read_checkpoint(path)  # a damaged one is better told before the run is laid out


def has_checkpoint(path: Path) -> bool:
    """Whether a run folder holds a completed start or round to continue from."""
    return (path / CHECKPOINT).exists()


def stored_settings(path: Path) -> dict[str, Any]:
    """The settings of the run in a folder, as flat `section.key` names.

    Raises:
        RunError: there is no run, or its config.toml is not what was written.
    """
    try:
        return parse_toml(runfolder.read_config(path))
    except tomllib.TOMLDecodeError as error:  # of another program
        raise RunError(f"{path / CONFIG} is not a TOML file: {error}") from None


def stored_config(path: Path) -> RunConfig:
    """The configuration of the run in a folder.

    Raises:
        RunError: as `stored_settings`, or it is of another kind of run, or another release.
    """
    try:
        return RunConfig.parse(stored_settings(path))
    except ConfigError as error:
        raise RunError(
            f"{path / CONFIG} is not of a run that this release can read: {error}"
        ) from None


def save_model(path: Path, state: SparseState, *, metadata: Mapping[str, str]) -> None:
    """Write a run's final model; `metadata` are for people and programs that read it later."""
    save_state(path / MODEL, state, metadata={**metadata, "run": runfolder.run_name(path)})


def read_model(path: Path) -> tuple[SparseState, Mapping[str, str]]:
    """A run's final model, and the metadata of its file.

    Raises:
        RunError: it is of another run.
        CheckpointError: there is none, or it is damaged.
    """
    state, metadata = load_state(path / MODEL)
    runfolder.check_run(path / MODEL, metadata.get("run"))
    return state, metadata


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


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The last completed start or round of the run in a folder; None where there is none.

    Raises:
        RunError: the checkpoint is of another run, or the metrics before it are damaged.
        CheckpointError: it is damaged.
    """
    file = path / CHECKPOINT
    if not file.exists():
        return None
    held, stored = load_state(file)
    try:
        model, kept = _parted(held)
        values = json.loads(stored["fedprune"])
        run, size = values["run"], int(values["metrics_bytes"])
        totals = Totals(**values["totals"])
        state = RunState(
            round_index=values["round_index"],
            model=model,
            memory=values["memory"],
            notes=values["notes"],
            kept=kept,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{file} is not a checkpoint of a run ({error!r}); move it away to start the run again"
        ) from None
    runfolder.check_run(file, run)
    read_metrics(path, size=size)
    return Checkpoint(state, totals, size)


def _joined(state: RunState) -> SparseState:
    """The model and what the method keeps as one state, the latter's names after theirs."""
    values, patterns = dict(state.model.values), dict(state.model.patterns or {})
    for key, kept in state.kept.items():
        values |= {f"{_KEPT}{key}:{name}": value for name, value in kept.values.items()}
        patterns |= {f"{_KEPT}{key}:{n}": pattern for n, pattern in (kept.patterns or {}).items()}
    return SparseState(values, Patterns(patterns) if patterns else None)


def _parted(joined: SparseState) -> tuple[SparseState, dict[str, SparseState]]:
    """What `_joined` made one: the model, and what the method keeps."""
    values = _by_owner(joined.values)
    patterns = _by_owner(joined.patterns or {})
    states = {
        key: SparseState(own, Patterns(patterns[key]) if key in patterns else None)
        for key, own in values.items()
    }
    return states.pop(""), states


def _by_owner(items: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """What belongs to the model, under "", and to each of the kept states, in the same order."""
    owned: dict[str, dict[str, T]] = {}
    for full, item in items.items():
        key, name = "", full
        if full.startswith(_KEPT):
            key, _, name = full.removeprefix(_KEPT).partition(":")
        owned.setdefault(key, {})[name] = item
    return owned


def _restore(folder: RunFolder) -> None:
    """Read the last checkpoint and cut what was written to the metrics after it."""
    metrics, size = folder.path / METRICS, 0
    checkpoint = read_checkpoint(folder.path)
    if checkpoint is not None:
        folder.totals, folder.state = checkpoint.totals, checkpoint.state
        size = checkpoint.metrics_bytes
    if metrics.exists() and metrics.stat().st_size > size:
        os.truncate(metrics, size)
