"""Trackers show every round once, whatever happens to the run, and cost it nothing."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from federation import digest, tiny
from processes import Command

import fedprune
from fedprune.config import RunConfig
from fedprune.errors import ConfigError, TrackerWarning
from fedprune.reports import trackers
from fedprune.reports.trackers import TRACKERS, numbers_of, tracker_of
from fedprune.rounds import run as runner
from fedprune.rounds.folder import METRICS, read_metrics

CONFIG = tiny(training__rounds=3)


class Kept:
    """A tracker of one's own."""

    def __init__(self, *, fails_at: str = "", has: int | None = None) -> None:
        self.fails_at, self.has = fails_at, has
        self.config: Mapping[str, Any] = {}
        self.rounds: list[tuple[int, Mapping[str, float]]] = []
        self.summaries: list[Mapping[str, Any]] = []
        self.calls: list[str] = []

    def start(self, config: Mapping[str, Any], folder: Path) -> int | None:
        self._called("start")
        assert (folder / "config.toml").exists()
        self.config = config
        return self.has

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._called("log")
        self.rounds.append((step, metrics))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._called("finish")
        self.summaries.append(summary)

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_at:
            raise OSError("no network")


def written(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """What a run says of its rounds, as numbers."""
    lines = [line for line in read_metrics(folder) if "event" not in line]
    return [(line["round"], numbers_of(line)) for line in lines]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    runner.run(CONFIG, folder)
    return folder


def test_an_own_tracker_is_shown_every_round_and_the_end(plain: Path, tmp_path: Path) -> None:
    tracker = Kept()
    assert isinstance(tracker, fedprune.Tracker)
    result = fedprune.run(CONFIG, tmp_path / "run", tracker=tracker)
    assert tracker.config == CONFIG.flat()
    assert tracker.rounds == written(tmp_path / "run") == written(plain)
    assert tracker.rounds[0][1].keys() >= {"test_accuracy", "train_loss", "bytes_up", "clients"}
    assert tracker.summaries == [result.summary]
    assert digest(tmp_path / "run") == digest(plain)


@pytest.mark.parametrize("fails_at", ["start", "log", "finish"])
def test_a_tracker_that_fails_costs_a_warning_not_the_run(
    fails_at: str, plain: Path, tmp_path: Path
) -> None:
    tracker = Kept(fails_at=fails_at)
    with pytest.warns(TrackerWarning, match="tracker Kept failed .*: OSError: no network") as seen:
        fedprune.run(CONFIG, tmp_path / "run", tracker=tracker)
    assert len(seen) == 1
    assert tracker.calls.count(fails_at) == 1
    assert tracker.calls[-1] == fails_at
    assert digest(tmp_path / "run") == digest(plain)


class Offline:
    def __init__(self) -> None:
        raise OSError("no server")


def stopped(folder: Path, tracker: Any, *, after: int) -> None:
    """Run, and stop once so many rounds are written."""

    def progress() -> None:
        if (folder / METRICS).exists() and len(written(folder)) >= after:
            raise KeyboardInterrupt

    class Grid(runner_grid()):  # type: ignore[misc]
        def push_messages(self, messages: Any) -> Any:
            progress()
            return super().push_messages(messages)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedprune.flower.inline.InlineGrid", Grid)
        with pytest.raises(KeyboardInterrupt):
            runner.run(CONFIG, folder, tracker=tracker)


def runner_grid() -> type:
    from fedprune.flower.inline import InlineGrid  # noqa: PLC0415

    return InlineGrid


def test_a_run_that_goes_on_shows_no_round_twice(tmp_path: Path) -> None:
    first, second = Kept(), Kept(has=2)
    stopped(tmp_path / "run", first, after=2)
    assert [step for step, _ in first.rounds] in ([1, 2], [1], [])  # as far as it had looked
    assert first.summaries == [{}]
    runner.run(CONFIG, tmp_path / "run", resume=True, tracker=second)
    assert second.rounds == written(tmp_path / "run")[2:]
    runner.run(CONFIG, tmp_path / "run", resume=True, tracker=Kept(fails_at="start"))  # complete


def test_a_run_that_is_made_anew_in_its_folder_is_another(tmp_path: Path) -> None:
    """A tracker that goes on by identity would lose the rounds that the first one had."""
    known = set()
    for _ in range(2):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        fedprune.run(CONFIG, tmp_path / "run")
        known.add(trackers.identity(tmp_path / "run"))
        runner.run(CONFIG, tmp_path / "run", resume=True)
        known.add(trackers.identity(tmp_path / "run"))
    assert len(known) == 2


def test_event_files_hold_what_the_run_wrote(plain: Path, tmp_path: Path) -> None:
    """Read back by TensorBoard's own reader, after a stop as well."""
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,
    )

    folder = tmp_path / "run"
    stopped(folder, tracker_of("tensorboard"), after=2)
    runner.run(CONFIG, folder, resume=True, tracker=tracker_of("tensorboard"))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    wanted = written(plain)
    assert set(events.Tags()["scalars"]) == set(wanted[0][1])
    for name in wanted[0][1]:
        held = [(event.step, event.value) for event in events.Scalars(name)]
        if name not in ("bytes_down", "mask_bytes"):  # a resumed run may send a mask again
            assert held == [(step, pytest.approx(m[name], rel=1e-6)) for step, m in wanted]
        assert [step for step, _ in held] == [1, 2, 3]
    assert digest(folder) == digest(plain)


