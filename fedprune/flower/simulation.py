"""A run on Flower's simulation engine.

It starts a private SuperLink and submits the app with `flwr run`, as a user of Flower would, and
reads the real status of the run back (the command itself exits 0 even when the app has failed).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tomli_w

from fedprune.config import RunConfig
from fedprune.flower import app as flower_app
from fedprune.flower.launch import (
    SETTING_UP,
    Progress,
    Say,
    failure_file,
    joining,
    launch_values,
    told_nothing,
)
from fedprune.rounds.folder import has_checkpoint
from fedprune.rounds.setup import lay_out
from prunelab.errors import RunError
from prunelab.runs.children import ended_with_parent
from prunelab.runs.temporary import temporary_folder

START_SECONDS = 180.0
LOOPBACK_SECONDS = 5.0
RAY_STEPS = 10_000  # of which Ray's smallest share of a GPU is one
# A socket's path has 107 letters; what Ray puts behind TMPDIR takes 68.
RAY_FOLDER = 107 - len("/ray/session_2000-01-01_00-00-00_000000_1234567/sockets/plasma_store")
ERROR = re.compile(r"[\w.]*(Error|Exception): ")  # a line of a traceback that names an error
LOG, SUPERLINK_LOG = "run.log", "superlink.log"


def run_flower(
    config: RunConfig, out: Path, *, resume: bool, progress: Progress, say: Say = told_nothing
) -> None:
    """Run through `flwr run` on Flower's simulation engine; the folder must have been prepared.

    Args:
        progress: called a few times a second while the run goes on.
        say: is told what is being done before the first round.

    Raises:
        RunError: the simulation engine cannot be used, or the run failed; says why.
    """
    _check_simulation(config)
    port = free_port()
    with temporary_folder() as home:
        setup = home / "setup"
        say(SETTING_UP)
        lay_out(config, setup, with_start=not has_checkpoint(out))
        say("starting Flower's SuperLink and simulation, which takes some seconds")
        app = write_app(home / "app", config, launch_values(out, resume=resume, setup=setup))
        environment = private_environment(home, commands=commands(home))
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "private"\n\n'
            f'[superlink.private]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        with superlink(home, port, environment, "--simulation"):
            say(joining(config))
            _follow(
                ["run", str(app), "private", "--stream", *_federation(config)],
                environment,
                home,
                progress,
            )
            listing = flwr(["list", "private", "--format", "json"], environment, home)
            status = str(json.loads(listing)["runs"][0]["status"])
        if status != "finished:completed":
            raise _failure(home, status, failure_file(setup))


def _check_simulation(config: RunConfig) -> None:
    """Refuse what Ray would refuse half a minute later, in words that name no setting."""
    if find_spec("ray") is None:
        raise RunError(
            "the flower engine needs Ray: pip install 'fedprune[sim]', or use --engine inline"
        )
    threads, processors = config.training.threads, os.cpu_count() or 1
    if threads > processors:
        raise RunError(
            f"training.threads is {threads} and this machine has {processors} processors, so that "
            f"Ray can start no client; use --set training.threads={processors}, or --engine inline"
        )
    folder = tempfile.gettempdir()
    if sys.platform == "linux" and len(folder) > RAY_FOLDER:
        raise RunError(
            f"Ray's sockets have no room in TMPDIR, {folder}: {len(folder)} letters, at most "
            f"{RAY_FOLDER}; set TMPDIR to a shorter path, or use --engine inline"
        )


def _federation(config: RunConfig) -> list[str]:
    """Nodes, and what each client takes of the machine."""
    threads = config.training.threads
    values = [f"num-supernodes={config.data.clients}", f"client-resources-num-cpus={threads}"]
    if config.training.device == "cuda":
        parallel = min(max(1, (os.cpu_count() or 1) // threads), config.clients_per_round)
        share = gpu_share(parallel, num_gpus=_num_gpus())
        values.append(f"client-resources-num-gpus={share:.4f}")
    return ["--federation-config", " ".join(values)]


def _num_gpus() -> int:
    import torch  # noqa: PLC0415

    return torch.cuda.device_count()


def gpu_share(parallel: int, *, num_gpus: int) -> float:
    """The part of one GPU that a client asks Ray for, so that `parallel` clients run at once.

    A client lies on one GPU whole, so each GPU takes its part of them, rounded up. Ray counts in
    steps of 1/10,000: a third must be asked for as 0.3333, for of three times 0.3334 one would
    wait for ever.

    Args:
        parallel: how many clients the rest of the machine can run at a time, >= 1.
        num_gpus: at least 1.
    """
    on_each = -(-parallel // num_gpus)
    return max(1, RAY_STEPS // on_each) / RAY_STEPS


def write_app(path: Path, config: RunConfig, launch: Mapping[str, Any]) -> Path:
    """Copy the thin Flower app and give it this run's configuration.

    Args:
        launch: keys that say where, not what (launch.py).
    """
    source = Path(flower_app.__file__).parent
    path.mkdir(parents=True)
    for file in (*source.glob("fedprune_*.py"), source / "LICENSE"):
        shutil.copy(file, path)
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))
    values = {**config.flower(), **launch}
    project["tool"]["flwr"]["app"]["config"] = values
    (path / "pyproject.toml").write_text(tomli_w.dumps(project), encoding="utf-8")
    return path


def commands(home: Path) -> Path:
    """The folder of this interpreter's commands, under a path without white space.

    Ray starts its workers through a shell and does not quote the interpreter's path. Where that
    holds white space, Flower's commands are started through a link to this environment instead.
    """
    if not any(character.isspace() for character in sys.executable):
        return Path(sys.executable).parent
    link = home / "environment"
    if any(character.isspace() for character in str(link)):
        raise RunError(
            f"Ray cannot start workers from a path with white space: neither {sys.executable} "
            f"nor the temporary folder {home}; set TMPDIR to another one, or use --engine inline"
        )
    link.symlink_to(sys.prefix, target_is_directory=True)
    interpreter = link / Path(sys.executable).relative_to(sys.prefix)
    commands = home / "commands"
    commands.mkdir()
    for entry in entry_points(group="console_scripts"):
        if entry.name.startswith(("flwr", "flower")):
            script = commands / entry.name
            script.write_text(
                f"#!{interpreter}\nimport sys\nfrom {entry.module} import {entry.attr}\n"
                f"sys.exit({entry.attr}())\n"
            )
            script.chmod(0o755)
    return commands


PLAIN = {"FORCE_COLOR": ""}
"""For commands whose output is read: inside Jupyter they would answer in colours."""


def private_environment(home: Path, *, commands: Path) -> dict[str, str]:
    """A private Flower home; quiet, offline, and this interpreter's commands first."""
    own = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    direct = ",".join(filter(None, [own, "127.0.0.1", "localhost"]))
    return {
        **os.environ,
        # What the user names as "module:function" lies in the folder that the run is started in.
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
        ),
        # The processes of a run talk to each other past any proxy of the user's.
        "no_proxy": direct,
        "NO_PROXY": direct,
        "TMPDIR": str(home.parent),  # the user's may be relative, to another folder
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PATH": os.pathsep.join([str(commands), os.environ.get("PATH", "")]),
        **PLAIN,
    }


