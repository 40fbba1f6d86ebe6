"""A fleet whose nodes and server fail by a schedule, in one process and in virtual time.

The nodes live in this process; a client that is late costs no seconds. What the server does
(deadlines, quorum, re-joining, its gate, its checkpoint) is the real thing. Imports no torch, so
that the memory of this process is that of server and nodes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from benchmarks.process_memory import resident
from fedprune.config import RunConfig, own_settings
from fedprune.errors import USER_ERRORS
from fedprune.exchange.messages import DESCRIBE
from fedprune.flower import client, server, wire
from fedprune.flower.inline import InlineGrid
from fedprune.flower.launch import launch_values
from fedprune.rounds.folder import prepare, read_metrics
from fedprune.rounds.setup import lay_out
from prunelab.runs.seeds import rng
from simulations.faults import ABSENCES, FAULTS, LIES, Liar, schedule

MEMORY_AT = (20, 100, 200)
SERVER_KILLS = 4


class ServerKilled(BaseException):
    """The server's process ends here; nothing catches it."""


@dataclass
class VirtualTime:
    """A clock that goes on when somebody waits."""

    now: float = 0.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let them pass."""
        self.now += seconds


@dataclass
class Fleet:
    """What outlives the server: nodes with their state, and what goes wrong.

    Attributes:
        faults: for the start and each round, client -> how it fails.
        kills: rounds in which the server dies, each once.
        gone: node -> the round in which it was killed.
        failed: (round, client) whose message has met its fault.
        memory: round -> bytes that this process held when it began.
    """

    seed: int
    faults: Sequence[dict[int, str]]
    kills: set[int]
    contexts: dict[int, Context] = field(default_factory=dict)
    gone: dict[int, int] = field(default_factory=dict)
    liars: dict[int, Liar] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)
    failed: set[tuple[int, int]] = field(default_factory=set)
    round_number: int = 0
    next_id: int = 5000

    def begin(self, round_number: int) -> None:
        """A round's first message is on its way."""
        if round_number == self.round_number:
            return
        self.round_number = round_number
        if round_number in MEMORY_AT:
            self.memory[round_number] = resident("VmRSS")

    def restart(self, node: int) -> None:
        """A node comes back with another identity and nothing of what it held."""
        context = self.contexts.pop(node)
        self.next_id += 1
        self.contexts[self.next_id] = Context(
            run_id=1,
            node_id=self.next_id,
            node_config=context.node_config,
            state=RecordDict(),
            run_config=context.run_config,
        )


