"""What engines have in common, and stopping one that trains clients together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import digest, tiny

from fedprune.errors import ConfigError
from fedprune.flower import batched
from fedprune.rounds import run as runner
from fedprune.rounds.folder import read_metrics


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("engine", runner.ENGINES)
def test_cuda_without_a_gpu_is_refused_before_anything_starts(engine: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch finds no CUDA device; use 'cpu'"):
        runner.run(tiny(training__device="cuda"), tmp_path / "run", engine=engine)
    assert not (tmp_path / "run").exists()


def test_a_stopped_batched_run_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(training__execution="masked")
    runner.run(config, tmp_path / "whole", engine="batched")
    train, calls = batched.train_in_cohorts, 0

    def stopped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return train(*arguments, **named)

    monkeypatch.setattr(batched, "train_in_cohorts", stopped)
    with pytest.raises(KeyboardInterrupt):
        runner.run(config, tmp_path / "stopped", engine="batched")
    assert len(read_metrics(tmp_path / "stopped")) == 3  # the start and two rounds
    runner.run(config, tmp_path / "stopped", engine="batched", resume=True)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")


def test_a_client_whose_answer_cannot_be_sent_is_left_out_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that were trained together answer each for itself."""
    train = batched.train_in_cohorts

    def diverged(*arguments: Any, **named: Any) -> Any:
        (first, *rest), size = train(*arguments, **named)
        return [replace(first, fields={"loss": float("nan")}), *rest], size

    monkeypatch.setattr(batched, "train_in_cohorts", diverged)
    config = tiny(training__execution="masked", training__rounds=1)
    runner.run(config, tmp_path / "run", engine="batched")
    _, line = read_metrics(tmp_path / "run")
    assert line["clients"] == [1, 2, 3]
    assert [entry["client"] for entry in line["skipped"]] == [0]
    assert "training has diverged" in line["skipped"][0]["reason"]
