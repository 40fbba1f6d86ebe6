"""A device's node in one process: it fetches messages, answers them, and sends the replies.

Flower's own SuperNode is two processes that stay and a third for every message, and runs whatever
code a run brings. This node runs the ClientApp that is installed with it and nothing else, keeps
its modules and data between messages, and looks for the next one soon after the last.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.supercore.task_identity import TaskIdentity

from fedprune.config import continued
from fedprune.errors import ConfigError
from fedprune.flower import wire
from fedprune.flower.launch import LAUNCH_SECTION
from fedprune.flower.node.link import HEARTBEAT_SECONDS, Busy, Link, RunIsOver, Unreachable
from fedprune.flower.node.memory import Memory
from fedprune.flower.node.parcel import Parcel
from prunelab.errors import RunError

SHORTEST_WAIT, LONGEST_WAIT = 0.05, 3.0  # seconds between two looks for a message
WAIT_SHARE = 0.1  # of the time since the last message
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0)
DATASET = "data.dataset"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeSettings:
    """What a node is told.

    Attributes:
        address: host:port of the SuperLink.
        folder: of this node alone, for what it keeps.
        key: file of its private key.
        root_certificates: file of the authority of the SuperLink's certificate; None: nothing is
            encrypted.
        config: what the ClientApp reads as node config: partition-id, data-path, home.
        packages: Python packages of this machine whose functions a run may name.
    """

    address: str
    folder: Path
    key: Path
    root_certificates: Path | None = None
    config: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    packages: Collection[str] = ()


def run_node(
    settings: NodeSettings,
    *,
    stop: threading.Event | None = None,
    tell: Callable[[str, str], None] = lambda state, text: None,
) -> None:
    """Serve a SuperLink until `stop` is set.

    Args:
        tell: is told how the node is, "joined" or "waiting", and in a line why.

    Raises:
        RunError: what a person has to mend: the key is not registered (any more), say.
    """
    stop = stop or threading.Event()
    memory, address = Memory(settings.folder), settings.address
    with Link(address, key=settings.key, root_certificates=settings.root_certificates) as link:
        try:
            tries = 0
            while not stop.is_set():
                try:
                    node_id = link.activate(last=memory.last_node(address))
                    memory.note_node(address, node_id)
                    tell("joined", f"joined {address} as node {node_id}")
                    tries = 0
                    with _Heart(link) as heart:
                        _Worker(settings, link, memory, node_id).serve(stop, heart)
                except (Unreachable, Busy, RunIsOver) as error:
                    wait = RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)]
                    tries += 1
                    if tries in {1, 5} or not tries % 40:
                        tell("waiting", f"{error}; trying again")
                    stop.wait(wait)
        finally:
            with contextlib.suppress(Unreachable, RunIsOver, RunError):
                link.deactivate(memory.last_node(address))


class _Heart:
    """Heartbeats, in a thread of their own, for as long as the context lasts.

    Attributes:
        failure: what a heartbeat found that the worker has to know.
    """

    def __init__(self, link: Link) -> None:
        self._link, self._end = link, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.failure: Exception | None = None

    def __enter__(self) -> _Heart:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._end.wait(0.8 * HEARTBEAT_SECONDS):
            try:
                self._link.heartbeat()
            except Unreachable:
                continue  # the worker sees it, too
            except Exception as error:
                self.failure = error
                return


class _Worker:
    """Answers one message after the other."""

    def __init__(self, settings: NodeSettings, link: Link, memory: Memory, node_id: int) -> None:
        self._settings, self._link = settings, link
        self._memory, self._node_id = memory, node_id

    def serve(self, stop: threading.Event, heart: _Heart) -> None:
        """Work until `stop` is set.

        Raises:
            Unreachable: the SuperLink does not answer; what was being done is kept.
            RunError: what a person has to mend.
        """
        self._finish()
        last = time.monotonic()
        while not stop.is_set():
            if heart.failure is not None:
                raise heart.failure
            try:
                parcel = self._next()
            except RunIsOver:  # while its message was on its way
                self._memory.dropped()
                parcel = None
            if parcel is None:
                wait = WAIT_SHARE * (time.monotonic() - last)
                stop.wait(min(LONGEST_WAIT, max(SHORTEST_WAIT, wait)))
                continue
            self._work(parcel)
            last = time.monotonic()

    def _next(self) -> Parcel | None:
        parcel = self._link.receive()
        if parcel is not None:
            self._memory.received(parcel)
            self._link.confirm(parcel)
        return parcel

    def _finish(self) -> None:
        """What an earlier process of this node, or a SuperLink that was away, left undone."""
        if (reply := self._memory.answer()) is not None:
            self._send(reply, 0.0)
        if (parcel := self._memory.message()) is not None:
            # By this machine's clock alone: the server's may be another.
            if self._memory.message_age() > parcel.message.metadata.ttl:
                self._memory.dropped()
            else:
                self._work(parcel)

    def _work(self, parcel: Parcel) -> None:
        began = time.monotonic()
        try:
            message = parcel.open()
            context = self._memory.context(parcel.run_id) or self._begin(parcel.run_id)
        except RunIsOver:
            self._memory.dropped()
            return
        except (Unreachable, RunError):
            raise
        except Exception:  # a damaged message or app; kept, it would end every process of the node
            _log.exception("a message cannot be read, and is left")
            self._memory.dropped()
            return
        # Message's constructor reads these process-wide identities.
        TaskIdentity.run_id, TaskIdentity.task_id = parcel.run_id, 1
        TaskIdentity.node_id = context.node_id = self._node_id
        context.node_config = dict(self._settings.config)
        reply = Parcel.of(answer(message, context, packages=self._settings.packages))
        del message
        self._memory.answered(reply, context)
        self._send(reply, time.monotonic() - began)

    def _begin(self, run_id: int) -> Context:
        series, config = self._link.run_of(run_id)
        # Folders of the server's machine: none is looked into here.
        config = {k: v for k, v in config.items() if not k.startswith(LAUNCH_SECTION)}
        return self._memory.begin(run_id, node_id=self._node_id, series=series, config=config)

    def _send(self, reply: Parcel, seconds: float) -> None:
        with contextlib.suppress(RunIsOver):
            self._link.send(reply, seconds=seconds)
        self._memory.sent(reply)


def answer(message: Message, context: Context, *, packages: Collection[str] = ()) -> Message:
    """The ClientApp's answer, or Flower's message of an error.

    Args:
        packages: whose functions a run may name.
    """
    from fedprune.flower.client import app  # noqa: PLC0415 - once there is something to do

    own_data = "data-path" in context.node_config
    try:
        check_trusted(context.run_config, own_data=own_data, packages=packages)
        return app(message, context)
    except ConfigError as error:
        return wire.error_reply(message, str(error))
    except Exception as error:  # as Flower does: a client that raises must not end the node
        _log.exception("a message could not be answered")
        reason = f"{type(error).__name__}: {error}"
        return wire.error_reply(message, reason)


def check_trusted(values: Mapping[str, Any], *, own_data: bool, packages: Collection[str]) -> None:
    """Look whether a run asks for nothing that the node's owner has not given.

    Args:
        values: the run's configuration.
        own_data: whether the node has samples of its own; what the run calls its data set is then
            read by the server alone.
        packages: whose functions a run may name.

    Raises:
        ConfigError: it names code, or files of the node.
    """
    # As `RunConfig.parse` reads them: what is escaped in JSON is not what it looks like.
    for key, value in continued({}, values).items():
        if not isinstance(value, str) or (key == DATASET and own_data):
            continue
        if ":" in value:
            if value.partition(":")[0].partition(".")[0] in packages:
                continue
            raise ConfigError(
                f"the run names code, {value}, and this node runs none but fedprune's: install "
                "it there and name its package when it is made (fedprune device init --allow "
                "PACKAGE)"
            )
        if key == DATASET:
            from prunelab.data.datasets import DATASETS  # noqa: PLC0415 - few nodes need it

            if value not in DATASETS:
                raise ConfigError(
                    f"the run's data set is {value}, and of its files this node reads none that "
                    "its owner has not named: fedprune device init --force --data PATH"
                )
