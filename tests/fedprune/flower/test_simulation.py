"""The simulation engine's own edges; whole runs through it are in test_cli.py."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from federation import digest, run_inline, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.config import RunConfig
from fedprune.flower.inline import run_inline as run_inline_engine
from fedprune.flower.launch import launch_values
from fedprune.flower.simulation import (
    _federation,
    _trouble,
    gpu_share,
    private_environment,
    run_flower,
    write_app,
)
from fedprune.rounds.folder import prepare
from prunelab.errors import RunError
from prunelab.runs.temporary import temporary_folder


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
    # Of what is lost on the way up, clients keep something from one round to the next.
    config = tiny(training__rounds=2, federation__uplink_dtype="int8", federation__uplink_topk=0.3)
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


def no_flower(*_: object) -> None:
    raise AssertionError("Flower was started")


@pytest.fixture
def before_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be refused is refused before Flower starts."""
    monkeypatch.setattr("subprocess.Popen", no_flower)


@pytest.mark.usefixtures("before_flower")
def test_more_threads_than_processors_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower says half a minute later: ActorPool is empty. Check num_cpus."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    message = r"training.threads is 3 and .* has 2 processors, .* use --set training.threads=2"
    with pytest.raises(RunError, match=message):
        run_flower(tiny(training__threads=3), tmp_path, resume=False, progress=lambda: None)


@pytest.mark.usefixtures("before_flower")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Ray does not look at TMPDIR")
def test_a_temporary_folder_too_deep_for_sockets_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower says: RuntimeError: An error was encountered. Ending simulation."""
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(RunError, match=r"no room in TMPDIR, .*letters, at most 39; set TMPDIR"):
        run_flower(tiny(), tmp_path, resume=False, progress=lambda: None)


@pytest.mark.parametrize("engine", [run_flower, run_inline_engine])
@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_temporary_folder_that_cannot_be_written_is_one_clear_line(
    engine: Callable[..., None], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would take another one without a word, and Flower fail without a reason."""
    (tmp_path / "a file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / kind))
    with pytest.raises(RunError, match=f"cannot be written to .*{kind} .*set TMPDIR to a folder"):
        engine(tiny(), tmp_path / "run", resume=False, progress=lambda: None)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ([], "the processes of a Flower run talk over 127.0.0.1, which does not answer"),
        (["mount", "-t", "tmpfs", "-o", "ro", "none", "{folder}"], "(Read-only file system)"),
    ],
    ids=["loopback down", "read-only TMPDIR"],
)
def test_a_machine_that_cannot_run_flower_is_told_so_at_once(
    where: list[str], message: str, tmp_path: Path
) -> None:
    """In namespaces of its own, where the loopback interface is down."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    inside = " && ".join(
        shlex.join(command)
        for command in (
            *([[word.format(folder=folder) for word in where]] if where else []),
            [sys.executable, "-m", "fedprune", "run", "--engine", "flower", "--out", "r"],
        )
    )
    alone = ["unshare", "--map-root-user", "--net" if not where else "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("needs unshare")
    done = subprocess.run(
        [*alone, "sh", "-c", inside],
        cwd=tmp_path,
        env={**os.environ, **({"TMPDIR": str(folder)} if where else {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not (tmp_path / "r").exists()


def test_processes_of_a_run_agree_on_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative TMPDIR is another folder in each of theirs: Ray waited for itself, in vain."""
    monkeypatch.setenv("TMPDIR", "tmp")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    with temporary_folder() as home:
        environment = private_environment(home, commands=tmp_path)
    assert environment["TMPDIR"] == str(tmp_path / "tmp")
    assert not list((tmp_path / "tmp").iterdir())


def test_the_first_error_of_a_chain_is_the_reason(tmp_path: Path) -> None:
    """As Ray and Flower leave them in a log."""
    (tmp_path / "log").write_text(
        "INFO: Starting\nTraceback (most recent call last):\n    raise OSError(\n"
        "OSError: AF_UNIX path length cannot exceed 107 bytes\n\nThe above exception was the "
        "direct cause\n\nRuntimeError: Simulation Runtime crashed.\nNo Error here\n"
    )
    trouble = _trouble("Flower reports failed", tmp_path / "log")
    assert str(trouble).startswith(
        "Flower reports failed: OSError: AF_UNIX path length cannot exceed 107 bytes (--debug"
    )
    assert len(str(trouble).splitlines()) == 1
    assert "Simulation Runtime crashed" in str(trouble.__cause__)
    assert "its log is empty" in str(_trouble("x", tmp_path / "none"))


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
        app = write_app(
            Path(temporary) / "app", config, launch_values(out, resume=True, setup=setup)
        )
        project = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
    values = project["tool"]["flwr"]["app"]["config"]
    launch = {key: values.pop(key) for key in list(values) if key.startswith("run.")}
    assert launch == launch_values(out, resume=True, setup=setup)
    assert RunConfig.parse(values) == config
    assert project["tool"]["flwr"]["app"]["components"]["clientapp"] == "fedprune_client:app"
