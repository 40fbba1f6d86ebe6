"""The simulation engine's own edges; whole runs through it are in test_cli.py."""

from __future__ import annotations

import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
import torch
from federation import digest, run_inline, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.config import RunConfig
from fedprune.flower.launch import launch_values
from fedprune.flower.simulation import _federation, gpu_share, run_flower, write_app
from fedprune.rounds.folder import prepare
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


@settings(max_examples=50, deadline=None)
@given(
    dataset=st.text(st.characters(exclude_categories=["Cs"])),
    rate=st.floats(0, exclude_min=True, allow_infinity=False),
    density=st.floats(0, 1, exclude_min=True),
)
def test_the_app_that_is_submitted_has_the_run_s_configuration(
    dataset: str, rate: float, density: float
) -> None:
    """Whatever stands in a path: quotes, control characters, letters beyond the first 65,536."""
    config = tiny(data__dataset=dataset, training__lr=rate, method__density=density)
    with tempfile.TemporaryDirectory() as temporary:
        out, setup = Path(temporary) / 'a "run"', Path(temporary) / "setup"
        app = write_app(Path(temporary) / "app", config, out, resume=True, setup=setup)
        project = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
    values = project["tool"]["flwr"]["app"]["config"]
    launch = {key: values.pop(key) for key in list(values) if key.startswith("run.")}
    assert launch == launch_values(out, resume=True, setup=setup)
    assert RunConfig.parse(values) == config
    assert project["tool"]["flwr"]["app"]["components"]["clientapp"] == "fedprune_client:app"
