"""A real federation on loopback: TLS, node keys, four nodes with data of their own."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from federation import digest, tiny
from flwr.app import Context, RecordDict
from long import FACTOR
from PIL import Image
from processes import Command
from sklearn.datasets import load_digits

from fedprune.device.home import PUBLIC, Profile, make_home
from fedprune.fleet import nodes as registry
from fedprune.fleet.certificates import AUTHORITY
from fedprune.fleet.local import Fleet, fleet_up, node_command
from fedprune.fleet.processes import flower_environment
from fedprune.fleet.server import init
from fedprune.fleet.submit import count_nodes
from fedprune.fleet.superlink import gate
from fedprune.flower import client, server
from fedprune.flower.inline import InlineGrid
from fedprune.flower.launch import launch_values
from fedprune.local.private import REFUSAL
from fedprune.rounds.folder import prepare, read_metrics
from prunelab.data.own_store import write_own_store
from prunelab.errors import RunError

CLIENTS = 4
CONFIG = tiny(
    training__rounds=3, method__adjust_until=2, federation__timeout=60.0, server__pretrain_epochs=1
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in four parts that have no sample in common, one as class folders, three as stores."""
    root, digits = tmp_path_factory.mktemp("parts"), load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = root / f"part{number % CLIENTS}" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((15 * image).astype(np.uint8)).save(folder / f"{number}.png")
    for number in range(1, CLIENTS):
        folder = root / f"part{number}"
        write_own_store(str(folder), root / f"store{number}")
        shutil.rmtree(folder)
    return root


