"""Trackers of experiments: a run's rounds on TensorBoard, Weights & Biases, MLflow, or an own one.

A run writes metrics.jsonl wherever it computes. `Following` reads what comes to it in the process
that started the run, whichever engine it has, and hands it to a tracker.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from fedprune.config import RunConfig
from fedprune.errors import ConfigError, TrackerWarning
from fedprune.rounds.folder import CONFIG, METRICS, SUMMARY, read_metrics, read_summary
from prunelab.runs.folder import run_name
from prunelab.runs.imported import imported

PROJECT = "fedprune"  # what W&B and MLflow call the place of runs, unless the environment says
MAX_PARAMETER = 500  # letters that MLflow keeps of a setting


@runtime_checkable
class Tracker(Protocol):
    """What a run is shown on. Whatever it raises ends the tracking, with a warning, not the run."""

    def start(self, config: Mapping[str, Any], folder: Path) -> int | None:
        """Begin, or go on with a run that is continued.

        Args:
            config: the run's settings, "section.key" -> value.
            folder: of the run.

        Returns:
            The last round that it has of this run, so that none comes twice; None is 0.
        """
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """The numbers of a completed round; rounds are counted from 1."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The content of summary.json; empty where the run ended before its last round."""
        ...


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs` shows all runs."""

    def __init__(self) -> None:
        _require("tensorboard")
        self._writer: Any = None

    def start(self, config: Mapping[str, Any], folder: Path) -> int:
        self._folder = folder / "tensorboard"
        return _last_event(self._folder) if self._folder.exists() else 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: PLC0415

        if self._writer is None:  # a run that does not begin leaves no file
            self._writer = EventFileWriter(str(self._folder))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()  # a run may be killed at any moment

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A run of Weights & Biases, which its own environment variables place (WANDB_PROJECT, ...)."""

    def __init__(self) -> None:
        _require("wandb")

    def start(self, config: Mapping[str, Any], folder: Path) -> int:
        import wandb  # noqa: PLC0415

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.resolve().name,
            id=identity(folder),
            resume="allow",
            config=dict(config),
        )
        return max(0, self._run.step - 1) if self._run.resumed else 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary else 1)


class MLflow:
    """A run of MLflow, where its environment variables say (MLFLOW_TRACKING_URI, ...)."""

    def __init__(self) -> None:
        _require("mlflow", "mlflow-skinny")

    def start(self, config: Mapping[str, Any], folder: Path) -> int:
        from mlflow import MlflowClient  # noqa: PLC0415
        from mlflow.entities import Param  # noqa: PLC0415

        # Not mlflow.log_metric and the like, whose run is one of the calling thread.
        self._client = MlflowClient()
        place = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(place)
        experiment = found.experiment_id if found else self._client.create_experiment(place)
        own = {"fedprune.run": identity(folder)}
        runs = self._client.search_runs(
            [experiment], f"tags.`fedprune.run` = '{own['fedprune.run']}'", max_results=1
        )
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            histories = (
                self._client.get_metric_history(self._run, k) for k in runs[0].data.metrics
            )
            return max((entry.step for history in histories for entry in history), default=0)
        made = self._client.create_run(experiment, run_name=folder.resolve().name, tags=own)
        self._run = made.info.run_id
        settings = [Param(key, str(value)[:MAX_PARAMETER]) for key, value in config.items()]
        self._client.log_batch(self._run, params=settings)
        return 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric  # noqa: PLC0415

        now = int(time.time() * 1000)
        values = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run, metrics=values)

    def finish(self, summary: Mapping[str, Any]) -> None:
        for key, value in summary.items():
            self._client.set_tag(self._run, f"summary.{key}", value)
        self._client.set_terminated(self._run, "FINISHED" if summary else "FAILED")


TRACKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def tracker_of(given: str | Tracker) -> Tracker:
    """The tracker of a name, of a "module:Class" that is called without arguments, or as it is.

    Raises:
        ConfigError: there is none of that name, its package is not installed, or it is no tracker.
    """
    made: object = given
    if isinstance(given, str):
        if given in TRACKERS:
            return TRACKERS[given]()
        if ":" not in given:
            raise ConfigError(
                f"unknown tracker {given!r}; known trackers: {', '.join(TRACKERS)}; or give "
                "module:Class"
            )
        try:
            make = imported(given)
        except ImportError as error:
            raise ConfigError(f"tracker {given!r} cannot be imported: {error}") from None
        if not callable(make):
            raise ConfigError(f"tracker {given!r} is a {type(make).__name__}, no class")
        try:
            made = make()
        except Exception as error:
            raise ConfigError(
                f"tracker {given!r} could not be made without arguments: "
                f"{type(error).__name__}: {error}"
            ) from error
    if isinstance(made, type) or not isinstance(made, Tracker):
        raise ConfigError(
            f"tracker {given!r}: expected an object with the methods start, log and finish"
        )
    return made


class Following:
    """Hands a run's rounds to a tracker, as long as the context lasts; every call looks for new
    ones.
    """

    def __init__(self, tracker: Tracker, folder: Path, config: RunConfig) -> None:
        self._tracker, self._folder, self._config = tracker, folder, config
        self._last, self._size, self._lost = 0, 0, False

    def __enter__(self) -> Following:
        settings = self._config.flat()
        self._last = self._safely(lambda: self._tracker.start(settings, self._folder)) or 0
        return self

    def __call__(self) -> None:
        metrics = self._folder / METRICS
        size = metrics.stat().st_size if metrics.exists() else 0
        if self._lost or size == self._size:
            return
        self._size = size
        for line in read_metrics(self._folder):
            step = line.get("round", 0)
            if "event" not in line and step > self._last:
                self._safely(partial(self._tracker.log, numbers_of(line), step))
                self._last = step

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        done = error is None and (self._folder / SUMMARY).exists()
        if done:
            self()
        summary = read_summary(self._folder) if done else {}
        self._safely(lambda: self._tracker.finish(summary))

    def _safely(self, call: Callable[[], Any]) -> Any:
        if self._lost:
            return None
        try:
            return call()
        except Exception as error:  # a run of hours is worth more than its curves
            self._lost = True
            warnings.warn(
                f"the tracker {type(self._tracker).__name__} failed and is left out: "
                f"{type(error).__name__}: {error}",
                TrackerWarning,
                stacklevel=2,
            )
        return None


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a round's line, and how many clients it had and left out.

    >>> numbers_of({"round": 2, "density": 0.5, "clients": [0, 3], "skipped": [], "adjusted": []})
    {'density': 0.5, 'clients': 2.0, 'skipped': 0.0}
    """
    numbers = {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "round"
    }
    return {**numbers, **{k: float(len(line[k])) for k in ("clients", "skipped") if k in line}}


def identity(folder: Path) -> str:
    """16 hexadecimal digits of the run in a folder, the same when it is continued."""
    made = (folder / CONFIG).stat().st_mtime_ns  # one that is made anew has the same name
    return sha256(f"{run_name(folder)} {folder.resolve()} {made}".encode()).hexdigest()[:16]


def _last_event(folder: Path) -> int:
    from tensorboard.backend.event_processing import event_accumulator  # noqa: PLC0415

    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return max((event.step for tag in tags for event in events.Scalars(tag)), default=0)


def _require(package: str, install: str = "") -> None:
    if find_spec(package) is None:
        raise ConfigError(
            f"the tracker {package!r} needs its package: pip install {install or package}"
        )
