"""A run in this process: a small Grid whose nodes are function calls."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, MutableMapping
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
from fedprune.local.shares import forget_stores
from fedprune.rounds.folder import has_checkpoint
from fedprune.rounds.setup import lay_out
from prunelab.runs.temporary import temporary_folder

FIRST_NODE = 1000


class Contexts(MutableMapping[int, Context]):
    """Node -> its context; that of client k is made when FIRST_NODE + k is first looked up."""

    def __init__(self, run_config: dict[str, Any], num_nodes: int) -> None:
        self._run_config, self._nodes = run_config, range(FIRST_NODE, FIRST_NODE + num_nodes)
        self._made: dict[int, Context] = {}
        self._replaced: set[int] = set()  # of `_nodes`, those that are gone, or others now

    @property
    def nodes(self) -> Collection[int]:
        """All nodes."""
        unchanged = not self._replaced and all(map(self._is_first, self._made))
        return self._nodes if unchanged else list(self)

    def __getitem__(self, node: int) -> Context:
        if node not in self._made and node in self:
            partition = node - FIRST_NODE
            self._made[node] = Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": partition, "num-partitions": len(self._nodes)},
                state=RecordDict(),
                run_config=self._run_config,
            )
        return self._made[node]

    def __setitem__(self, node: int, context: Context) -> None:
        self._made[node] = context

    def __delitem__(self, node: int) -> None:
        if node not in self:
            raise KeyError(node)
        self._made.pop(node, None)
        self._replaced.add(node)

    def __iter__(self) -> Iterator[int]:
        yield from (node for node in self._nodes if node not in self._replaced)
        yield from (node for node in self._made if not self._is_first(node))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, node: object) -> bool:
        return node in self._made or self._is_first(node)

    def _is_first(self, node: object) -> bool:
        return node in self._nodes and node not in self._replaced


class InlineGrid(Grid):
    """A Grid whose nodes live in this process; a client works when its reply is pulled.

    Args:
        client_app: what every node runs.
        run_config: the run config that every node sees.
        num_nodes: nodes, with partition-id 0 ... num_nodes - 1.
        introduced: whether the server knows which client each node is, and need not ask.
    """

    def __init__(
        self,
        client_app: ClientApp,
        *,
        run_config: dict[str, Any],
        num_nodes: int,
        introduced: bool = False,
    ) -> None:
        # Message's constructor reads these process-wide identities.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._client_app = client_app
        self._run = Run.create_empty(1)
        self._messages: dict[str, Message] = {}
        self._sent = 0
        self._client_seconds = 0.0
        self._introduced = introduced
        self.contexts: MutableMapping[int, Context] = Contexts(run_config, num_nodes)

    def client_of(self, node: int) -> int:
        """Which client a node is; -1: it has to be asked."""
        return node - FIRST_NODE if self._introduced else -1

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
        """Ids of all nodes; as long as they are those of the beginning, a range."""
        contexts = self.contexts
        return contexts.nodes if isinstance(contexts, Contexts) else list(contexts)

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
    grid = InlineGrid(client_app, run_config=run_config, num_nodes=nodes, introduced=True)
    if batched:  # with torch, which a sparse run does without
        from fedprune.flower.batched import BatchedGrid  # noqa: PLC0415

        grid = BatchedGrid(
            client_app,
            run_config=run_config,
            num_nodes=nodes,
            introduced=True,
            size=config.cohort,
            measure=config.training.device == "cuda" and config.training.cohort == 0,
        )
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config
    )
    try:
        with calling(progress):
            server_app(grid, context)
    finally:
        forget_stores()
        if trainings := sys.modules.get("fedprune.local.captured"):  # imported where torch is
            trainings.forget_trainings()


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
