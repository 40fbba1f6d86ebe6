"""Nodes of one process on a real SuperLink: the bits of inline, whatever is killed in between."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from federation import digest, run_inline, tiny
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.deployment import device, submit
from fedprune.config import RunConfig
from fedprune.device.keys import write_keys
from fedprune.flower import simulation, wire
from fedprune.flower.launch import launch_values
from fedprune.flower.node.link import Link, RunIsOver, Unreachable
from fedprune.flower.node.memory import ANSWER, MESSAGE, Memory
from fedprune.flower.node.node import NodeSettings, _Worker, answer, run_node
from fedprune.flower.node.parcel import Parcel
from fedprune.local.private import REFUSAL
from fedprune.rounds.folder import read_metrics
from fedprune.rounds.setup import lay_out
from prunelab.errors import RunError
from prunelab.runs.temporary import temporary_folder

CLIENTS = 2


class Federation:
    """A SuperLink without authentication; nodes that can be killed and started again."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home, self._stack = home, stack
        self.port = simulation.free_port()
        self.environment = simulation.private_environment(home, commands=simulation.commands(home))
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{self.port}"\n'
            "insecure = true\n"
        )
        flags = ["--disable-runtime-dependency-installation"]
        stack.enter_context(simulation.superlink(home, self.port, self.environment, *flags))
        self.groups: dict[int, int] = {}

    def start(self, client: int) -> None:
        node = device(self.home, self.port, self.environment, client=client)
        self.groups[client] = self._stack.enter_context(node)

    def kill(self, client: int) -> None:
        os.killpg(self.groups[client], signal.SIGKILL)

    def file(self, client: int, name: str) -> Path:
        return self.home / f"device{client}" / "state" / name


@contextmanager
def federation() -> Iterator[Federation]:
    with temporary_folder() as temporary, ExitStack() as stack:
        home = temporary / "h"
        home.mkdir()
        yield Federation(home, stack)


@pytest.mark.slow
def test_nodes_killed_while_they_work_give_the_bits_of_inline(tmp_path: Path) -> None:
    """With a message that they work on, or an answer that may be half sent."""
    config = tiny(data__clients=CLIENTS, training__rounds=6)
    inline = run_inline(config, tmp_path / "inline")
    killed: list[str] = []
    with federation() as fleet:
        setup, out = fleet.home / "setup", tmp_path / "fleet"
        lay_out(config, setup, with_start=True)
        launch = launch_values(out, resume=False, setup=setup)
        app = simulation.write_app(fleet.home / "app", config, launch)
        for client in range(CLIENTS):
            fleet.start(client)

        with ThreadPoolExecutor() as pool:
            run = pool.submit(submit, [str(app), "own"], fleet.environment, fleet.home)
            # Here, and not in a thread: the nodes end with the thread that starts them.
            for client, name in [(0, MESSAGE), (1, MESSAGE), (1, ANSWER)] * 3:
                while not fleet.file(client, name).exists() and not run.done():
                    time.sleep(0.001)
                fleet.kill(client)
                killed.append(name if fleet.file(client, name).exists() else "")
                fleet.start(client)
            run.result()
    assert killed.count(MESSAGE) >= 3, killed
    assert digest(out) == digest(inline)
    skipped = [line["skipped"] for line in read_metrics(out)]
    assert not any(skipped)


def settings(folder: Path, address: str, **changes: object) -> NodeSettings:
    folder.mkdir(exist_ok=True)
    if not (folder / "node").exists():
        write_keys(folder)
    return NodeSettings(address, folder / "state", folder / "node", **changes)  # type: ignore[arg-type]


def test_a_superlink_that_is_away_is_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    stop = threading.Event()

    def tell(state: str, text: str) -> None:
        said.append(f"{state}: {text}")
        stop.set()

    address = f"127.0.0.1:{simulation.free_port()}"
    run_node(settings(tmp_path, address), stop=stop, tell=tell)
    assert said[0].startswith(f"waiting: {address} does not answer")
    assert said[0].endswith("; trying again")


