"""The command as a user meets it: real processes, exit codes, one clear line for an error."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from federation import TINY, digest, run_inline, tiny
from processes import Command

from fedprune.rounds.folder import (
    CHECKPOINT,
    CONFIG,
    SUMMARY,
    prepare,
    read_metrics,
    read_summary,
)
from sparsemodel.storage.checkpoint import load_sparse

FEDPRUNE = str(Path(sys.executable).parent / "fedprune")
OPTIONS = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]


def fedprune(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return Command("fedprune", *arguments, cwd=cwd).ended()


def test_run_twice_gives_two_folders_and_one_digest(finished: Path, tmp_path: Path) -> None:
    """A second run does not touch the first; both have the digest of the in-process run."""
    for _ in range(2):
        done = fedprune("run", "--engine", "inline", *OPTIONS, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "round   4/4" in done.stdout
    assert "report.html" in done.stdout
    folders = sorted((tmp_path / "runs").iterdir())
    names = [folder.name for folder in folders]
    assert names == ["digits-fedtiny-d0.2-s7", "digits-fedtiny-d0.2-s7-2"]
    assert [digest(folder) for folder in folders] == [digest(finished)] * 2
    for folder in folders:
        files = {p.name for p in folder.iterdir()}
        assert {"config.toml", "metrics.jsonl", "summary.json", "report.html"} <= files


def test_kill_at_random_moments_then_resume_gives_the_same_bits(tmp_path: Path) -> None:
    """kill -9, again and again, wherever it hits: the digest is that of an undisturbed run."""
    config = tiny(training__rounds=40)
    expected = digest(run_inline(config, tmp_path / "undisturbed"))
    out = tmp_path / "killed run"
    command = ["run", "--engine", "inline", *OPTIONS]
    command += ["--rounds", "40", "--out", str(out)]
    moments = random.Random(0)
    kills = 0
    while not (out / SUMMARY).exists():
        assert kills < 30
        resume = ["--resume"] if (out / "config.toml").exists() else []
        before = len(read_metrics(out))
        process = Command("fedprune", *command, *resume, cwd=tmp_path)
        # Let it come a little further than the last one, then strike at any moment.
        while process.is_running() and len(read_metrics(out)) <= before + 2:
            time.sleep(0.01)
        if kills < 4:
            time.sleep(moments.uniform(0.0, 0.3))
            process.send(signal.SIGKILL)
            kills += 1
        process.ended()
    assert kills >= 3  # a loaded machine may let it finish before the last one
    assert digest(out) == expected
    assert [line.get("round") for line in read_metrics(out)] == [None, *range(1, 41)]


def test_a_second_resume_does_not_take_a_folder_from_a_running_run(tmp_path: Path) -> None:
    """Before the first checkpoint, when the folder holds its configuration alone."""
    first = Command(
        *("fedprune", "run", "--engine", "inline", *OPTIONS, "--rounds", "1", "--out", "run"),
        *("--set", "server.pretrain_epochs=60"),
        cwd=tmp_path,
    )
    while not (tmp_path / "run" / CONFIG).exists():
        assert first.is_running()
        time.sleep(0.01)
    # Whoever comes second is refused, by a setting of its own or because the first is at work.
    for wrong in (["--seed", "8"], ["--clients", "5000"], ["--engine", "steam"]):
        second = fedprune(
            "run", "--engine", "inline", "--resume", "--out", "run", *wrong, cwd=tmp_path
        )
        assert second.returncode == 1, second.stdout
        assert (tmp_path / "run" / CONFIG).exists()
    assert first.ended().returncode == 0
    assert read_summary(tmp_path / "run")["rounds"] == 1


@pytest.mark.parametrize("engine", ["inline", "flower"])
def test_a_resume_that_cannot_go_on_leaves_the_folder(engine: str, tmp_path: Path) -> None:
    """The data cannot be read any more."""
    prepare(tmp_path / "run", tiny(data__dataset="no such set"), resume=False)
    done = fedprune("run", "--engine", engine, "--resume", "--out", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert "unknown data set 'no such set'" in done.stderr
    assert (tmp_path / "run" / CONFIG).exists()


def test_resume_compares_what_was_given_and_no_default(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    command = ["run", "--engine", "inline", "--resume", "--out", "run"]
    for given in ([], ["--rounds", "4"], ["--seed", "7", "--density", "0.2"]):
        done = fedprune(*command, *given, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "already complete" in done.stdout
    for given, difference in (
        (["--rounds", "9"], "training.rounds was 4, now 9"),
        (["--set", "training.lr=0.5"], "training.lr was 0.1, now 0.5"),
        (["--method", "fedprox"], "method.name was 'fedtiny', now 'fedprox'"),
        (["--set", 'method.settings={"pool_size": 3}'], "method.pool_size was 2, now 3"),
    ):
        done = fedprune(*command, *given, cwd=tmp_path)
        assert done.returncode == 1
        assert difference in done.stderr
        assert ("; " in done.stderr) == (given[0] == "--method")
        assert "data.clients" not in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.ray
def test_kill_leaves_nothing_at_work_and_no_temporary_files(tmp_path: Path) -> None:
    """kill -9 of the command in the middle of a run on Flower's engine, as a user installed it."""
    place = Path(tempfile.mkdtemp(prefix="t"))  # short: Ray's sockets lie deep below it
    marked = {**os.environ, "TMPDIR": str(place), "FEDPRUNE_TEST": str(tmp_path)}
    command = [FEDPRUNE, "run", *OPTIONS, "--rounds", "500", "--out", "run"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=marked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(read_metrics(tmp_path / "run")) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 15
    while at_work(f"FEDPRUNE_TEST={tmp_path}"):
        assert time.monotonic() < deadline, at_work(f"FEDPRUNE_TEST={tmp_path}")
        time.sleep(0.1)
    for lock in place.glob("fedprune-*/.lock"):  # as if some time had passed
        os.utime(lock, (0, 0))
    done = subprocess.run(
        [FEDPRUNE, "run", "--engine", "inline", "--dataset", "nope", "--out", "other"],
        cwd=tmp_path, env=marked, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert not list(place.glob("fedprune-*"))
    shutil.rmtree(place)


def at_work(mark: str) -> list[str]:
    """Command lines of the processes that have a setting in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if line]


@pytest.mark.ray
def test_flower_engine_gives_the_bits_of_inline(finished: Path, tmp_path: Path) -> None:
    """Through SuperLink, `flwr run` and Ray: same digest, same bytes, and nothing left running."""
    out = tmp_path / "flower run"
    done = fedprune("run", "--engine", "flower", *OPTIONS, "--out", str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert digest(out) == digest(finished)
    ours, theirs = read_summary(out), read_summary(finished)
    for key in ("bytes_up", "bytes_down", "test_accuracy", "train_flops_ratio"):
        assert ours[key] == theirs[key]


@pytest.mark.ray
def test_failure_inside_flower_is_reported_with_its_reason(tmp_path: Path) -> None:
    """`flwr run` itself exits 0 when the app raises; the command must not."""
    done = fedprune("run", "--dataset", "no such set", "--clients", "2", "--out", "r", cwd=tmp_path)
    assert done.returncode == 1
    assert "unknown data set 'no such set'" in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--method", "magic"], "known methods: fedavg"),
        (["run", "--model", "gpt"], "known models: resnet8"),
        (["run", "--engine", "steam"], "flower, inline"),
        (["run", "--density", "0"], "0 < density <= 1"),
        (["run", "--engine", "inline", "--dataset", "nope"], "known: digits"),
        (["run", "--engine", "inline", "--clients", "5000"], "5000 clients"),
        (["run", "--engine", "inline", "--density", "0.00001"], "lowest"),
        (["run", "--set", "training.rouns=3"], "did you mean 'training.rounds'"),
        (["run", "--set", "training"], "section.key=value"),
        (["run", "--set", "method.densty=0.1"], "did you mean 'method.density'"),
        (["run", "--set", "method.settings={"], "method.settings: expected a JSON object"),
        (["run", "--config", "none.toml"], "no config file at none.toml"),
        (["run", "--resume", "--out", "nothing"], "nothing to resume"),
        (["run", "--device", "tpu"], "cpu, cuda"),
        (["report", "nowhere"], "nowhere"),
        (["inspect", "nowhere.safetensors"], "nowhere.safetensors"),
        (["compare", "--methods", "fedavg,magic"], "unknown method 'magic'"),
    ],
)
def test_one_clear_line_and_exit_status(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = fedprune(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob(CHECKPOINT))


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    command = [FEDPRUNE, "run", "--method", "magic", "--debug"]  # as it is installed
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_density_for_a_dense_method_is_a_note_not_an_error(tmp_path: Path) -> None:
    settings = [f"{key}={value}" for key, value in TINY.items() if not key.startswith("method.")]
    done = fedprune(
        *("run", "--engine", "inline", "--method", "fedavg", "--density", "0.1", "--rounds", "1"),
        *(part for setting in settings for part in ("--set", setting)),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "note: --density has no effect: this method trains the dense network"
    ]
    summary = read_summary(tmp_path / "runs" / "digits-fedavg-d1-s7")
    assert (summary["density_target"], summary["density"]) == (1.0, 1.0)


def test_settings_of_another_method_are_refused_with_a_hint(tmp_path: Path) -> None:
    for arguments, message in (
        (("magnitude", "method.pool_size=2"), "'method.pool_size' of method 'magnitude'"),
        (("fedprox", "method.nu=1"), "of method 'fedprox'; did you mean 'method.mu'"),
        (("fedavg", "method.density=0.1"), "'method.density' of method 'fedavg'"),
    ):
        done = fedprune("run", "--method", arguments[0], "--set", arguments[1], cwd=tmp_path)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_config_file_and_options_over_it(tmp_path: Path) -> None:
    (tmp_path / "my run.toml").write_text(tiny(training__rounds=2).toml())
    done = fedprune(
        "run", "--engine", "inline", "--config", "my run.toml", "--seed", "9", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    summary = read_summary(tmp_path / "runs" / "digits-fedtiny-d0.2-s9")
    assert (summary["rounds"], summary["seed"]) == (2, 9)


def test_compare_prints_one_table_and_reuses_finished_runs(tmp_path: Path) -> None:
    arguments = ["compare", "--methods", "fedavg,magnitude", "--seeds", "0,1", *OPTIONS]
    arguments += ["--rounds", "1"]
    done = fedprune(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "±" in done.stdout
    again = fedprune(*arguments, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    summaries = json.loads(again.stdout.splitlines()[-1])
    assert [(s["method"], s["seed"]) for s in summaries] == [
        ("fedavg", 0),
        ("fedavg", 1),
        ("magnitude", 0),
        ("magnitude", 1),
    ]
    assert again.stdout.count("already complete") == 4


def test_inspect_and_report(finished: Path) -> None:
    done = fedprune("inspect", str(finished / "model.safetensors"), cwd=finished)
    assert done.returncode == 0, done.stderr
    assert digest(finished) in done.stdout
    assert "method: fedtiny" in done.stdout
    stored = load_sparse(finished / "model.safetensors")
    assert stored.mask is not None
    sums = [stored.state[name].abs().flatten(1).sum(1) for name in stored.mask]
    silent = sum(int((values == 0).sum()) for values in sums)
    assert f"silent outputs: {silent} of {sum(map(len, sums))}" in done.stdout
    done = fedprune("report", str(finished), cwd=finished)
    assert done.returncode == 0, done.stderr
    assert (finished / "report.html").exists()