def test_a_run_that_does_not_begin_leaves_no_folder(tmp_path: Path) -> None:
    config = RunConfig.parse({"data.dataset": "no such set"})
    with pytest.raises(ValueError, match="unknown data set"):
        runner.run(config, tmp_path / "run", tracker=tracker_of("tensorboard"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("wandb") is None, reason="runs where wandb is installed")
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its offline mode, whose file is sent to nobody."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracker = tracker_of("wandb")
    folder = tmp_path / "run"
    summary = fedprune.run(CONFIG, folder, tracker=tracker).summary
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert trackers.identity(folder) in file.name
    content = file.read_bytes()
    assert all(f"{metrics['test_loss']}".encode() in content for _, metrics in written(folder))
    assert f"{summary['train_flops_ratio']}".encode() in content
    assert b"training.rounds" in content


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its data base
@pytest.mark.skipif(find_spec("mlflow") is None, reason="runs where mlflow or mlflow-skinny is")
def test_mlflow_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient  # noqa: PLC0415

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'runs.db'}")
    folder = tmp_path / "run"
    stopped(folder, tracker_of("mlflow"), after=2)
    runner.run(CONFIG, folder, resume=True, tracker=tracker_of("mlflow"))
    client = MlflowClient()
    experiment = client.get_experiment_by_name("fedprune")
    (run,) = client.search_runs([experiment.experiment_id])
    held = client.get_metric_history(run.info.run_id, "test_accuracy")
    wanted = [(step, metrics["test_accuracy"]) for step, metrics in written(folder)]
    assert [(entry.step, entry.value) for entry in held] == wanted
    assert (run.info.status, run.data.params["seed"]) == ("FINISHED", "7")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sheet", "unknown tracker 'sheet'; known trackers: tensorboard, wandb, mlflow; or give"),
        ("nowhere:Class", "tracker 'nowhere:Class' cannot be imported"),
        ("math:sqrt", "tracker 'math:sqrt' could not be made without arguments: TypeError: "),
        ("math:pi", "tracker 'math:pi' is a float, no class"),
        (f"{__name__}:Offline", "could not be made without arguments: OSError: no server"),
        ("collections:OrderedDict", "start, log and finish"),
        (Kept, "expected an object with the methods"),
        (3, "expected an object"),
    ],
)
def test_what_is_no_tracker_is_refused_before_the_run(
    given: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        fedprune.run(CONFIG, tmp_path / "run", tracker=given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_package_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"tracker '{name}' needs its package: pip install"):
        tracker_of(name)


def test_the_command_takes_an_own_class(tmp_path: Path) -> None:
    (tmp_path / "sheet.py").write_text(
        "class Sheet:\n"
        "    def start(self, config, folder): self.file = open('rounds.txt', 'w')\n"
        "    def log(self, metrics, step): self.file.write(f'{step}\\n')\n"
        "    def finish(self, summary): self.file.close()\n",
        encoding="utf-8",
    )
    options = ("--clients", "2", "--set", "data.num_train=200", "--rounds", "2", "--out", "r")
    done = Command(
        "fedprune", "run", "--engine", "inline", "--method", "magnitude", *options,
        "--tracker", "sheet:Sheet", cwd=tmp_path,
    ).ended()  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rounds.txt").read_text() == "1\n2\n"