class FaultyGrid(InlineGrid):
    """An InlineGrid in virtual time, on a fleet whose clients fail as its schedule says."""

    def __init__(self, fleet: Fleet, *, run_config: dict[str, Any], num_nodes: int) -> None:
        super().__init__(client.app, run_config=run_config, num_nodes=num_nodes)
        self.clock = VirtualTime()
        self._fleet = fleet
        self._ready: dict[str, float] = {}
        if fleet.contexts:  # the nodes of a server that has been killed
            for context in fleet.contexts.values():
                context.run_config = run_config
            self.contexts = fleet.contexts
        fleet.contexts = self.contexts

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are up; one that was killed is back after a whole round."""
        fleet = self._fleet
        for node, killed_in in list(fleet.gone.items()):
            if fleet.round_number > killed_in:
                del fleet.gone[node]
                fleet.restart(node)
        return [node for node in self.contexts if node not in fleet.gone]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Messages arrive at once; answers take a while."""
        messages = list(messages)
        headers = [wire.read_record(message.content)[0] for message in messages]
        ids = list(super().push_messages(messages))
        for message_id, message, header in zip(ids, messages, headers, strict=True):
            wait = 0.0
            if header["a"] != DESCRIBE:
                number = header["r"] + 1 if header["a"] == "train" else 0
                self._fleet.begin(number)
                who = self._client(message)
                if number in self._fleet.kills and who == number % len(self.contexts):
                    self._fleet.kills.discard(number)
                    raise ServerKilled
                wait = float(rng(self._fleet.seed, number, who).uniform(0.5, 10.0))
            self._ready[message_id] = self.clock.now + wait
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answers that are there by now."""
        for message_id in message_ids:
            if self._ready.get(message_id, 0.0) > self.clock.now:
                continue
            message = self._messages.get(message_id)
            for reply in super().pull_messages([message_id]):
                yield reply
                if message is not None and self._fault(message) == "duplicate":
                    yield reply

    def _client(self, message: Message) -> int:
        context = self.contexts[message.metadata.dst_node_id]
        return int(context.node_config["partition-id"])

    def _fault(self, message: Message) -> str:
        header, _ = wire.read_record(message.content)
        if header["a"] == DESCRIBE or message.metadata.dst_node_id not in self.contexts:
            return ""
        number = header["r"] + 1 if header["a"] == "train" else 0
        return self._fleet.faults[number].get(self._client(message), "")

    def _work(self, message: Message) -> Message | None:
        fleet, node, kind = self._fleet, message.metadata.dst_node_id, self._fault(message)
        if node not in self.contexts or node in fleet.gone:
            return None
        context, client_number = self.contexts[node], self._client(message)
        if kind in LIES and kind != "duplicate":
            liar = fleet.liars.setdefault(client_number, Liar(fleet.seed))
            return liar(kind, message, context)
        once = (fleet.round_number, client_number)
        if kind not in ABSENCES or once in fleet.failed:
            return super()._work(message)
        fleet.failed.add(once)
        if kind == "killed":
            fleet.gone[node] = fleet.round_number
        elif kind == "restarted":
            fleet.restart(node)
        elif kind == "failing":
            return wire.error_reply(message, "no power")
        elif kind == "slow":
            super()._work(message)
        elif kind == "forgetful":
            context.state.clear()
            return super()._work(message)
        return None


def run_fleet(settings: dict[str, Any], *, share: float) -> dict[str, Any]:
    """One run, to its end whatever happens to nodes and server.

    Args:
        share: of the clients that fail in each round; 0: nothing fails.
    """
    config = RunConfig.parse(own_settings(settings))
    rounds, clients, seed = config.training.rounds, config.data.clients, config.seed
    plan = schedule(seed, num_clients=clients, rounds=rounds, share=share, kinds=list(FAULTS))
    kills = rng(seed, 1).choice(rounds, size=SERVER_KILLS, replace=False) + 1 if share else []
    fleet = Fleet(seed, plan, {int(number) for number in kills})
    with tempfile.TemporaryDirectory() as folder:
        out, setup = Path(folder) / "run", Path(folder) / "setup"
        prepare(out, config, resume=False)
        lay_out(config, setup, with_start=True)
        killed, aborted = 0, ""
        while True:
            launch = launch_values(out, resume=killed > 0, setup=setup)
            run_config = {**config.flower(), **launch}
            grid = FaultyGrid(fleet, run_config=run_config, num_nodes=clients)
            context = Context(
                run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config
            )
            try:
                server.app(grid, context)
            except ServerKilled:
                killed += 1
                continue
            except USER_ERRORS as error:
                aborted = str(error)
            break
        lines = read_metrics(out)
    done = [line for line in lines if "event" not in line]
    return {
        "accuracy": done[-1]["test_accuracy"] if done else 0.0,
        "rounds": len(done),
        "aborted": aborted,
        "below_quorum": sum(line.get("event") == "below-quorum" for line in lines),
        "left_out": sum(len(line.get("skipped", [])) for line in lines),
        "answers": sum(len(line["clients"]) for line in done),
        "server_killed": killed,
        "memory": fleet.memory,
        "curve": [line["test_accuracy"] for line in done[19::20]],
    }


if __name__ == "__main__":
    print(json.dumps(run_fleet(json.loads(sys.argv[1]), share=float(sys.argv[2]))))