def free_port() -> int:
    """A port of this machine that nobody listens on now.

    Raises:
        RunError: the loopback interface, over which the processes of a run talk, is down.
    """
    try:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            unused.listen()
            address = unused.getsockname()
            socket.create_connection(address, timeout=LOOPBACK_SECONDS).close()
            return int(address[1])
    except OSError as error:
        raise RunError(
            f"the processes of a Flower run talk over 127.0.0.1, which does not answer ({error}); "
            "bring the loopback interface up (ip link set lo up), or use --engine inline"
        ) from None


@contextlib.contextmanager
def superlink(home: Path, port: int, environment: dict[str, str], *flags: str) -> Iterator[None]:
    """A private SuperLink, for as long as the context lasts; `flags` are further ones of its."""
    command = ["flower-superlink", "--insecure", "--isolation", "subprocess", *flags]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (home / SUPERLINK_LOG).open("w") as log:
        process = subprocess.Popen(
            ended_with_parent(*command),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_healthy(f"http://127.0.0.1:{port}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise _trouble("Flower's SuperLink did not start", home / SUPERLINK_LOG)
            time.sleep(0.1)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_healthy(url: str, *, authority: Path | None = None) -> bool:
    """Whether a SuperLink answers there.

    Args:
        authority: the certificate that its own has to be from; None: without TLS.
    """
    trusted = None if authority is None else ssl.create_default_context(cafile=str(authority))
    # Past any proxy of the user's, who may have set one for everything.
    here = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted)
    )
    try:
        with here.open(f"{url}/health", timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def flwr(arguments: list[str], environment: dict[str, str], home: Path) -> str:
    """What one of Flower's own commands prints.

    Raises:
        RunError: it failed.
    """
    done = subprocess.run(
        ["flwr", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=home,
        check=False,
    )
    if done.returncode != 0:
        raise RunError(
            f"flwr {arguments[0]} failed: {(done.stderr or done.stdout).strip()[-2000:]}"
        )
    return done.stdout


def _follow(
    arguments: list[str], environment: dict[str, str], home: Path, progress: Progress
) -> None:
    """Submit the run and wait until its log stream ends."""
    with (home / LOG).open("w") as log:
        command = ended_with_parent("flwr", *arguments)
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=home
        )
        try:
            while process.poll() is None:
                progress()
                time.sleep(0.25)
        finally:
            process.kill()
            process.wait()
    progress()
    if process.returncode != 0:
        raise _trouble("flwr run failed", home / LOG)


def _failure(home: Path, status: str, told: Path) -> RunError:
    """Why a run failed: what the server says, else the last error of Flower's log."""
    if told.exists():
        return RunError(told.read_text(encoding="utf-8"))
    return _trouble(f"Flower reports {status}", home / LOG)


def _trouble(what: str, log: Path) -> RunError:
    """One line of what is wrong and what to do; --debug shows the end of the log as its cause."""
    text = _tail(log, 2000)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["its log is empty"]
    # The first of a chain of errors is the cause; the others say that something went wrong.
    errors = [line for line in lines if ERROR.match(line)]
    reason = errors[0] if errors else lines[-1]
    trouble = RunError(
        f"{what}: {reason} (--debug shows more of the log; --engine inline runs the same without "
        "Flower's processes)"
    )
    trouble.__cause__ = RuntimeError(text)
    return trouble


def _tail(log: Path, lines: int = 20) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "\n".join(text.splitlines()[-lines:])
