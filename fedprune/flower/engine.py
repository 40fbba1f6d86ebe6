"""Two ways to run the same ClientApp and ServerApp: in this process, or on Flower's simulation.

`inline` is a small in-process Grid. `flower` starts a private SuperLink and submits the app
with `flwr run`, as a user of Flower would, and reads the real status of the run back (the
command itself exits 0 even when the app has failed).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedprune.config import RunConfig
from fedprune.flower import app as flower_app
from prunelab.errors import RunError

CLIENT_APP_RAISED = 2
START_SECONDS = 180.0
RAY_STEPS = 10_000  # of which Ray's smallest share of a GPU is one
LOG, SUPERLINK_LOG = "run.log", "superlink.log"
Progress = Callable[[], None]

# Runs the command given after it so that it is ended when its parent dies, however that dies
# (Linux: prctl(PR_SET_PDEATHSIG, SIGTERM); elsewhere it just runs it).
END_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
os.execvp(sys.argv[1], sys.argv[1:])
"""


# --- inline ------------------------------------------------------------------------------------


class InlineGrid(Grid):
    """A Grid whose nodes live in this process; a client works when its reply is pulled.

    Args:
        client_app: what every node runs.
        run_config: the run config that every node sees.
        num_nodes: nodes, with partition-id 0 ... num_nodes - 1.
    """

    def __init__(
        self, client_app: ClientApp, *, run_config: dict[str, Any], num_nodes: int
    ) -> None:
        # Message's constructor reads these process-wide identities.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._client_app = client_app
        self._run = Run.create_empty(1)
        self._messages: dict[str, Message] = {}
        self._sent = 0
        self.contexts = {
            1000 + partition: Context(
                run_id=1,
                node_id=1000 + partition,
                node_config={"partition-id": partition, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config=run_config,
            )
            for partition in range(num_nodes)
        }

    def set_run(self, run: Run) -> None:
        """Set the run this Grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a node (Flower's deprecated way to make one)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are pulled."""
        ids = []
        for message in messages:
            self._sent += 1
            message_id = str(self._sent)
            message.metadata.__dict__["_message_id"] = message_id
            self._messages[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the clients work, and return their replies."""
        for message_id in message_ids:
            message = self._messages.pop(message_id, None)
            if message is not None:
                reply = self._work(message)
                if reply is not None:
                    yield reply

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull every reply."""
        return list(self.pull_messages(self.push_messages(messages)))

    def _work(self, message: Message) -> Message | None:
        context = self.contexts[message.metadata.dst_node_id]
        try:
            return self._client_app(message, context)
        except Exception:  # as Flower does: a client that raises must not end the run
            reason = traceback.format_exc()
            return Message(Error(code=CLIENT_APP_RAISED, reason=reason), reply_to=message)


class BatchedGrid(InlineGrid):
    """An InlineGrid whose clients of a round are trained together, with stacked weights.

    The first train reply that is pulled takes the waiting train messages of as many clients
    along as are trained at a time; their replies are kept until they are pulled.

    Args:
        size: clients to train at a time; halved where the GPU's memory ends.
        measure: whether the first round measures how many fit, up to `size`.
    """

    def __init__(
        self,
        client_app: ClientApp,
        *,
        run_config: dict[str, Any],
        num_nodes: int,
        size: int,
        measure: bool = False,
    ) -> None:
        super().__init__(client_app, run_config=run_config, num_nodes=num_nodes)
        self._size, self._measure = size, measure
        self._replies: dict[str, Message] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the clients work, those that train together, and return the replies."""
        for message_id in message_ids:
            waiting = self._messages.get(message_id)
            if waiting is not None and waiting.metadata.message_type == MessageType.TRAIN:
                self._train_waiting(message_id)
            if message_id in self._replies:
                yield self._replies.pop(message_id)
            else:
                yield from super().pull_messages([message_id])

    def _train_waiting(self, first: str) -> None:
        from fedprune.flower.client import train_together  # noqa: PLC0415

        kind = MessageType.TRAIN
        others = [
            message_id
            for message_id, message in self._messages.items()
            if message.metadata.message_type == kind and message_id != first
        ]
        chosen = [first, *others[: self._size - 1]]
        messages = [self._messages.pop(message_id) for message_id in chosen]
        pairs = [(message, self.contexts[message.metadata.dst_node_id]) for message in messages]
        try:
            answers, self._size = train_together(pairs, size=self._size, measure=self._measure)
            self._measure = False
        except Exception:  # as Flower does: clients that raise must not end the run
            reason = traceback.format_exc()
            answers = [
                Message(Error(code=CLIENT_APP_RAISED, reason=reason), reply_to=message)
                for message in messages
            ]
        self._replies |= dict(zip(chosen, answers, strict=True))


def run_inline(
    config: RunConfig, out: Path, *, resume: bool, progress: Progress, batched: bool = False
) -> None:
    """Run in this process, without Ray; the folder must have been prepared.

    Args:
        progress: called a few times a second, from a thread of its own.
        batched: whether the clients of a round are trained together.
    """
    from fedprune.flower.client import app as client_app  # noqa: PLC0415
    from fedprune.flower.server import app as server_app  # noqa: PLC0415

    run_config = {**config.flat(), **_launch_values(out, resume=resume)}
    nodes = config.data.clients
    grid = (
        BatchedGrid(
            client_app,
            run_config=run_config,
            num_nodes=nodes,
            size=config.cohort,
            measure=config.training.device == "cuda" and config.training.cohort == 0,
        )
        if batched
        else InlineGrid(client_app, run_config=run_config, num_nodes=nodes)
    )
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config
    )
    with _calling(progress):
        server_app(grid, context)


@contextlib.contextmanager
def _calling(progress: Progress) -> Iterator[None]:
    """Call `progress` now and then while the context lasts, and once at its end."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.3):
            progress()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        progress()


def _launch_values(out: Path, *, resume: bool) -> dict[str, Any]:
    return {
        "run.out": str(out.resolve()),
        "run.resume": resume,
        "run.launcher-pid": os.getpid(),
    }


# --- flower ------------------------------------------------------------------------------------


def run_flower(config: RunConfig, out: Path, *, resume: bool, progress: Progress) -> None:
    """Run through `flwr run` on Flower's simulation engine; the folder must have been prepared.

    Args:
        progress: called a few times a second while the run goes on.

    Raises:
        RunError: the simulation engine cannot be used, or the run failed; says why.
    """
    _require_simulation()
    with tempfile.TemporaryDirectory(prefix="fedprune-") as temporary:
        home = Path(temporary)
        app = _write_app(home / "app", config, out, resume=resume)
        ports = _free_ports(2)
        environment = _environment(home, commands=_commands(home))
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "private"\n\n'
            f'[superlink.private]\naddress = "127.0.0.1:{ports[0]}"\ninsecure = true\n'
        )
        with _superlink(home, ports, environment):
            _follow(
                ["run", str(app), "private", "--stream", *_federation(config)],
                environment,
                home,
                progress,
            )
            listing = _flwr(["list", "private", "--format", "json"], environment, home)
            status = str(json.loads(listing)["runs"][0]["status"])
        if status != "finished:completed":
            raise RunError(_failure(home, status))


def _require_simulation() -> None:
    try:
        import ray  # noqa: F401, PLC0415
    except ImportError:
        raise RunError(
            "the flower engine needs Ray: pip install 'fedprune[sim]', or use --engine inline"
        ) from None


def _federation(config: RunConfig) -> list[str]:
    """Nodes, and what each client takes of the machine."""
    threads = config.training.threads
    values = [f"num-supernodes={config.data.clients}", f"client-resources-num-cpus={threads}"]
    if config.training.device == "cuda":
        parallel = min(max(1, (os.cpu_count() or 1) // threads), config.clients_per_round)
        share = gpu_share(parallel, num_gpus=torch.cuda.device_count())
        values.append(f"client-resources-num-gpus={share:.4f}")
    return ["--federation-config", " ".join(values)]


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


def _write_app(path: Path, config: RunConfig, out: Path, *, resume: bool) -> Path:
    """Copy the thin Flower app and give it this run's configuration."""
    source = Path(flower_app.__file__).parent
    path.mkdir(parents=True)
    shutil.copy(source / "fedprune_app.py", path)
    project = (source / "pyproject.toml").read_text(encoding="utf-8")
    header, _, _ = project.partition("[tool.flwr.app.config]")
    values = {**config.flat(), **_launch_values(out, resume=resume)}
    lines = [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in values.items()]
    text = "\n".join([header + "[tool.flwr.app.config]", *lines]) + "\n"
    (path / "pyproject.toml").write_text(text, encoding="utf-8")
    return path


def _commands(home: Path) -> Path:
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


def _environment(home: Path, *, commands: Path) -> dict[str, str]:
    """A private Flower home; quiet, offline, and this interpreter's commands first."""
    own = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    direct = ",".join(filter(None, [own, "127.0.0.1", "localhost"]))
    return {
        **os.environ,
        # The processes of a run talk to each other past any proxy of the user's.
        "no_proxy": direct,
        "NO_PROXY": direct,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PATH": os.pathsep.join([str(commands), os.environ.get("PATH", "")]),
    }


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@contextlib.contextmanager
def _superlink(home: Path, ports: list[int], environment: dict[str, str]) -> Iterator[None]:
    """A private SuperLink in simulation mode, for as long as the context lasts."""
    command = [sys.executable, "-c", END_WITH_PARENT]
    command += ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--control-api-address", f"127.0.0.1:{ports[1]}"]
    command += ["--host", "127.0.0.1", "--port", str(ports[0])]
    with (home / SUPERLINK_LOG).open("w") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_healthy(ports[0]):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RunError(f"Flower's SuperLink did not start:\n{_tail(home / SUPERLINK_LOG)}")
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


def _is_healthy(port: int) -> bool:
    # Past any proxy of the user's, who may have set one for everything.
    here = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with here.open(f"http://127.0.0.1:{port}/health", timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _flwr(arguments: list[str], environment: dict[str, str], home: Path) -> str:
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
        process = subprocess.Popen(
            ["flwr", *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=home
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
        raise RunError(f"flwr run failed:\n{_tail(home / LOG)}")


def _failure(home: Path, status: str) -> str:
    """The reason of a failed run: the last error of the log, in one line."""
    lines = _tail(home / LOG, 200).splitlines()
    errors = [line.strip() for line in lines if "Error: " in line]
    reason = errors[-1] if errors else "\n".join(lines[-15:])
    return f"Flower reports {status}: {reason}"


def _tail(log: Path, lines: int = 20) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "\n".join(text.splitlines()[-lines:])
