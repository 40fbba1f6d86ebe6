"""The benchmark of whole rounds trains on both sides and tells rounds apart; nothing is timed."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_simulation, timing
from benchmarks.gpu_simulation import plain_rounds, rows, ways_of, write_images
from benchmarks.rows import Row
from fedprune.config import RunConfig
from fedprune.rounds.workspace import open_workspace
from prunelab.data.datasets import load_dataset


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    write_images(tmp_path, num_train=120, num_test=20)
    return RunConfig.parse(
        {
            "data.dataset": str(tmp_path),
            "data.clients": 2,
            "model.name": "resnet8",
            "model.width": 4,
            "training.rounds": 3,
            "training.local_epochs": 1,
            "method.pool_size": 1,
            "server.pretrain_epochs": 0,
            "server.per_class": 2,
        }
    )


def test_every_way_has_a_row_beside_the_plain_loop(config: RunConfig) -> None:
    ways = ways_of(["inline", "batched"], [0, 1], device="cpu")
    found = list(rows(config, ways, repeats=1))
    names = ["inline", "inline masked", "batched auto", "batched 1"]
    assert [row.case.rpartition(", ")[2] for row in found] == names
    assert all(row.ours > 0 and row.peer > 0 and row.unit == "s" for row in found)
    assert len({row.peer for row in found}) == 1


def test_the_plain_loop_learns(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rounds go on from each other: after some it tells the patterns apart."""
    accuracies: list[float] = []
    measured = gpu_simulation._accuracy

    def noted(*arguments: torch.Tensor) -> float:
        accuracies.append(measured(*arguments))  # type: ignore[arg-type]
        return accuracies[-1]

    monkeypatch.setattr(gpu_simulation, "_accuracy", noted)
    steps = {"rounds": 6, "batch_size": 8, "local_epochs": 3, "lr": 0.02}  # a steady climb
    training = dataclasses.replace(config.training, **steps)  # type: ignore[arg-type]
    work = open_workspace(dataclasses.replace(config, training=training))
    assert len(plain_rounds(work)) == len(accuracies) == 6
    assert accuracies[-1] > 0.5


def test_drawn_images_are_read_as_a_data_set(tmp_path: Path) -> None:
    write_images(tmp_path, num_train=30, num_test=10)
    data = load_dataset(str(tmp_path))
    assert data.input_shape == (3, 32, 32)
    assert data.train_labels.bincount().tolist() == [3] * 10
    same, other = data.train_images[0].float(), data.train_images[1].float()
    assert (same - data.test_images[0]).abs().mean() < (other - data.test_images[0]).abs().mean()


def test_lines_are_dated_when_they_appear(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with gpu_simulation._Watch(path) as watch:
        for gap in (0.0, 0.1, 0.1):
            time.sleep(gap)
            with path.open("a") as file:
                file.write("{}\n")
    first, second, third = watch.times
    assert first < second < third


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the command sets, and this takes back
    monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cuda"])
    with pytest.raises(SystemExit, match="torch finds no CUDA device"):
        gpu_simulation.main()


def test_images_are_drawn_and_native_kernels_not_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[RunConfig, int]] = []

    def noted(config: RunConfig, ways: list[gpu_simulation.Way], *, repeats: int) -> list[Row]:
        assert (Path(config.data.dataset) / "train.parquet").is_file()
        seen.append((config, repeats))
        return []

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(timing.cpu, "isa", lambda: None)
    monkeypatch.setattr(gpu_simulation, "rows", noted)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--rounds", "2", "--json"])
    gpu_simulation.main()
    ((config, repeats),) = seen
    assert (config.training.rounds, config.data.clients, repeats) == (2, 4, 1)
    assert "no native kernels" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no native kernels in this environment"):
        timing.machine()
