"""Flower's deployment on this machine, for benchmarks and tests: a SuperLink, SuperNodes, and real
`flwr-clientapp` processes, which leave what the kernel says of their memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedprune.config import RunConfig
from fedprune.device.home import TEMPORARY, Profile, make_home
from fedprune.flower import simulation
from fedprune.flower.launch import launch_values
from prunelab.errors import RunError
from prunelab.runs.children import ended_with_parent

RUN_SECONDS = 600
# Flower's command, which notes its high-water mark when it ends.
CLIENTAPP = """#!{python}
import atexit, pathlib, re, sys
def note():
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
    with open({notes!r}, "a") as file:
        file.write("%d\\n" % (1024 * int(peak)))
atexit.register(note)
from flwr.supernode.cli import flwr_clientapp
sys.exit(flwr_clientapp())
"""


def clientapp_peaks(config: RunConfig, setup: Path, home: Path) -> list[int]:
    """Run a configuration of one client; bytes at the peak of each process that answered.

    Args:
        config: of a run with one client.
        setup: the folder of what the run starts from.
        home: an empty folder for everything that is written.

    Raises:
        RunError: Flower did not complete the run; says why.
    """
    notes, own = home / "peaks.txt", home / "own"
    own.mkdir(parents=True)
    clientapp = own / "flwr-clientapp"
    clientapp.write_text(CLIENTAPP.format(python=sys.executable, notes=str(notes)))
    clientapp.chmod(0o755)
    launch = launch_values(home / "run", resume=False, setup=setup)
    app = simulation.write_app(home / "app", config, launch)
    environment = simulation.private_environment(home, commands=simulation.commands(home))
    environment["PATH"] = os.pathsep.join([str(own), environment["PATH"]])
    port = simulation.free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    with (
        simulation.superlink(home, port, environment, "--disable-runtime-dependency-installation"),
        supernode(home, port, environment),
    ):
        submit([str(app), "own"], environment, home)
    return [int(line) for line in notes.read_text().splitlines()]


def submit(arguments: list[str], environment: dict[str, str], home: Path) -> None:
    """`flwr run` an app on the SuperLink "own" of `home`'s configuration, to its end.

    Raises:
        RunError: Flower did not complete the run.
    """
    simulation.flwr(["run", *arguments], environment, home)
    status, deadline = "", time.monotonic() + RUN_SECONDS
    while not status.startswith("finished") and time.monotonic() < deadline:
        time.sleep(1)
        listing = simulation.flwr(["list", "own", "--format", "json"], environment, home)
        status = str(json.loads(listing)["runs"][0]["status"])
    if status != "finished:completed":
        raise RunError(f"Flower reports {status or 'nothing'}; see {home}")


@contextmanager
def supernode(
    home: Path, port: int, environment: dict[str, str], *, client: int = 0
) -> Iterator[int]:
    """Flower's node of one client, for as long as the context lasts; its process group."""
    command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
    command += ["--port", str(simulation.free_port()), "--node-config", f"partition-id={client}"]
    with _running(command, home / f"supernode{client}.log", environment) as group:
        yield group


@contextmanager
def device(
    home: Path, port: int, environment: dict[str, str], *, client: int = 0, data: str = ""
) -> Iterator[int]:
    """The same by `fedprune device join`.

    Args:
        data: of its own: it reads no files that a run names.
    """
    own = home / f"device{client}"
    if not own.exists():
        make_home(own, Profile(client=client, data=data))
        (own / TEMPORARY).symlink_to(home)  # what a run starts from is laid out once for all
    command = [sys.executable, "-m", "fedprune", "device", "join", f"127.0.0.1:{port}"]
    command += ["--insecure", "--home", str(own)]
    with _running(command, home / f"device{client}.log", environment) as group:
        yield group


@contextmanager
def _running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[int]:
    """A command with a process group of its own, which ends with the context."""
    with log.open("w") as file:
        process = subprocess.Popen(
            ended_with_parent(*command),
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):  # a caller may have killed it
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)
