"""`fedprune new`: an app with an own network, data set and method, the same bits everywhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import Command

from benchmarks.deployment import submit, supernode
from fedprune.config import RunConfig, read_toml
from fedprune.errors import ConfigError
from fedprune.flower import app as flower_app
from fedprune.flower import new, simulation
from fedprune.flower.new import new_app
from fedprune.rounds.folder import read_metrics, read_model, read_summary
from prunelab.runs.temporary import temporary_folder

CLIENTS = 2
ROUNDS = "training.rounds=2"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_app(tmp_path_factory.mktemp("apps") / "our_App")


@pytest.fixture(scope="module")
def inline(app: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app in one process, by the command and the app's own settings."""
    out = tmp_path_factory.mktemp("inline") / "run"
    arguments = ["run", "--config", "pyproject.toml", "--engine", "inline", "--set", ROUNDS]
    done = Command(
        "fedprune", *arguments, "--clients", str(CLIENTS), "--out", str(out), cwd=app
    ).ended()
    assert done.returncode == 0, done.stderr
    return out


def test_the_folder_has_the_names_of_the_app(app: Path) -> None:
    assert app.name == "our-App"
    files = {str(file.relative_to(app)) for file in app.rglob("*") if file.is_file()}
    modules = ("__init__", "client_app", "server_app", "model", "data", "method")
    package = {f"our_app/{name}.py" for name in modules}
    assert files == package | {".gitignore", "LICENSE", "README.md", "pyproject.toml", "run.py"}
    for name in files:
        text = (app / name).read_text(encoding="utf-8")
        assert "my_app" not in text
        assert "my-app" not in text
    project = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == "our-App"
    assert project["tool"]["flwr"]["app"]["components"]["clientapp"] == "our_app.client_app:app"