@pytest.mark.slow
def test_one_key_is_one_node(tmp_path: Path) -> None:
    """A process that was killed is followed by one that knows its number; another is not let in."""
    with federation() as fleet, ExitStack() as links:
        address = f"127.0.0.1:{fleet.port}"

        def linked(name: str) -> Link:
            key = settings(tmp_path / name, address).key
            return links.enter_context(Link(address, key=key, root_certificates=None))

        link, other, stranger = linked("one"), linked("one"), linked("two")
        node_id = link.activate()
        with pytest.raises(Exception, match="another process uses this node's key"):
            other.activate()
        assert other.activate(last=node_id) == node_id  # as after kill -9
        other.heartbeat()
        other.deactivate(node_id)
        assert link.activate() == node_id
        with pytest.raises(RunError, match="does not know this node"):
            stranger.heartbeat()
        assert link.receive() is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing; fedprune device init makes one"),
        (b"nonsense", "is no private key of OpenSSH's"),
    ],
)
def test_keys_that_are_none_are_refused(text: bytes | None, message: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    if text is not None:
        key.write_bytes(text)
    with pytest.raises(RunError, match=message):
        Link("127.0.0.1:1", key=key, root_certificates=None)


def test_certificates_that_are_none_are_refused(tmp_path: Path) -> None:
    write_keys(tmp_path)
    for content in (b"nonsense", None):
        file = tmp_path / "ca.crt"
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(RunError, match=r"ca.crt: no certificates in it"):
            Link("127.0.0.1:1", key=tmp_path / "node", root_certificates=file)


def asked(config: RunConfig, *, own_data: str = "", **values: str) -> Message:
    """The answer of a node to a message of a run that is configured so."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    question = Message(wire.build_record({"a": "describe", "r": 0}, {}), 1, "query", group_id="1")
    question.metadata.__dict__["_message_id"] = "1"
    run = {**config.flower(), **{key.replace("__", "."): text for key, text in values.items()}}
    node: dict[str, int | str] = {"partition-id": 0}
    if own_data:
        node["data-path"] = own_data
    context = Context(1, 1, dict(node), RecordDict(), run)
    return answer(question, context, packages=["mine"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training__schedule", "os:system"),
        ("data__partition", "subprocess:run"),
        ("method__settings", '{"criterion": "os:system"}'),
        ("method__settings", '{"criterion": "os\\u003asystem"}'),
        ("method__name", "antigravity:"),
        ("training__task", "some-script:main"),
        ("data__dataset", "os:getcwd"),
        ("model__name", "minefield:net"),
    ],
)
def test_code_that_a_run_names_is_not_run(key: str, value: str) -> None:
    """Of no package that the node's owner did not name."""
    reply = asked(tiny(), **{key: value})
    assert "the run names code" in str(reply.error.reason)
    assert "--allow PACKAGE" in str(reply.error.reason)


def test_code_of_packages_that_the_owner_names_is_run() -> None:
    reply = asked(tiny(), training__schedule="mine:schedule")
    assert not reply.has_error()
    header, _ = wire.read_record(reply.content)
    assert "mine" in header["skip"]  # which is not installed: it was looked for


def test_files_that_a_run_names_are_not_read(tmp_path: Path) -> None:
    """The server would learn of them what a model learns of its data."""
    for name in (str(tmp_path), "/etc", "../digits"):
        reply = asked(tiny(), data__dataset=name)
        assert f"the run's data set is {name}, and" in str(reply.error.reason)


def test_of_a_node_with_its_own_data_the_run_may_call_its_own_what_it_likes(tmp_path: Path) -> None:
    for name in ("/srv/pictures", "theirs:load"):
        reply = asked(tiny(), own_data=str(tmp_path), data__dataset=name)
        assert not reply.has_error()
        header, _ = wire.read_record(reply.content)
        assert header["skip"] == REFUSAL  # the node's folder is empty: it was looked into


def test_folders_of_the_server_are_none_of_a_node(tmp_path: Path) -> None:
    class Brings:
        def run_of(self, run_id: int) -> tuple[int, dict[str, object]]:
            return 3, {"seed": 5, "run.setup": "/home/somebody/store", "run.out": "x:y"}

    memory = Memory(tmp_path)
    worker = _Worker(settings(tmp_path / "n", "a:1"), Brings(), memory, 1)  # type: ignore[arg-type]
    assert worker._begin(9).run_config == {"seed": 5}


def test_unreachable_is_no_run_error() -> None:
    """Else a node would end where it should wait."""
    assert not issubclass(Unreachable, RunError)


@contextmanager
def a_web_server(status: int) -> Iterator[str]:
    """Something else at the address; what it is asked it answers with this status."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>\n no SuperLink </html>")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{web.server_port}"
        finally:
            web.shutdown()


@pytest.mark.parametrize("known", [False, True])
def test_an_address_of_something_else_is_told_in_a_line(known: bool, tmp_path: Path) -> None:
    with a_web_server(404) as address:
        if known:
            Memory(tmp_path / "state").note_node(address, 7)
        with pytest.raises(RunError, match=f"{address} answers 404: <html> no SuperLink"):
            run_node(settings(tmp_path, address))


def test_a_server_that_forbids_is_tried_again(tmp_path: Path) -> None:
    said: list[str] = []
    stop = threading.Event()

    def tell(state: str, text: str) -> None:
        said.append(text)
        stop.set()

    with a_web_server(403) as address:
        run_node(settings(tmp_path, address), stop=stop, tell=tell)
    assert said == [f"{address} answers 403; trying again"]


class Ends:
    """A link whose run is stopped while its message is fetched; then its heart fails."""

    def __init__(self) -> None:
        self.failure: Exception | None = None

    def receive(self) -> None:
        self.failure = RunError("enough")
        raise RunIsOver


def test_a_run_that_is_stopped_ends_no_node(tmp_path: Path) -> None:
    link = Ends()
    worker = _Worker(settings(tmp_path, "a:1"), link, Memory(tmp_path / "m"), 1)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="enough"):
        worker.serve(threading.Event(), link)  # type: ignore[arg-type]


def test_a_message_that_cannot_be_read_is_left(tmp_path: Path) -> None:
    """Kept, it would end every process of the node that came after."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    whole = Parcel.of(Message(wire.build_record({"a": "describe"}, {}), 1, "query", group_id="1"))
    memory = Memory(tmp_path / "m")
    memory.received(replace(whole, contents={whole.message_id: b"nonsense"}))
    worker = _Worker(settings(tmp_path, "a:1"), None, memory, 1)  # type: ignore[arg-type]
    worker._finish()
    assert memory.message() is None
