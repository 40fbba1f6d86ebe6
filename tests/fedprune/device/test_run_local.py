"""Training on a device alone: same bits after a kill, under a budget, and loaded like a run's."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedprune
from fedprune.device.alone import LocalRun, run_local
from fedprune.device.local_run import CHECKPOINT, Checkpoint
from fedprune.device.networks import open_program, random_state
from prunelab.data.store import write_store
from prunelab.errors import DataError, ModelError, RunError
from prunelab.runs.folder import MODEL, SUMMARY
from sparsemodel.errors import SparseModelError
from sparsemodel.runtime.trainer import Trainer

COMMAND = [sys.executable, "-m", "fedprune", "device", "run-local"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures whose brightness tells their class."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 120)
    images = draw.integers(0, 60, (120, 3, 16, 16)) + 90 * labels[:, None, None, None]
    folder = tmp_path_factory.mktemp("data") / "store"
    write_store(
        folder, images.astype(np.uint8), labels, num_classes=3, name="shades",
        class_names=("dark", "grey", "light"),
    )  # fmt: skip
    return folder


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    settings = ["--model", "resnet8", "--density", "0.3", "--epochs", "6", "--home", str(out) + "-"]
    return [*COMMAND, "--data", str(data), "--out", str(out), *settings, *more]


def given(data: Path, **more: Any) -> dict[str, Any]:
    return {"data": str(data), "model": "resnet8", "density": 0.3, "epochs": 6, **more}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_killed_run_goes_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    """Killed with -9 after its first epoch; the summary has the kernel's word of the memory."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_local(given(data), whole)
    process = subprocess.Popen(arguments(data, killed), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (killed / CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / SUMMARY).exists()
    assert 1 <= len(Checkpoint.read(killed).epochs) < 6
    again = [*COMMAND, "--out", str(killed), "--resume", "--budget", "1GB"]
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert digest(killed / MODEL) == digest(whole / MODEL)
    summary = json.loads((killed / SUMMARY).read_text())
    assert summary["accuracy"] == json.loads((whole / SUMMARY).read_text())["accuracy"]
    assert not (killed / CHECKPOINT).exists()
    if sys.platform == "linux":
        assert summary["peak_rss_bytes"] < 70 * 10**6  # no torch, no Flower


def test_its_model_is_used_like_a_runs(data: Path, tmp_path: Path) -> None:
    run_local(given(data), tmp_path)
    trained = fedprune.load(tmp_path / MODEL)
    bright = np.random.default_rng(1).integers(180, 240, (1, 3, 16, 16)).astype(np.uint8)
    assert trained.class_names == ("dark", "grey", "light")
    assert trained.predict(bright).classes == ["light"]


def test_a_model_is_trained_on_from(data: Path, tmp_path: Path) -> None:
    """Its mask stays; the network's name comes from the file."""
    run_local(given(data, epochs=1), tmp_path / "first")
    start = tmp_path / "first" / MODEL
    summary = run_local({"data": str(data), "start": str(start), "epochs": 1}, tmp_path / "second")
    assert summary["model"] == "resnet8"
    before, after = (fedprune.load(tmp_path / run / MODEL).metadata for run in ("first", "second"))
    assert before["model"] == after["model"]
    with pytest.raises(ModelError, match="is of another network"):
        run_local({"data": str(data), "start": str(start), "model": "resnet20"}, tmp_path / "third")


def test_too_small_a_budget_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    """With the figure that it would need, which is then enough."""
    out = tmp_path / "small"
    done = subprocess.run(
        arguments(data, out, "--budget", "20MB"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert not done.stdout
    found = re.fullmatch(
        r"error: the budget of 20\.0 MB is too small: batches of 2 need ([\d.]+) MB, [\d.]+ MB of "
        r"them before training begins\n",
        done.stderr,
    )
    assert found, done.stderr
    enough = float(found[1]) + 0.4  # another process is not the same to the page
    done = subprocess.run(
        arguments(data, out, "--budget", f"{enough}MB"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.match(r"batches of [24], activations computed again: ", done.stdout)
    summary = json.loads((out / SUMMARY).read_text())
    assert summary["batch_size"] in {2, 4}
    if sys.platform == "linux":
        assert summary["peak_rss_bytes"] <= enough * 10**6


def test_nothing_is_overwritten(data: Path, tmp_path: Path) -> None:
    run_local(given(data, epochs=1), tmp_path / "run")
    before = digest(tmp_path / "run" / MODEL)
    for resume in (False, True):
        with pytest.raises(RunError, match="is complete"):
            run_local(given(data), tmp_path / "run", resume=resume)
    assert digest(tmp_path / "run" / MODEL) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(RunError, match="not empty and holds no run"):
        run_local(given(data), tmp_path / "other")
    with pytest.raises(RunError, match="nothing to resume"):
        run_local({}, tmp_path / "nowhere", resume=True)


def test_a_checkpoint_is_gone_on_from_with_its_own_settings_alone(
    data: Path, tmp_path: Path
) -> None:
    state = random_state(open_program("resnet8"), density=0.3, seed=0)
    Checkpoint(LocalRun(**given(data)), "other data", 16, state, {}, []).write(tmp_path)
    with pytest.raises(RunError, match="continue it with --resume"):
        run_local(given(data), tmp_path)
    with pytest.raises(RunError, match=r"other settings: epochs was 6, now 9"):
        run_local({"epochs": 9}, tmp_path, resume=True)
    with pytest.raises(DataError, match="has changed since the run began"):
        run_local({}, tmp_path, resume=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_training_that_diverges_is_told(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"diverged; is --lr 1e\+30 too high"):
        run_local(given(data, lr=1e30), tmp_path)


def test_momentum_that_was_loaded_goes_on_as_if_it_had_been_gathered() -> None:
    program = open_program("resnet8")
    state = random_state(program, density=0.3, seed=0)
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32)
    labels = np.arange(4)
    one = Trainer(program, state, batch_size=4)
    assert one.momentum() == {}
    one.step(images, labels, lr=0.1, momentum=0.9)
    two = Trainer(program, one.state(), batch_size=4)
    two.load_momentum(one.momentum())
    for trainer in (one, two):
        trainer.step(images, labels, lr=0.1, momentum=0.9)
    for name, values in one.state().values.items():
        np.testing.assert_array_equal(values, two.state().values[name])
    with pytest.raises(SparseModelError, match="lacks"):
        two.load_momentum({})
