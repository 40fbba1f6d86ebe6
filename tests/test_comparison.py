"""The comparison of methods: its grid, tuning, shared work, page, and a tiny one for real."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from flwr.app import Context, Message
from processes import FORKS, in_a_process

from fedprune.errors import ConfigError
from fedprune.flower import client
from fedprune.methods import METHODS
from fedprune.rounds.folder import SUMMARY
from simulations import jobs
from simulations.archive import archived
from simulations.compare_methods import parse
from simulations.comparison.cells import Cell, CellJob, Point, grid, pairs
from simulations.comparison.presets import PRESETS, Preset
from simulations.comparison.report import write_page
from simulations.comparison.steps import Call, Found, compare
from simulations.comparison.tuning import LOG, Tried, chosen, tried, tuning_cells, write_log
from simulations.jobs import (
    DID_DIVERGE,
    FAILED,
    FINISHED,
    Job,
    Outcome,
    Workers,
    attempt,
    processes,
    ray_cluster,
    read_outcome,
    run_jobs,
    write_outcome,
)

LR: Point = (("training.lr", 0.1),)
SETTINGS = {
    "data.dataset": "digits",
    "data.num_train": 150,
    "data.num_test": 40,
    "data.clients": 2,
    "model.name": "resnet8",
    "model.width": 4,
    "training.rounds": 2,
    "training.local_epochs": 1,
    "method.adjust_every": 1,
}
PRESET = Preset(
    "Tiny", SETTINGS, densities=(0.2,), rates=(0.3, 0.1), alphas=(0.5, None), seeds=(0, 1)
)


def call_of(preset: Preset, methods: list[str], out: Path, point: Point | None = None) -> Call:
    return Call(preset, methods, out, point, "the command", out / "table.md")


def here() -> Workers:
    """Whoever works in this process, at once."""

    def submit(job: Job, out: Path) -> Future[Outcome | None]:
        done: Future[Outcome | None] = Future()
        done.set_result(attempt(job, out))
        return done

    return Workers(1, submit)


def finished(accuracy: float, **values: Any) -> Outcome:
    costs = {"density": 0.2, "bytes_up": 4000, "bytes_down": 6000, "client_seconds": 3.0}
    return Outcome(FINISHED, values={"test_accuracy": accuracy, **costs, **values}, commit="abc")


# --- the grid -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_run_of_a_preset_is_a_valid_configuration(name: str) -> None:
    preset = PRESETS[name]
    cells = tuning_cells(preset, pairs(list(METHODS), preset.densities))
    assert not set(preset.seeds) & set(preset.tuning_seeds)
    for cell in cells:
        config = cell.config({**preset.settings, "training.device": "cpu"})
        assert config.federation.clients_test
    counts = {(c.method, c.density): 0 for c in cells}
    for cell in cells:
        counts[cell.method, cell.density] += 1
    assert len(set(counts.values())) == 1  # the same budget for everybody


def test_grid_goes_seed_by_seed_and_runs_methods_without_density_once() -> None:
    """(fedavg + two methods × two densities) × two alphas: 10 cells a seed."""
    methods, densities = ["magnitude", "fedavg", "fedtiny"], (0.1, 0.2)
    points = dict.fromkeys(pairs(methods, densities), LR)
    found = grid(points, methods=methods, densities=densities, alphas=(0.5, None), seeds=(0, 1))
    assert [cell.seed for cell in found] == [0] * 10 + [1] * 10
    assert len({cell.name for cell in found}) == 20
    assert [c.density for c in found[:5]] == [None, 0.1, 0.1, 0.2, 0.2]
    del points["fedtiny", 0.1]  # not tuned yet
    left = grid(points, methods=methods, densities=densities, alphas=(0.5,), seeds=(0,))
    assert len(left) == 4


def test_a_cell_is_named_and_configured_by_what_it_is() -> None:
    cell = Cell("magnitude", 0.2, None, 3, (("training.lr", 0.03),))
    assert cell.name == "magnitude-d0.2-iid-lr0.03-s3"
    config = cell.config(SETTINGS)  # method.adjust_every is FedTiny's alone
    assert (config.data.partition, config.training.lr, config.seed) == ("iid", 0.03, 3)
    assert not config.federation.clients_test
    tuning = replace(cell, alpha=0.5, tuning=True)
    assert tuning.name == "tune-magnitude-d0.2-a0.5-lr0.03-s3"
    assert tuning.config(SETTINGS).federation.clients_test
    with pytest.raises(ConfigError, match="adjust_rate"):
        replace(cell, point=(("method.adjust_rate", 0.1),)).config(SETTINGS)


# --- tuning ---------------------------------------------------------------------------------------


def test_tuning_takes_the_best_mean_the_smaller_of_equals_and_nothing_that_diverged() -> None:
    low, middle, high = ((("training.lr", rate),) for rate in (0.1, 0.2, 0.3))
    assert chosen([Tried(low, [0.4, 0.6]), Tried(middle, [0.5, 0.5])]) == low
    assert chosen([Tried(low, [0.4, 0.6]), Tried(high, [0.5, 0.51])]) == high
    assert chosen([Tried(low, [0.1, 0.1]), Tried(high, [0.9, None])]) == low
    assert chosen([Tried(low, [0.0]), Tried(high, [0.0])]) == low
    assert chosen([Tried(low, [None]), Tried(high, [None])]) is None


def test_a_method_with_settings_of_its_own_has_the_same_budget(tmp_path: Path) -> None:
    one: Point = (("training.lr", 0.1), ("method.adjust_rate", 0.1))
    other: Point = (("training.lr", 0.1), ("method.adjust_rate", 0.3))
    preset = replace(PRESET, own={"fedtiny": [other, one]})
    assert preset.points("fedtiny") == [one, other]
    assert preset.points("magnitude") == [(("training.lr", 0.1),), (("training.lr", 0.3),)]
    with pytest.raises(ValueError, match="1 points are tried, of others 2"):
        replace(PRESET, own={"fedtiny": [one]}).points("fedtiny")
    names = [Cell("fedtiny", 0.2, 0.5, 1000, point, tuning=True).name for point in (one, other)]
    outcomes = {names[0]: finished(0.3)}
    assert tried(preset, "fedtiny", 0.2, outcomes) is None
    outcomes[names[1]] = Outcome(DID_DIVERGE)
    found = tried(preset, "fedtiny", 0.2, outcomes)
    assert found == [Tried(one, [0.3]), Tried(other, [None])]
    write_log(tmp_path, {("magnitude", 0.2): [Tried(LR, [0.5])]})
    write_log(tmp_path, {("fedtiny", 0.2): found})  # of another command
    first, second = json.loads((tmp_path / LOG).read_text())
    assert first["method"] == "magnitude"
    assert [point["chosen"] for point in second["tried"]] == [True, False]
    assert second["tried"][0]["point"] == {"training.lr": 0.1, "method.adjust_rate": 0.1}


# --- shared work ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """A job that notes each time it is done, and ends as it is told."""

    name: str
    status: str = FINISHED

    def run(self, out: Path) -> Outcome:
        with (out / "done.txt").open("a") as file:
            file.write(f"{self.name}\n")
        if self.status == FAILED:
            raise RuntimeError("the disk is full")
        return Outcome(self.status, values={"test_accuracy": 0.5})


def test_failed_work_is_tried_again_and_other_work_is_not(tmp_path: Path) -> None:
    all_jobs: list[Job] = [Counted("a"), Counted("b", DID_DIVERGE), Counted("c", FAILED)]
    told: list[str] = []
    found = run_jobs(all_jobs, tmp_path, here(), say=told.append)
    assert [one.status for one in found.values()] == [FINISHED, DID_DIVERGE, FAILED]
    assert found["c"].reason.endswith("RuntimeError: the disk is full\n")
    assert told[0].startswith("1/3 a: 50.00 %")
    assert "the disk is full" in told[2]
    assert run_jobs(all_jobs, tmp_path, here(), say=told.append) == found
    assert (tmp_path / "done.txt").read_text().split() == ["a", "b", "c", "c"]


def test_two_commands_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "BUSY_SECONDS", 0.05)
    held = FileLock(tmp_path / "locks" / "job-0.lock")
    (tmp_path / "locks").mkdir()
    held.acquire()  # a third one is at the first job
    assert attempt(Counted("job-0"), tmp_path) is None
    held.release()
    work: list[Job] = [Counted(f"job-{k}") for k in range(12)]
    with ThreadPoolExecutor(2) as one, ThreadPoolExecutor(2) as other:

        def workers(pool: ThreadPoolExecutor) -> Workers:
            return Workers(2, lambda job, out: pool.submit(attempt, job, out))

        with ThreadPoolExecutor(2) as commands:
            quiet: Callable[[str], None] = lambda text: None  # noqa: E731
            both = [
                commands.submit(run_jobs, work, tmp_path, workers(pool), say=quiet)
                for pool in (one, other)
            ]
            first, second = (command.result() for command in both)
    assert first == second
    assert len(first) == 12
    assert sorted((tmp_path / "done.txt").read_text().split()) == sorted(j.name for j in work)


@dataclass(frozen=True)
class Together:
    """A job that ends once two have begun, and tells which GPU it sees."""

    name: str

    def run(self, out: Path) -> Outcome:
        (out / f"{self.name}.begun").touch()
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.begun"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        return Outcome(FINISHED, values={"gpu": os.environ["CUDA_VISIBLE_DEVICES"]})


def test_an_archive_carries_outcomes_to_another_folder(tmp_path: Path) -> None:
    settings = {"data.clients": 2, "data.dataset": str(tmp_path), "model.width": (4,)}
    file, one, two = tmp_path / "a b" / "kept.json", tmp_path / "one", tmp_path / "two"
    with archived(file, one, settings):
        for name in ("a", "b", "lost"):
            write_outcome(name, one, finished(0.5))
        write_outcome("c", one, Outcome(FAILED, reason="the disk was full"))
    (one / "outcomes" / "lost.json").unlink()
    with archived(file, one, settings):  # what is in it stays in it
        assert read_outcome("lost", one) == finished(0.5)
    write_outcome("a", two, finished(0.75))
    elsewhere = {**settings, "data.dataset": "/elsewhere"}
    with archived(file, two, elsewhere):
        assert read_outcome("a", two) == finished(0.75)
        assert read_outcome("b", two) == finished(0.5)
        assert read_outcome("c", two) is None
    interrupted = pytest.raises(KeyboardInterrupt)
    with interrupted, archived(file, two, elsewhere):
        write_outcome("d", two, Outcome(DID_DIVERGE, reason="the loss is nan"))
        raise KeyboardInterrupt
    three = tmp_path / "three"
    with archived(file, three, settings):
        assert read_outcome("a", three) == finished(0.75)
        assert read_outcome("d", three) == Outcome(DID_DIVERGE, reason="the loss is nan")
    text = file.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    refused = pytest.raises(SystemExit, match="other settings")
    with refused, archived(file, three, {**settings, "data.clients": 3}):
        pass
    assert file.read_text(encoding="utf-8") == text
    for damaged in ("[", "[]", '{"outcomes": {"a": {"accuracy": 1}}}'):
        file.write_text(damaged, encoding="utf-8")
        refused = pytest.raises(SystemExit, match="expected an archive of outcomes")
        with refused, archived(file, three, settings):
            pass
        assert file.read_text(encoding="utf-8") == damaged


def test_processes_take_gpus_in_turn(tmp_path: Path) -> None:
    two: list[Job] = [Together("a"), Together("b")]
    with processes(2, gpus=2, context=FORKS) as workers:
        found = run_jobs(two, tmp_path, workers, say=lambda text: None)
    assert {one.values["gpu"] for one in found.values()} == {"0", "1"}


@dataclass(frozen=True)
class Endless:
    """A job that says that it has begun, and takes a minute."""

    name: str = "endless"

    def run(self, out: Path) -> Outcome:
        (out / "begun").touch()
        time.sleep(60)
        return Outcome(FINISHED)


def test_an_interrupt_ends_what_runs(tmp_path: Path) -> None:
    with (  # noqa: PT012 - the interrupt comes while work is done
        pytest.raises(KeyboardInterrupt),
        processes(1, context=FORKS) as workers,
    ):
        workers.submit(Endless(), tmp_path)
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        raise KeyboardInterrupt
    assert read_outcome("endless", tmp_path) is None  # nobody waited for its minute


@pytest.mark.ray
@pytest.mark.slow
def test_work_goes_over_a_ray_cluster(tmp_path: Path) -> None:
    (outcome,) = in_a_process(over_ray, tmp_path).values()
    assert outcome.status == FINISHED
    assert outcome == read_outcome("magnitude-d0.2-iid-lr0.1-s0", tmp_path)


def over_ray(out: Path) -> dict[str, Outcome]:
    """What becomes of a run; in a process of its own, as Ray leaves things behind."""
    work = [CellJob(Cell("magnitude", 0.2, None, 0, LR), SETTINGS)]
    with ray_cluster("local", jobs=2) as workers:
        return run_jobs(work, out, workers, say=lambda text: None)


# --- the page -------------------------------------------------------------------------------------


def test_page_by_hand(tmp_path: Path) -> None:
    """FedTiny 34, 36, 38; magnitude 31, 34, 34 with a fourth that diverged; dense 50, 50, 50.

    Pairs 3, 2, 4: mean 3, s = 1, interval 3 ± 4.302653 / √3 = [+0.5, +5.5]; 2 t s / √n < 2 first
    at n = 7. Dense minus magnitude 19, 16, 16: 17 ± 4.303 · √3 / √3 = [+12.7, +21.3].
    """
    preset = replace(PRESET, alphas=(0.5,), seeds=(0, 1, 2, 3))
    accuracies = {
        ("fedavg", None): (0.5, 0.5, 0.5),
        ("fedtiny", 0.2): (0.34, 0.36, 0.38),
        ("magnitude", 0.2): (0.31, 0.34, 0.34),
    }
    cells, outcomes = [], {}
    for (method, density), values in accuracies.items():
        bytes_up = 90_000 if method == "fedavg" else 4000
        for seed, accuracy in enumerate(values):
            cells.append(Cell(method, density, 0.5, seed, LR))
            outcomes[cells[-1].name] = finished(accuracy, bytes_up=bytes_up)
    cells.append(Cell("magnitude", 0.2, 0.5, 3, LR))
    outcomes[cells[-1].name] = Outcome(DID_DIVERGE, reason="too high", commit="abc")
    cells.append(Cell("fedtiny", 0.2, 0.5, 3, LR))  # to be run yet
    memory = {("fedavg", None): 6e8, ("fedtiny", 0.2): 8e7, ("magnitude", 0.2): 9e7}
    log = {("fedtiny", 0.2): [Tried(LR, [0.4]), Tried((("training.lr", 0.3),), [None])]}
    log["magnitude", 0.2] = [Tried(LR, [None])]
    call = call_of(preset, ["fedavg", "fedtiny", "magnitude"], tmp_path)
    page = write_page(call, Found(cells, outcomes, memory, log))
    for line in (
        "| 0.5 | 0.2 | 50.0 ± 0.0 | fedtiny | +14.0 [+9.0, +19.0] | magnitude | "
        "+17.0 [+12.7, +21.3] | yes |",
        "| 0.5 | 0.2 | fedtiny | magnitude | +3.0 | [+0.5, +5.5] | 3 | above |",
        "| fedtiny | 0.2000 | **36.0 ± 2.0** | 3 | lr0.1 |  |  |",
        "| magnitude | 0.2000 | 33.0 ± 1.7 | 3 | lr0.1 | 1 |  |",
        "| magnitude | +3.0 | [+0.5, +5.5] | 3 | 7 | above |",
        "| fedavg | 0.2 | 50.0 ± 0.0 | 48.0 kB • | 1.5 s • | 600 MB • |",
        "| fedtiny | 0.2 | 36.0 ± 2.0 | 5.00 kB • | 1.5 s | 80.0 MB • |",
        "| magnitude | 0.2 | 33.0 ± 1.7 | 5.00 kB | 1.5 s | 90.0 MB |",
        "| fedtiny | 0.2 | **lr0.1: 40.0**; lr0.3: diverged | the lowest |",
        "| magnitude | 0.2 | lr0.1: diverged |  |",
        "- left out, for it diverged wherever it was tuned: magnitude at 0.2",
        "`magnitude-d0.2-a0.5-lr0.1-s3`",
        "- 10 of 11 runs have ended",
        "- left out, for its tuning has not ended: fedavg\n",
    ):
        assert line in page, line
    assert page.index("## Gap to dense") < page.index("## Dirichlet 0.5") < page.index("Frontiers")


def test_page_of_nothing_and_of_a_single_seed(tmp_path: Path) -> None:
    call = call_of(PRESET, ["fedtiny", "magnitude", "fedavg"], tmp_path, LR)
    page = write_page(call, Found([], {}, {}, {}))
    assert "Not known: no run of fedavg yet." in page
    assert "every method runs with lr0.1" in page
    cells = [Cell(m, d, None, 0, LR) for m, d in pairs(call.methods, (0.2,))]
    outcomes = {cell.name: finished(0.4) for cell in cells}
    page = write_page(call, Found(cells, outcomes, {}, {}))
    assert "| magnitude | +0.0 | – | 1 | – | one seed |" in page
    assert "| iid | 0.2 | 40.0 | fedtiny | +0.0 – | magnitude | +0.0 – | one seed |" in page
    assert "| 5.00 kB • | 1.5 s • | – |" in page  # no memory was measured


# --- the command ----------------------------------------------------------------------------------


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--preset", "small", "--methods", "fedtiny,fedavg", "--out", str(tmp_path / "runs")]
    call, _ = parse([*common, "--alphas", ".1,iid", "--densities", ".01", "--seeds", "5,6"])
    assert (call.preset.alphas, call.preset.densities) == ([0.1, None], [0.01])
    assert call.saved == tmp_path / "runs" / "table.md"
    assert call.pairs == [("fedavg", None), ("fedtiny", 0.01)]
    assert call.command.endswith(
        "--preset small --methods fedtiny,fedavg --densities .01 --alphas .1,iid --seeds 5,6"
    )
    whole, _ = parse(["--preset", "small", "--out", str(tmp_path / "runs")])
    assert whole.saved.name == "compare_methods_small.md"
    assert whole.methods == list(METHODS)
    for wrong, reason in (
        (["--seeds", "1000"], "the tuning has had some of these"),
        (["--set", "training.lr=.1"], "training.lr: it is tuned"),
        (["--set", "training.rounds=3"], "holds runs of other settings"),
        (["--set", "training.round=3"], "did you mean 'training.rounds'"),
        (["--methods", "fedtini"], "did you mean 'fedtiny'"),
        (["--densities", "tenth"], "--densities tenth: expected numbers with commas between"),
        (["--alphas", "0.1,non-iid"], "expected numbers, or iid, with commas between"),
        (["--alphas", "0"], "data.alpha: "),
        (["--data", "nowhere"], "unknown data set 'nowhere'"),
        (["--jobs", "-1"], "--jobs -1"),
        (["--table-only", "--out", str(tmp_path / "empty")], "there are no runs in"),
    ):
        with pytest.raises(SystemExit):
            parse([*common, *wrong])
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "empty").exists()
    spaced, _ = parse([*common, "--methods", "fedtiny, fedavg, fedtiny", "--seeds", "5, 6"])
    assert (spaced.methods, spaced.preset.seeds) == (["fedtiny", "fedavg"], [5, 6])
    other = ["--no-tuning", "--set", "training.lr=.2", "--out", str(tmp_path / "other")]
    assert parse([*common, *other])[0].point == (("training.lr", 0.2),)


@pytest.mark.slow
def test_a_comparison_is_interrupted_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a run and between runs; what was finished is not run again."""
    preset = replace(PRESET, alphas=(None,), seeds=(0,))
    call = call_of(preset, ["fedtiny"], tmp_path)
    app, trained = client.app, []

    def stopping(message: Message, context: Context) -> Message:
        if message.metadata.group_id == "2":
            trained.append(message)
            if len(trained) == 3:  # in the second round of the second run of the tuning
                raise KeyboardInterrupt
        return app(message, context)

    monkeypatch.setattr(client, "app", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(call, here())
    done = tmp_path / "cells" / "tune-fedtiny-d0.2-a0.5-lr0.1-s1000" / SUMMARY
    begun = tmp_path / "cells" / "tune-fedtiny-d0.2-a0.5-lr0.3-s1000"
    stamp = done.stat().st_mtime_ns
    assert not (begun / SUMMARY).exists()
    monkeypatch.setattr(client, "app", app)
    found = compare(call, here())
    assert done.stat().st_mtime_ns == stamp
    assert {one.status for one in found.outcomes.values()} == {FINISHED}
    assert len(found.outcomes) == 2 + 1 + 1  # tuning, memory, table
    (cell,) = found.cells
    score = found.outcomes[cell.name].values
    assert 0 < score["client_seconds"] < score["seconds"]
    assert 5 * 10**7 < found.memory["fedtiny", 0.2] < 3 * 10**8  # no torch
    tuning = read_outcome(begun.name, tmp_path)
    shutil.rmtree(begun)
    (tmp_path / "outcomes" / f"{begun.name}.json").unlink()
    whole = attempt(CellJob(tuning_cells(preset, call.pairs)[1], SETTINGS), tmp_path)
    assert tuning is not None
    assert whole is not None
    assert tuning.values["test_loss"] == whole.values["test_loss"]  # the same bits
    again = compare(call, None)
    assert again.log == found.log
    assert again.outcomes.keys() == found.outcomes.keys()
    assert "## IID, density 0.2" in write_page(call, again)
