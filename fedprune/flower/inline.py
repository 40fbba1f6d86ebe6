"""A run in this process: a small Grid whose nodes are function calls."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedprune.config import RunConfig
from fedprune.flower import wire
from fedprune.flower.launch import (
    SETTING_UP,
    Progress,
    Say,
    joining,
    launch_values,
    told_nothing,
)
from fedprune.rounds.folder import has_checkpoint
from fedprune.rounds.setup import lay_out
from prunelab.runs.temporary import temporary_folder


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
        self._client_seconds = 0.0
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

    def take_client_seconds(self) -> float:
        """Processor seconds of the clients' work since the last call."""
        taken, self._client_seconds = self._client_seconds, 0.0
        return taken

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Count what happens inside as clients' work."""
        started = time.process_time()
        try:
            yield
        finally:
            self._client_seconds += time.process_time() - started

    def _work(self, message: Message) -> Message | None:
        context = self.contexts[message.metadata.dst_node_id]
        try:
            with self._working():
                return self._client_app(message, context)
        except Exception:  # as Flower does: a client that raises must not end the run
            reason = traceback.format_exc()
            return wire.error_reply(message, reason)


def run_inline(
    config: RunConfig,
    out: Path,
    *,
    resume: bool,
    progress: Progress,
    batched: bool = False,
    say: Say = told_nothing,
) -> None:
    """Run in this process, without Ray; the folder must have been prepared.

    Args:
        progress: called a few times a second, from a thread of its own.
        batched: whether the clients of a round are trained together.
        say: is told what is being done before the first round.

    Raises:
        RunError: no folder for temporary files can be used, or the run failed; says why.
    """
    with temporary_folder() as temporary:
        setup = temporary / "setup"
        say(SETTING_UP)
        lay_out(config, setup, with_start=not has_checkpoint(out))
        say(joining(config))
        run_config = {**config.flower(), **launch_values(out, resume=resume, setup=setup)}
        _run_apps(config, run_config, progress, batched=batched)


def _run_apps(
    config: RunConfig, run_config: dict[str, Any], progress: Progress, *, batched: bool
) -> None:
    from fedprune.flower.client import app as client_app  # noqa: PLC0415
    from fedprune.flower.server import app as server_app  # noqa: PLC0415

    nodes = config.data.clients
    grid = InlineGrid(client_app, run_config=run_config, num_nodes=nodes)
    if batched:  # with torch, which a sparse run does without
        from fedprune.flower.batched import BatchedGrid  # noqa: PLC0415

        grid = BatchedGrid(
            client_app,
            run_config=run_config,
            num_nodes=nodes,
            size=config.cohort,
            measure=config.training.device == "cuda" and config.training.cohort == 0,
        )
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config
    )
    with calling(progress):
        server_app(grid, context)


@contextlib.contextmanager
def calling(progress: Progress, *, every: float = 0.3) -> Iterator[None]:
    """Call `progress` now and then while the context lasts, and once at its end."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every):
            progress()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        progress()