@pytest.fixture(scope="module")
def expected(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model that the inline engine makes of the same parts."""
    root = tmp_path_factory.mktemp("inline")
    out = root / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(root))
        prepare(out, CONFIG, resume=False)
        values = {**CONFIG.flower(), **launch_values(out, resume=False, setup=out)}
        del values["run.setup"]
        nodes = InlineGrid(client.app, run_config=values, num_nodes=CLIENTS)
        for number in range(CLIENTS):
            own = nodes.contexts[1000 + number].node_config
            own["data-path"] = str(sorted(parts.iterdir())[number])
        server.app(
            nodes,
            Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=values),
        )
    assert not any(line.get("skipped") for line in read_metrics(out))
    return digest(out)


@pytest.fixture(scope="module")
def fleet(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    root = tmp_path_factory.mktemp("fleet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(root / "flower"))
        with fleet_up(root, data=parts, name="loopback") as running:
            yield running


def runs_of(fleet: Fleet) -> list[dict[str, str]]:
    """What `flwr list` shows, the latest first."""
    environment = flower_environment(fleet.server.state)
    runs: list[dict[str, str]] = registry.flwr(["list", fleet.server.name], environment)["runs"]
    return runs


def submitted(fleet: Fleet, folder: Path) -> Command:
    """The command that submits a run and follows it, once Flower has the run."""
    before, settings = len(runs_of(fleet)), folder.with_suffix(".toml")
    settings.write_text(CONFIG.toml(), encoding="utf-8")
    command = Command(
        "fedprune", "run", "--config", str(settings), "--superlink", fleet.server.name,
        "--out", str(folder), cwd=folder.parent,
    )  # fmt: skip
    while len(runs_of(fleet)) == before:
        assert command.is_running()
    return command


@pytest.mark.slow
def test_a_submitted_run_has_the_bits_of_inline_though_its_superlink_was_killed(
    fleet: Fleet, expected: str, tmp_path: Path
) -> None:
    name = fleet.server.name
    assert count_nodes(name) == CLIENTS
    command = submitted(fleet, tmp_path / "run")
    time.sleep(random.Random(3).uniform(0, 8))
    fleet.superlink.kill()
    fleet.restart_superlink()
    done = command.ended()
    assert done.returncode == 0, done.stderr
    assert "it is submitted again" in done.stdout
    assert f"round   3/{CONFIG.training.rounds}" in done.stdout
    assert (tmp_path / "run" / "report.html").exists()
    assert not any(line.get("skipped") for line in read_metrics(tmp_path / "run"))
    assert digest(tmp_path / "run") == expected
    latest, first = runs_of(fleet)[:2]
    assert latest["status"] == "finished:completed"
    assert first["status"] in {"finished:stopped", "finished:failed"}
    assert latest["run-id"] in done.stdout
    log = ["flwr", "log", latest["run-id"], name, "--show"]
    environment = flower_environment(fleet.server.state)
    shown = subprocess.run(log, env=environment, capture_output=True, text=True, check=True)
    assert "report:" in shown.stdout


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_not_submitted_again(fleet: Fleet, tmp_path: Path) -> None:
    """Its samples are not what the nodes' are."""
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            picture = Image.fromarray(np.full((8, 8), number, np.uint8))
            picture.save(tmp_path / "pictures" / name / f"{number}.png")
    done = Command(
        "fedprune", "run", "--superlink", fleet.server.name, "--out", str(tmp_path / "run"),
        "--dataset", str(tmp_path / "pictures"), "--rounds", "2", cwd=tmp_path,
    ).ended()  # fmt: skip
    assert done.returncode == 1
    assert f"error: none of {CLIENTS} nodes answered" in done.stderr
    assert REFUSAL in done.stderr
    assert "submitted again" not in done.stdout


@pytest.mark.slow
def test_who_may_not_join_is_told_so(fleet: Fleet, tmp_path: Path) -> None:
    stranger, revoked = tmp_path / "stranger", tmp_path / "revoked"
    for home in (stranger, revoked):
        make_home(home, Profile(client=0))
    registry.register(fleet.server, revoked / PUBLIC, name="revoked")
    registry.revoke(fleet.server, str(revoked / PUBLIC))
    other = init(tmp_path / "other", name="other", port=9)
    # As from another machine.
    outside = replace(fleet.server, hosts=("localhost",), port=fleet.server.port - 1)
    through = gate(outside)
    through.start()
    make_home(tmp_path / "deceived", Profile(client=0))
    joining = {
        "stranger": [
            f"127.0.0.1:{outside.port}" if part == outside.local_address else part
            for part in node_command(fleet.server, stranger)
        ],
        "revoked": node_command(fleet.server, revoked),
        "deceived": [
            str(other.authority) if part.endswith(AUTHORITY) else part
            for part in node_command(fleet.server, tmp_path / "deceived")
        ],
    }
    running = {
        who: subprocess.Popen(
            command,
            env=flower_environment(tmp_path / f"{who}-state"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for who, command in joining.items()
    }
    told = {}
    for who, process in running.items():
        _, printed = process.communicate(timeout=100)
        assert process.returncode == 1, who
        told[who] = printed.splitlines()[-1]
    through.end()
    assert f"127.0.0.1:{outside.port} " in told["stranger"]
    assert "register" in told["stranger"]
    assert "register" in told["revoked"]
    assert "certificate" in told["deceived"]
    states = {node.name: node.status for node in registry.nodes(fleet.server)}
    assert states["revoked"] == "revoked"
    with pytest.raises(RunError, match="revoked for good"):
        registry.register(fleet.server, revoked / PUBLIC)
    make_home(tmp_path / "anew", Profile(client=0))
    number = registry.register(fleet.server, tmp_path / "anew" / PUBLIC, name="revoked")
    assert registry.revoke(fleet.server, "revoked") == number  # not the one before of that name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(min(FACTOR, 5)))
def test_what_is_killed_at_random_leaves_a_finished_run(
    fleet: Fleet, expected: str, tmp_path: Path, seed: int
) -> None:
    """And the same bits, where no reply was lost."""
    draw = random.Random(seed)
    victims = draw.sample(range(CLIENTS), 2)
    kills = sorted((draw.uniform(0, 20), victim) for victim in (-1, *victims))
    command, began = submitted(fleet, tmp_path / "run"), time.monotonic()
    for moment, victim in kills:
        while command.is_running() and time.monotonic() < began + moment:
            time.sleep(0.1)
        if victim < 0:
            fleet.superlink.kill()
            fleet.restart_superlink()
        else:
            fleet.nodes[victim].kept.kill()
            fleet.nodes[victim].kept.start()
    done = command.ended(timeout=1200)
    assert done.returncode == 0, done.stderr
    if not any(line.get("skipped") for line in read_metrics(tmp_path / "run")):
        assert digest(tmp_path / "run") == expected
    fleet.await_nodes(seconds=200)


@pytest.mark.slow
def test_a_killed_command_leaves_no_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fedprune.fleet.local import fleet_up\n"
        "with fleet_up(Path(sys.argv[1]), nodes=1, name='short') as fleet:\n"
        "    print('up', flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "FLWR_HOME": str(tmp_path / "flower")}
    command = [sys.executable, "-c", code, str(tmp_path / "short-lived")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert len(_naming(tmp_path)) > 3
        process.kill()
    deadline = time.monotonic() + 60
    while _naming(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _naming(tmp_path) == []


def _naming(folder: Path) -> list[str]:
    """The command lines that name a folder, and what runs in an environment that does."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in text:
            found.append(text[:200].decode(errors="replace"))
    return found
