"""The engines' own edges; whole runs through them are in test_run.py and test_cli.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import digest, run_inline, tiny
from fedprune.flower.engine import _federation, gpu_share, run_flower

from fedprune.errors import ConfigError
from fedprune.flower import client
from fedprune.rounds import run as runner
from fedprune.rounds.folder import prepare, read_metrics
from prunelab.errors import RunError


@pytest.fixture
def spaced_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This environment under a path with a space, as if it had been made there."""
    link = tmp_path / "my env"
    link.symlink_to(sys.prefix, target_is_directory=True)
    executable = link / Path(sys.executable).relative_to(sys.prefix)
    monkeypatch.setattr(sys, "executable", str(executable))
    monkeypatch.setattr(sys, "prefix", str(link))
    return link


@pytest.mark.ray
def test_interpreter_path_with_a_space(spaced_environment: Path, tmp_path: Path) -> None:
    """Ray does not quote it: "bash: /opt/my: No such file or directory", and a run that hangs."""
    config = tiny(training__rounds=1)
    prepare(tmp_path / "run", config, resume=False)
    run_flower(config, tmp_path / "run", resume=False, progress=lambda: None)
    assert digest(tmp_path / "run") == digest(run_inline(config, tmp_path / "inline"))


def test_no_path_without_a_space_is_refused_not_hung(
    spaced_environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(spaced_environment.parent / "a b"))
    (tmp_path / "a b").mkdir()
    with pytest.raises(RunError, match="set TMPDIR"):
        run_flower(tiny(), tmp_path, resume=False, progress=lambda: None)


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 8])
def test_parallel_clients_really_fit_on_the_gpus(num_gpus: int) -> None:
    """Flower starts int(GPUs / share) clients; Ray puts int(1 / share) of them on each GPU."""
    for parallel in range(1, 129):
        units = round(gpu_share(parallel, num_gpus=num_gpus) * 10_000)  # what Ray makes of it
        placed = num_gpus * (10_000 // units)
        assert placed >= parallel  # as many as asked for run at once
        assert num_gpus * (10_000 // (units + 1)) < parallel  # with no larger share
        assert num_gpus * 10_000 // units == placed  # nobody is started who has no place


def test_a_share_of_a_gpu_is_asked_for_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (_, on_cpu), (_, on_cuda) = (
        _federation(tiny(data__clients=9, training__device=device)) for device in ("cpu", "cuda")
    )
    assert on_cpu == "num-supernodes=9 client-resources-num-cpus=1"
    assert on_cuda == f"{on_cpu} client-resources-num-gpus=0.1666"


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
    train, calls = client.train_in_cohorts, 0

    def stopped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return train(*arguments, **named)

    monkeypatch.setattr(client, "train_in_cohorts", stopped)
    with pytest.raises(KeyboardInterrupt):
        runner.run(config, tmp_path / "stopped", engine="batched")
    assert len(read_metrics(tmp_path / "stopped")) == 3  # the start and two rounds
    runner.run(config, tmp_path / "stopped", engine="batched", resume=True)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")
