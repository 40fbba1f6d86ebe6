"""The Flower ServerApp: it joins the clients and hands them to the round loop.

Flower's own strategies keep every reply in memory, average batch norm's integer counters and
cannot resume, so the loop is ours (rounds/loop.py) and only messages are Flower's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedprune.config import RunConfig
from fedprune.errors import USER_ERRORS, ClientError
from fedprune.exchange.gate import Gate
from fedprune.exchange.messages import DESCRIBE, MODEL, Reply, Request
from fedprune.exchange.pooled import Pooled
from fedprune.flower import secure, wire
from fedprune.flower.client import SETUP, run_config, takes_nodes
from fedprune.flower.launch import LAUNCH_SECTION, TICKET, failure_file
from fedprune.flower.roster import Roster, is_lost
from fedprune.local.private import samples_of_run
from fedprune.local.site import setup_folder
from fedprune.reports.page import write_report
from fedprune.rounds import folder as runfolder
from fedprune.rounds.ledger import Traffic
from fedprune.rounds.loop import run
from fedprune.rounds.setup import Setup
from prunelab.errors import RunError
from sparsemodel.errors import SparseModelError
from sparsemodel.runtime.pattern import Patterns

POLL_SECONDS = 0.02
JOIN_SECONDS = 120.0
SETTLE_SECONDS = 3.0
MAX_REASON = 500
TRAIN = "train"
NOT_CONNECTED = "its node is not connected"

Envelopes = dict[tuple[int, frozenset[str]], wire.Envelope]
"""By the request's identity and what the client holds."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the run that the run config describes."""
    path = Path(str(context.run_config.get(f"{LAUNCH_SECTION}out") or f"runs/{context.run_id}"))
    resume = _goes_on(context, path)
    config = _config(grid, context, path if resume else None)
    setup = Setup(config, setup_folder(config, str(context.run_config.get(SETUP, ""))))
    launcher = int(context.run_config.get(f"{LAUNCH_SECTION}launcher-pid", 0))
    if not (launcher and path.exists()):  # otherwise the launcher has prepared it
        runfolder.prepare(path, config, resume=resume)
    # Nodes that the command started have what it laid out; others may have a data-path.
    own_data = not context.run_config.get(SETUP)
    try:
        with runfolder.open_run(path) as folder:
            cohort = GridCohort(
                grid,
                setup,
                own_data=own_data,
                launcher_pid=launcher,
                tell_clients=takes_nodes(context),
            )
            cohort.join()
            run(setup, cohort, folder)
    except USER_ERRORS as error:
        if launcher:  # which may be another process, and sees no more than a log
            with contextlib.suppress(OSError):
                failure_file(setup.folder).write_text(str(error), encoding="utf-8")
        raise
    if not launcher:  # nobody else writes the report and says where it is
        print(f"report: {write_report(path).resolve()}", flush=True)


def _goes_on(context: Context, path: Path) -> bool:
    """Whether the run has a folder to go on from.

    A run that a command submitted begins in the folder which that has prepared, where it lies on
    this machine too; submitted again, it goes on wherever it had begun.
    """
    resume = bool(context.run_config.get(f"{LAUNCH_SECTION}resume", False))
    ticket = str(context.run_config.get(f"{LAUNCH_SECTION}ticket", ""))
    if not ticket:
        return resume
    file = path / TICKET
    prepared = file.exists() and file.read_text(encoding="utf-8") == ticket
    return (resume or prepared) and (path / runfolder.CONFIG).exists()


def _config(grid: Grid, context: Context, resumed: Path | None) -> RunConfig:
    """The run's configuration, its number of clients counted where it is left to the federation.

    Args:
        resumed: the folder of a run that goes on, with the clients that it began with.
    """
    if not takes_nodes(context):
        return run_config(context)
    if resumed is not None and (resumed / runfolder.CONFIG).exists():
        return run_config(context, clients=runfolder.stored_config(resumed).data.clients)
    return run_config(context, clients=count_nodes(grid))


