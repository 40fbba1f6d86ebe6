"""The Flower ClientApp: it answers named questions from a client's own data.

Everything here runs without torch where the network has a program. A client keeps nothing
between messages but what requests name (wire.py) and what answers leave; if it has lost the former,
it asks for it again. A device (`fedprune device join`) has both on disk, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedprune.config import RunConfig
from fedprune.device.device import Device
from fedprune.errors import USER_ERRORS, ClientError
from fedprune.exchange.messages import (
    DESCRIBE,
    EVALUATE,
    MODEL,
    SPEC,
    ClientInfo,
    Reply,
    Request,
    describe_reply,
)
from fedprune.exchange.uplink import compress
from fedprune.flower import wire
from fedprune.flower.launch import LAUNCH_SECTION
from fedprune.local.model import Network
from fedprune.local.residual import keep, recall
from fedprune.local.site import Local, network_of, open_data
from fedprune.local.training import evaluate
from sparsemodel.runtime.memory import give_back
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.program import Program

SETUP = f"{LAUNCH_SECTION}setup"
CLIENTS = "data.clients"
_HELD, _KEPT = "held", "kept"

app = ClientApp()
T = TypeVar("T")


def run_config(context: Context, *, clients: int = 0) -> RunConfig:
    """The run's configuration as Flower carries it.

    Args:
        clients: how many there are where the configuration leaves it to the federation.
    """
    values = {k: v for k, v in context.run_config.items() if not k.startswith(LAUNCH_SECTION)}
    if takes_nodes(context):
        values[CLIENTS] = clients
    return RunConfig.parse(values)


def takes_nodes(context: Context) -> bool:
    """Whether the run has as many clients as the federation has nodes."""
    return context.run_config.get(CLIENTS) == 0


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on the client's own samples."""
    return Message(guarded(lambda: _answer(message.content, context)), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Any other question of the method."""
    return Message(guarded(lambda: _answer(message.content, context)), reply_to=message)


def guarded(work: Callable[[], T]) -> T | RecordDict:
    """What `work` returns, or the answer that tells the server of a foreseen trouble."""
    try:
        return work()
    except wire.NeedsResync:
        return wire.resync_record()
    except USER_ERRORS as error:
        return wire.skip_record(str(error))
    finally:
        give_back()  # a process may serve many messages, and clients


def _answer(record: RecordDict, context: Context) -> RecordDict:
    header, frames = wire.read_record(record)
    if wire.is_secure_step(header):
        return _answer_to_step(header, frames, context)
    device = Device.of(context.node_config)
    with device.answering(context.run_id) as told:
        request, local = open_request(record, context)
        local = device.fitted(request, local, told)
        try:
            return _answer_to(request, local)
        finally:
            remember(local, context)


def remember(local: Local, context: Context) -> None:
    """Leave for later messages what answers have kept."""
    context.state[_KEPT] = ConfigRecord(dict(local.kept))


def _answer_to_step(header: Mapping[str, Any], frames: wire.Frames, context: Context) -> RecordDict:
    """The answer to a step of a secure sum, which takes neither data nor network."""
    from fedprune.flower import secure  # noqa: PLC0415 - few runs need it

    kept = _bytes_of(context, _KEPT)
    clients = secure.num_clients(header) if takes_nodes(context) else 0
    config = run_config(context, clients=clients)
    try:
        return secure.answer(header, frames, kept, config=config, client=_number(context, config))
    finally:
        context.state[_KEPT] = ConfigRecord(dict(kept))


def _answer_to(request: Request, local: Local) -> RecordDict:
    if request.action == DESCRIBE:
        return wire.encode_reply(describe_reply(_info(local)), request, dtype="fp32")
    if request.action == EVALUATE:
        return encode_answer(evaluate(request, local), request, local)
    actions = local.config.method.actions
    if request.action not in actions:
        raise ClientError(
            f"method {local.config.method.name!r} has no answer to {request.action!r}; it has "
            f"{', '.join(actions)}"
        )
    return encode_answer(actions[request.action](request, local), request, local)


def open_request(record: RecordDict, context: Context) -> tuple[Request, Local]:
    """A message decoded, and the client's place; what it holds from now on is remembered."""
    held = _held(context)
    received = wire.receive(record, held)
    config = run_config(context, clients=received.clients())
    client = _number(context, config)
    data = open_data(
        config,
        client,
        private=str(context.node_config.get("data-path", "")),
        setup=str(context.run_config.get(SETUP, "")),
        expected=received.request({}).fields if received.action == DESCRIBE else None,
    )
    context.state[_HELD] = ConfigRecord(dict(held.items))
    if received.action == DESCRIBE:
        network = Network(None, lambda: None, {})
    elif received.program:
        program = _program(received.program_text())
        network = network_of(config, data, program, other=received.is_other())
    else:
        network = network_of(config, data, None)
    kept = _bytes_of(context, _KEPT)
    # The run's key is there for nodes as well, and empty; what is a node's own is never simulated.
    laid_out = bool(context.run_config.get(SETUP)) and not context.node_config.get("data-path")
    local = Local(
        client,
        data,
        config,
        network,
        message_bytes=received.nbytes(),
        kept=kept,
        simulated=laid_out,
    )
    return received.request(network.shapes), local


def encode_answer(reply: Reply, request: Request, local: Local) -> RecordDict:
    """The record of a method's answer, as the run's privacy settings let it go.

    What is lost of its model on the way is left in `local.kept`.
    """
    privacy = local.config.privacy
    if privacy.secure_aggregation or privacy.dp != "none" or SPEC in request.fields:
        from fedprune.privacy.answers import protected  # noqa: PLC0415 - few runs need it

        reply = protected(reply, request, local)
    uplink, update = local.config.federation.uplink, None
    kept = dict(local.kept)
    if MODEL in reply.states and not uplink.exact:
        received = request.state(MODEL)
        before = recall(local.kept, received) if uplink.error_feedback else None
        update, left = compress(reply.states[MODEL], received, uplink, residual=before)
        if uplink.error_feedback:
            keep(kept, left)
    if reply.resources is not None:
        held = reply.resources.state_bytes + sum(map(len, kept.values()))
        reply = replace(reply, resources=replace(reply.resources, state_bytes=held))
    record = wire.encode_reply(reply, request, dtype=uplink.dtype, update=update)
    # Not before: an answer that cannot be sent has told nothing.
    local.kept.clear()
    local.kept.update(kept)
    return record


def _number(context: Context, config: RunConfig) -> int:
    """Which client this node is."""
    client = int(context.node_config.get("partition-id", -1))
    if not 0 <= client < config.data.clients:
        raise ClientError(
            f"partition-id {client}: expected 0 to {config.data.clients - 1}; start the node with "
            "--node-config 'partition-id=0' (another for each), and as many nodes as data.clients"
        )
    return client


def _info(local: Local) -> ClientInfo:
    data = local.data
    return ClientInfo(
        local.client,
        len(data.train),
        len(data.dev),
        [] if local.config.privacy.hides_labels else data.label_histogram(),
        len(data.test),
    )


@lru_cache(maxsize=2)
def _program(text: bytes) -> Program:
    return Program.parse(text)


# Decoded masks, for the clients of one process: they mostly hold the same one.
_masks: dict[str, Patterns] = {}
_MAX_MASKS = 2


def _held(context: Context) -> wire.Held:
    """What the client was left holding by its last message."""
    for token in list(_masks)[:-_MAX_MASKS]:
        del _masks[token]
    return wire.Held(_bytes_of(context, _HELD), _masks)


def _bytes_of(context: Context, record: str) -> dict[str, bytes]:
    """What an earlier message left in a record of the client's state."""
    stored = context.state.config_records.get(record, ConfigRecord())
    return {name: data for name, data in stored.items() if isinstance(data, bytes)}
