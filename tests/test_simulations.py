"""The experiment runner: its grid, its tables, and a small grid run twice for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import FORKS

from fedprune import RunConfig
from fedprune.methods import METHODS as KNOWN_METHODS
from simulations import federated_table
from simulations.federated_table import (
    METHODS,
    Cell,
    Experiment,
    cells,
    differences,
    run_grid,
    table,
)
from simulations.fedtiny_cifar10 import EXPERIMENT as CIFAR10
from simulations.fedtiny_fashion import EXPERIMENT as FASHION

SETTINGS = {
    "data.dataset": "digits",
    "data.num_train": 300,
    "data.num_test": 60,
    "data.clients": 3,
    "model.width": 4,
    "training.rounds": 2,
    "training.local_epochs": 1,
}


def summary(accuracy: float) -> dict[str, Any]:
    return {
        "test_accuracy": accuracy,
        "bytes_up_steady_round": 1000,
        "bytes_dense_round": 10_000,
        "train_flops_ratio": 0.125,
    }


def test_every_preset_is_a_valid_configuration() -> None:
    for experiment in (CIFAR10, FASHION):
        assert set(experiment.methods) <= set(KNOWN_METHODS)
        for preset in experiment.presets.values():
            device = {"training.device": "cpu"}
            assert RunConfig.parse({**preset, **device}).training.rounds >= 20


def test_grid_runs_the_dense_network_once_a_seed() -> None:
    """Three densities × five methods and one dense network: 16 cells a seed."""
    grid = cells(CIFAR10, [0, 1])
    assert len(grid) == 32
    assert len({cell.folder for cell in grid}) == 32
    assert sum(cell.method == "fedavg" for cell in grid) == 2
    assert [cell.seed for cell in grid] == [0] * 16 + [1] * 16


def test_tables_by_hand() -> None:
    """Accuracies 30, 34, 32: mean 32.0, s = 2.0. Pairs 30−29, 34−30, 32−31: mean +2.0, s = 1.7."""
    ours = {Cell("fedtiny", 0.1, k): summary(a) for k, a in enumerate((0.30, 0.34, 0.32))}
    theirs = {Cell("magnitude", 0.1, k): summary(a) for k, a in enumerate((0.29, 0.30, 0.31))}
    experiment = Experiment("x", "x", {}, methods=METHODS)
    text = table(experiment, {**ours, **theirs})
    assert "| 0.1 | fedtiny | 32.0 ± 2.0 | 3 | 1.00 kB | 10.0 % | 0.125 |" in text
    assert "| 0.1 | magnitude | 30.0 ± 1.0 | 3 |" in text
    assert "| 0.1 | magnitude | +2.0 ± 1.7 | 3 of 3 |" in differences({**ours, **theirs})


@pytest.mark.slow
def test_a_grid_is_resumable_cell_by_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time in a process of its own; the second, where nothing is left, in a fork."""
    grid = [Cell("magnitude", 0.2, 0), Cell("fedavg", 1.0, 0)]
    first = run_grid(grid, SETTINGS, tmp_path, jobs=1)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("summary.json")}
    assert len(stamps) == 2
    monkeypatch.setattr(federated_table, "get_context", lambda _: FORKS)
    assert run_grid(grid, SETTINGS, tmp_path, jobs=1) == first
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