def count_nodes(grid: Grid, *, settle: float = SETTLE_SECONDS) -> int:
    """How many nodes there are; with none yet, how many have come once no more are coming.

    Args:
        settle: seconds without another node after which those that came are all.

    Raises:
        RunError: none is there within two minutes.
    """
    count = len(list(grid.get_node_ids()))
    if count:
        return count
    changed, deadline = 0.0, time.monotonic() + JOIN_SECONDS
    while not count or time.monotonic() < changed + settle:
        if not count and time.monotonic() > deadline:
            raise RunError(
                f"no node is connected after {JOIN_SECONDS:g} s, and data.clients = 0 asks for "
                "as many clients as there are nodes; start the SuperNodes first"
            )
        time.sleep(0.1)
        if (now := len(list(grid.get_node_ids()))) != count:
            count, changed = now, time.monotonic()
    return count


class GridCohort:
    """The clients behind a Flower Grid.

    Keeps track of what each client holds, counts the bytes of every message, and turns a
    failed, silent or refused client into a line of `skipped` instead of an end of the run.

    Args:
        tell_clients: whether messages say how many clients there are.
    """

    def __init__(
        self,
        grid: Grid,
        setup: Setup,
        *,
        own_data: bool = False,
        launcher_pid: int = 0,
        tell_clients: bool = False,
    ) -> None:
        self._grid = grid
        self._setup = setup
        self._config = setup.config
        self._launcher_pid = launcher_pid
        self._told_clients = setup.config.data.clients if tell_clients else 0
        self._held: dict[int, frozenset[str]] = {}
        self._last_mask: Patterns | None = None
        self._traffic = Traffic()
        self._program = wire.ProgramText.of(setup.program)
        self._gate = Gate(
            num_clients=setup.config.data.clients,
            num_classes=setup.data.num_classes or 1,
            shares=setup.shares(),
            own_data=own_data,
            max_share=setup.config.federation.max_share,
            with_labels=not setup.config.privacy.hides_labels,
            equal_weights=setup.config.privacy.dp != "none",
        )
        describe = Request(DESCRIBE, fields=samples_of_run(setup.data))
        self._description = self._encode(describe, frozenset(), program=wire.ProgramText()).record
        self._roster = Roster(
            grid,
            self._gate,
            ask=lambda node: self._send(node, self._description, DESCRIBE, "join"),
            read=lambda message: wire.decode_reply(_content(message), describe, shapes={}),
            note=self.skip,
            node_keys=setup.config.federation.node_keys,
            # A grid may know, as one does whose nodes are this process.
            client_of=getattr(grid, "client_of", lambda node: -1),
        )
        self._joining: dict[str, float] = {}  # when to give up on those asked who they are
        self.clients = self._roster.clients
        self.simulated = not own_data
        self.stacked = bool(getattr(grid, "stacked", False))
        # A grid may bring a time of its own, with `monotonic` and `sleep`.
        self._clock = getattr(grid, "clock", time)

    def is_connected(self, client: int) -> bool:
        """Whether a client can be asked, as far as was seen at the last look."""
        return self._roster.is_connected(client)

    def join(self) -> None:
        """Wait for the nodes and learn which client each of them is.

        Raises:
            RunError: no node, or none with data, is there within two minutes.
        """
        expected = self._config.data.clients
        deadline = self._clock.monotonic() + JOIN_SECONDS
        while len(nodes := list(self._grid.get_node_ids())) < expected:
            if self._clock.monotonic() > deadline:
                break
            self._check_launcher()
            self._clock.sleep(0.1)
        self._look()
        # Who was asked in vain is asked again, but the run does not wait for ever.
        deadline = self._clock.monotonic() + 2 * self._config.federation.timeout
        while self._joining and self._clock.monotonic() < deadline:
            # Nobody is bound before all have been heard: see Roster.
            self._check_launcher()
            self._clock.sleep(POLL_SECONDS)
            self._look()
        self._roster.bind()
        if not self.clients:
            reasons = "; ".join(skip["reason"] for skip in self._traffic.skipped[:3])
            raise RunError(f"none of {len(nodes)} nodes answered; {reasons}")

    def look(self, *, least: int = 0, besides: Collection[int] = ()) -> None:
        """See which nodes have come or gone since the last look.

        Args:
            least: waits, up to two minutes, until so many clients are connected.
            besides: clients that do not count for that.
        """
        deadline = self._clock.monotonic() + JOIN_SECONDS
        while True:
            self._look()
            self._roster.bind()
            there = (c for c in self.clients if self.is_connected(c) and c not in besides)
            found = sum(1 for _ in islice(there, max(0, least)))
            if found >= least or self._clock.monotonic() > deadline:
                return
            self._check_launcher()
            self._clock.sleep(0.1)

    def _look(self) -> None:
        limit = self._clock.monotonic() + self._config.federation.timeout
        pending = self._roster.find()
        self._joining = {asked: self._joining.get(asked, limit) for asked in pending}
        self._hear()

    def _hear(self) -> None:
        """Take what nodes have said of themselves by now."""
        for asked, limit in list(self._joining.items()):
            messages = [(asked, message) for message in self._grid.pull_messages([asked])]
            self._roster.hear(messages[:1])  # the first answer counts
            if not messages and self._clock.monotonic() < limit:
                continue
            if not messages:
                self._roster.give_up(asked)
            del self._joining[asked]

    def skip(self, client: int, reason: str) -> None:
        """Note that a client's answer could not be used."""
        # Its words are shown on terminals and pages: one line, nothing that steers them.
        shown = "".join(c if c.isprintable() else " " for c in reason)
        shown = " ".join(shown.split())[-MAX_REASON:]
        self._traffic.skipped.append({"client": client, "reason": shown or "no reason given"})

    def take_traffic(self) -> Traffic:
        """What was sent since the last call."""
        taken, self._traffic = self._traffic, Traffic()
        # A grid whose nodes are in this process knows how long they worked.
        seconds = getattr(self._grid, "take_client_seconds", None)
        if seconds is None:
            return taken
        return replace(taken, client_seconds=(taken.client_seconds or 0.0) + seconds())

    def count_traffic(self, traffic: Traffic) -> None:
        """Count what was sent."""
        self._traffic = traffic.joined(self._traffic)

    def ask_sum(
        self, request: Request, *, clients: list[int] | None = None, least: int = 1
    ) -> Pooled:
        """Ask these clients (all, by default) so that nothing is seen but the sum.

        Args:
            least: answers below which not even that is seen.
        """
        clients = sorted(self.clients) if clients is None else clients
        weights = self._gate.weights(clients, on=request.on)
        for client in [client for client, weight in weights.items() if weight == 0]:
            del weights[client]
            self.skip(client, f"it has no samples for {request.action!r}")
        return secure.ask_sum(
            self,
            request,
            weights=weights,
            num_clients=self._config.data.clients,
            shapes=self._setup.shapes,
            threshold=self._config.privacy.threshold,
            least=least,
        )

    def deliver(
        self, records: Mapping[int, RecordDict], action: str
    ) -> Iterator[tuple[int, wire.Frames]]:
        """Send each client its record, whatever it holds, and yield the frames of the answers."""
        pending = {}
        for client, record in records.items():
            if sent := self._sent(client, record, action, action):
                self._traffic.down.append(wire.record_bytes(record))
                pending[sent] = client
            else:
                self.skip(client, NOT_CONNECTED)
        for client, message in self._replies(pending):
            try:
                record = _content(message)
                self._traffic.up.append(wire.record_bytes(record))
                header, frames = wire.read_record(record)
                if "skip" in header:
                    raise ClientError(str(header["skip"]))
            except (ClientError, SparseModelError) as error:
                self.skip(client, str(error))
                continue
            yield client, frames

    def ask(
        self,
        request: Request,
        *,
        clients: list[int] | None = None,
        among: Collection[int] = (),
        enough: int = 0,
    ) -> Iterator[tuple[int, Reply]]:
        """Send to each client what it lacks, and yield checked replies as they arrive.

        A client that lacks what a message refers to asks for a re-sync and is sent everything, as
        is one whose reply was lost on its way.

        Args:
            clients: by number; None: all.
            among: those who share the weight with them, as of one round.
            enough: replies after which nobody is waited for; 0: all.
        """
        # Clients that hold the same and are asked the same are sent the same: it is encoded once.
        envelopes: Envelopes = {}
        pending: dict[str, int] = {}
        clients = sorted(self.clients) if clients is None else clients
        weights = self._gate.weights({*clients, *among}, on=request.on)
        federation = self._config.federation
        asked = request.of_each(clients)
        arrived: dict[int, Request] = {}
        after: dict[int, frozenset[str]] = {}
        for client in clients:
            try:
                sent, after[client] = self._request(client, asked[client], envelopes)
                pending[sent] = client
            except ClientError as error:
                self._held[client] = frozenset()
                self.skip(client, str(error))
        again: set[int] = set()
        for client, message in self._replies(pending):
            try:
                record = None if is_lost(message) else _content(message)
                if record is not None:
                    self._traffic.up.append(wire.record_bytes(record))
                if client not in again and (record is None or wire.wants_resync(record)):
                    again.add(client)
                    self._held[client] = frozenset()
                    sent, _ = self._request(client, asked[client], envelopes)
                    pending[sent] = client
                    continue
                own = asked[client]
                if id(own) not in arrived:
                    changed = MODEL in own.expected.states and not federation.uplink.exact
                    # What comes back may be the change to what arrived.
                    dtype = federation.value_dtype
                    arrived[id(own)] = wire.as_received(own, dtype=dtype) if changed else own
                reply = wire.decode_reply(
                    _content(message),
                    arrived[id(own)],
                    shapes=self._setup.shapes if own.program is None else own.program.shapes(),
                    uplink=federation.uplink,
                )
                reply = self._gate.check(client, reply, own, weights[client])
            except (ClientError, SparseModelError) as error:
                self._held[client] = frozenset()
                self.skip(client, str(error))
                continue
            self._held[client] = after[client]
            yield client, reply
            enough -= 1
            if enough == 0:
                break
        for client in pending.values():  # not needed: they may have got the message, or not
            self._held[client] = self._held.get(client, frozenset()) & after[client]
        if MODEL in request.states:
            self._last_mask = request.states[MODEL].patterns

    def _request(
        self, client: int, request: Request, envelopes: Envelopes
    ) -> tuple[str, frozenset[str]]:
        """The id of the message to a client, and what it holds after it."""
        held = self._held.get(client, frozenset())
        key = (id(request), held)
        if key not in envelopes:
            own = request.program
            program = self._program if own is None else wire.ProgramText.of(own)
            envelopes[key] = self._encode(request, held, program=program)
        envelope = envelopes[key]
        trains = request.action == TRAIN
        group = str(request.round_index + 1) if trains else request.action
        sent = self._sent(client, envelope.record, request.action, group)
        if not sent:
            raise ClientError(NOT_CONNECTED)
        self._traffic.down.append(envelope.size)
        self._traffic.mask += envelope.mask_size
        return sent, envelope.held

    def _encode(
        self, request: Request, held: frozenset[str], *, program: wire.ProgramText
    ) -> wire.Envelope:
        return wire.encode_request(
            request,
            program=program,
            held=held,
            base=self._last_mask,
            dtype=self._config.federation.value_dtype,
            clients=self._told_clients,
        )

    def _sent(self, client: int, record: RecordDict, action: str, group: str) -> str:
        """The id of a message to a client's node; "" where that is not connected."""
        if not self.is_connected(client):
            return ""
        return self._send(self._roster.nodes[client], record, action, group)

    def _send(self, node: int, record: RecordDict, action: str, group: str) -> str:
        kind = TRAIN if action == TRAIN else "query"
        # One that is fetched after the time for it is over would be answered to nobody.
        ttl = self._config.federation.timeout
        message = Message(record, node, kind, group_id=group, ttl=ttl)
        sent = list(self._grid.push_messages([message]))
        return sent[0] if sent else ""  # "": the node has left the federation

    def _replies(self, pending: dict[str, int]) -> Iterator[tuple[int, Message]]:
        """Replies one at a time, until all have come or the time is over.

        `pending` maps message ids to clients and may grow while replies are consumed.
        """
        deadline = self._clock.monotonic() + self._config.federation.timeout
        while pending and self._clock.monotonic() < deadline:
            self._check_launcher()
            arrived = False
            for message_id in list(pending):
                # One id at a time: what is pulled is in memory.
                for message in self._grid.pull_messages([message_id]):
                    arrived = True
                    if message_id in pending:  # the first answer counts
                        yield pending.pop(message_id), message
            if not arrived:
                self._clock.sleep(POLL_SECONDS)
        for client in pending.values():
            self._held[client] = frozenset()
            self.skip(client, f"no answer within {self._config.federation.timeout:g} s")
        pending.clear()

    def _check_launcher(self) -> None:
        """Stop when the command that started this run is gone (killed, say).

        It would otherwise go on in the background and hold the run folder against --resume.
        """
        if self._launcher_pid:
            try:
                os.kill(self._launcher_pid, 0)
            except ProcessLookupError:
                raise RunError("the command that started this run has ended") from None


def _content(message: Message) -> RecordDict:
    if message.has_error():
        lines = (message.error.reason or "").strip().splitlines() or [f"error {message.error.code}"]
        raise ClientError(f"the client failed: {lines[-1]}")
    return message.content