def test_what_python_run_py_says(app: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(app, tmp_path / "our-App")
    settings = copy / "pyproject.toml"
    settings.write_text(settings.read_text().replace("rounds = ", "rounds = 1 # "))
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "of test samples right with 20% of the weights\nreport: runs/" in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("3d", "'3d' is no name for an app"),
        ("a" * 33, "at most 32"),
        ("naïve", "letters, digits and hyphens"),
        ("json", "Python has a module 'json' already"),
        ("torch.nn", ""),  # the package torch_nn
        ("class", "'class': Python has a module"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name: str, message: str, tmp_path: Path) -> None:
    if not message:
        assert (new_app(tmp_path / name) / "torch_nn" / "model.py").exists()
        return
    with pytest.raises(ConfigError, match=message):
        new_app(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    done = Command("fedprune", "new", "taken", cwd=tmp_path).ended()
    assert (done.returncode, done.stderr) == (
        1, "error: taken exists already; give another name, or move it away\n",
    )  # fmt: skip
    assert not list((tmp_path / "taken").iterdir())
    done = Command("fedprune", "new", "my_app", cwd=tmp_path, columns=80).ended()
    assert done.stdout.startswith("made my-app; edit my_app/ in it")
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("origin", "requirement"),
    [
        (None, "fedprune[sim]>=0.1"),
        ({"url": "file:///src/fed%20prune", "dir_info": {}}, "file:///src/fed%20prune"),
        (
            {"url": "https://x.org/f.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "git+https://x.org/f.git@abc",
        ),
    ],
)
def test_a_bundle_asks_for_the_fedprune_that_made_it(
    origin: Any, requirement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pip notes where an installation came from."""

    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if origin is None else json.dumps(origin)

    monkeypatch.setattr(new, "distribution", lambda name: Installed())
    wanted = requirement if origin is None else f"fedprune[sim] @ {requirement}"
    assert new.requirement() == wanted


@pytest.mark.parametrize("kind", ["own", "ours"])
def test_flower_builds_a_bundle_of_version_1(kind: str, app: Path, tmp_path: Path) -> None:
    """With the licence, the settings and every module in it, and fedprune to be installed."""
    source = app if kind == "own" else Path(flower_app.__file__).parent
    copy = shutil.copytree(source, tmp_path / "an-app")
    (copy / "runs").mkdir()
    (copy / "runs" / "summary.json").touch()
    done = subprocess.run(
        ["flwr", "build"], cwd=copy, env=quiet(), capture_output=True, text=True, check=False
    )
    (bundle,) = copy.glob("*.fab")
    assert "Successfully built" in done.stdout, done.stderr
    with zipfile.ZipFile(bundle) as opened:
        names = set(opened.namelist())
        project = tomllib.loads(opened.read("pyproject.toml").decode())
    assert project["tool"]["flwr"]["app"]["fab-format-version"] == 1
    assert any(entry.startswith("fedprune[sim]") for entry in project["project"]["dependencies"])
    modules = {f"our_app/{file.name}" for file in (app / "our_app").glob("*.py")}
    wanted = modules if kind == "own" else {"fedprune_client.py", "fedprune_server.py"}
    assert {"LICENSE", *wanted} <= names
    if kind == "own":
        assert not [name for name in names if name.startswith("runs")]


def quiet() -> dict[str, str]:
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": commands, "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1"}  # fmt: skip


def test_the_settings_of_an_app_are_those_of_a_run(app: Path) -> None:
    """What says where a run is written is left to each run."""
    values = read_toml(app / "pyproject.toml")
    assert not [key for key in values if key.startswith(("run.", "project", "tool"))]
    assert values["data.clients"] == 0
    with pytest.raises(ConfigError, match=r"data.clients: expected at least 1, got 0"):
        RunConfig.parse({"data.clients": 0})


@contextmanager
def federation(*flags: str, nodes: int = 0) -> Iterator[tuple[Path, dict[str, str]]]:
    """A SuperLink called "own", and SuperNodes."""
    with temporary_folder() as temporary, ExitStack() as stack:
        home = temporary / "h"
        home.mkdir()
        port = simulation.free_port()
        environment = simulation.private_environment(home, commands=simulation.commands(home))
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\n'
            "insecure = true\n"
        )
        stack.enter_context(simulation.superlink(home, port, environment, *flags))
        for client in range(nodes):
            stack.enter_context(supernode(home, port, environment, client=client))
        yield home, environment


def assert_same(run: Path, other: Path) -> None:
    """The same bits of the model, and the same figures of every round."""
    assert model_digest(run) == model_digest(other)
    ours, theirs = read_summary(run), read_summary(other)
    for key in ("test_accuracy", "density", "train_flops_ratio", "dataset", "model", "method"):
        assert ours[key] == theirs[key]
    for mine, others in zip(read_metrics(run), read_metrics(other), strict=True):
        shared = mine.keys() - {"bytes_down"}  # messages say how many clients there are
        assert {k: mine[k] for k in shared} == {k: others[k] for k in shared}
    settings = read_toml(run / "config.toml")
    assert settings == read_toml(other / "config.toml")
    assert settings["data.clients"] == CLIENTS


def model_digest(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.ray
@pytest.mark.slow
def test_simulation_gives_the_bits_of_inline(app: Path, inline: Path, tmp_path: Path) -> None:
    """`flwr run` of the folder: its modules reach Ray's workers in the bundle alone."""
    out = tmp_path / "run"
    with federation("--simulation") as (home, environment):
        nodes = f"num-supernodes={CLIENTS}"
        submit(
            [str(app), "own", "--federation-config", nodes, "--run-config",
             f'run.out="{out}" {ROUNDS}'],
            environment, home,
        )  # fmt: skip
    assert_same(out, inline)
    assert read_model(out)[0].patterns is not None


@pytest.mark.slow
def test_two_supernodes_give_the_bits_of_inline(app: Path, inline: Path, tmp_path: Path) -> None:
    """The same folder on a SuperLink; as many clients as have come."""
    out = tmp_path / "run"
    with federation(nodes=CLIENTS) as (home, environment):
        submit([str(app), "own", "--run-config", f'run.out="{out}" {ROUNDS}'], environment, home)
    assert_same(out, inline)
