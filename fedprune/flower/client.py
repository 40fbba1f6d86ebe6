"""The Flower ClientApp: named actions on a client's own data.

A client keeps nothing between rounds but the mask (so that only values need to be sent); if it
has lost that, it asks for it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeVar

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedprune.config import RunConfig
from fedprune.errors import USER_ERRORS, ClientError
from fedprune.exchange.messages import (
    MeasureReply,
    Pool,
    ScoreRequest,
    State,
    TrainReply,
    TrainRequest,
)
from fedprune.flower import wire
from fedprune.local.cohort import Member, train_cohort, train_in_cohorts
from fedprune.local.cohort_memory import fitting_cohort
from fedprune.local.data import ClientData
from fedprune.local.training import (
    GrowthBatch,
    LocalResult,
    compute_device,
    round_learning_rate,
    train_locally,
)
from fedprune.methods.fedtiny.bn_selection import measure_candidates, score_candidates
from fedprune.rounds.workspace import SEED_GROWTH, SEED_ROUND, Workspace, open_workspace
from prunelab.networks import float_state, load_float_state_
from prunelab.runs.seeds import rng, stream_seed
from prunelab.runs.threads import computing
from sparsemodel.codec import decode_mask, encode_mask
from sparsemodel.masks.mask import Mask
from sparsemodel.storage.meter import peak_rss_bytes

# Keys of the run config that say where to write, not what to compute.
LAUNCH_SECTION = "run."
_MASK, _POOL_PARTS = "mask", ("pool_fields", "pool_arrays")

app = ClientApp()


def run_config(context: Context) -> RunConfig:
    """The run's configuration as Flower carries it."""
    values = {k: v for k, v in context.run_config.items() if not k.startswith(LAUNCH_SECTION)}
    return RunConfig.parse(values)


T = TypeVar("T")
Work = Callable[[RecordDict, Context, Workspace, int], RecordDict]


def _answer(message: Message, context: Context, work: Work) -> Message:
    """Do the work and wrap its outcome; foreseen troubles become an answer, not a crash."""

    def answer() -> RecordDict:
        workspace, client = _place(context)
        with computing(workspace.config.training.threads):
            return work(message.content, context, workspace, client)

    return Message(_guarded(answer), reply_to=message)


def _guarded(work: Callable[[], T]) -> T | RecordDict:
    """What `work` returns, or the answer that tells the server of a foreseen trouble."""
    try:
        return work()
    except wire.NeedsResync:
        return wire.resync_record()
    except USER_ERRORS as error:
        return wire.skip_record(str(error))


def _place(context: Context) -> tuple[Workspace, int]:
    """The run's workspace, and which client this node is."""
    config = run_config(context)
    client = int(context.node_config.get("partition-id", -1))
    if not 0 <= client < config.data.clients:
        raise ClientError(
            f"partition-id {client}: expected 0 to {config.data.clients - 1}; "
            "make the number of nodes equal to data.clients"
        )
    return open_workspace(config), client


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Who is this client, and how many samples of which class does it hold?"""
    return _answer(message, context, lambda _, __, w, c: wire.encode_reply(w.client_info(c)))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model at the mask on the client's own samples."""
    return _answer(message, context, _train)


@app.query("measure")
def measure(message: Message, context: Context) -> Message:
    """Batch-norm statistics of every candidate on the development split."""
    return _answer(message, context, _measure)


@app.evaluate("candidates")
def candidates(message: Message, context: Context) -> Message:
    """Loss of every candidate on the development split."""
    return _answer(message, context, _score)


@dataclass(frozen=True)
class TrainJob:
    """A train message, decoded: what is asked, and the client's part in it."""

    work: Workspace
    request: TrainRequest
    member: Member


def decode_job(record: RecordDict, context: Context, work: Workspace, client: int) -> TrainJob:
    """Read a train message; the client holds its mask from then on."""
    config = work.config
    request = wire.decode_train_request(
        record, shapes=work.shapes, masks=_held_masks(context, work)
    )
    _hold_mask(context, request.mask)
    data = work.client(client)
    if len(data.train_labels) < 2:
        raise ClientError(
            f"{len(data.train_labels)} training sample(s); batch norm needs at least 2"
        )
    seed = stream_seed(SEED_ROUND, config.seed, request.round_index, client)
    growth = _growth_batch(request, data, work, client) if request.growth else None
    images, labels = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)
    member = Member(request.weights, images, labels, seed, growth)
    return TrainJob(work, request, member)


def encode_result(job: TrainJob, result: LocalResult, weights: State) -> RecordDict:
    """The reply to a train message."""
    reply = TrainReply(
        num_examples=len(job.member.labels),
        loss=result.loss,
        values={},
        growth=result.growth,
        state_bytes=result.state_bytes if job.request.report_resources else 0,
        peak_rss_bytes=peak_rss_bytes() if job.request.report_resources else 0,
    )
    dtype = job.work.config.federation.value_dtype
    return wire.encode_train_reply(reply, weights=weights, mask=job.request.mask, dtype=dtype)


def _train(record: RecordDict, context: Context, work: Workspace, client: int) -> RecordDict:
    job, config = decode_job(record, context, work, client), work.config
    member = job.member
    model = work.model().to(compute_device(config.training.device))
    load_float_state_(model, member.weights)
    result = train_locally(
        model,
        member.images,
        member.labels,
        mask=job.request.mask,
        config=config.training,
        lr=round_learning_rate(config.training, job.request.round_index),
        epochs=config.training.local_epochs,
        seed=member.seed,
        augmented=config.data.augment,
        growth=member.growth,
    )
    weights = {name: value.cpu() for name, value in float_state(model).items()}
    return encode_result(job, result, weights)


def train_together(
    messages: Sequence[tuple[Message, Context]], *, size: int, measure: bool = False
) -> tuple[list[Message], int]:
    """Answer several clients' train messages with one training of stacked weights.

    Args:
        messages: train messages of one round, each with its client's context.
        size: how many clients to train at a time.
        measure: whether to train fewer where a first mini-batch says that the GPU holds fewer.

    Returns:
        The answers in the order of the messages, and the size that fitted into memory.
    """
    decoded = [
        _guarded(partial(_decoded_job, message.content, context)) for message, context in messages
    ]
    jobs = [entry for entry in decoded if isinstance(entry, TrainJob)]
    results, size = _train_jobs(jobs, size=size, measure=measure) if jobs else ([], size)
    outcome, answers = iter(results), []
    for (message, _), entry in zip(messages, decoded, strict=True):
        record = (
            _guarded(partial(encode_result, entry, *next(outcome)))
            if isinstance(entry, TrainJob)
            else entry
        )
        answers.append(Message(record, reply_to=message))
    return answers, size


def _train_jobs(
    jobs: Sequence[TrainJob], *, size: int, measure: bool
) -> tuple[list[tuple[LocalResult, State]], int]:
    """The jobs of one round, trained; arguments and size as of `train_together`."""
    work, request = jobs[0].work, jobs[0].request
    config, training = work.config, work.config.training
    device = compute_device(training.device)
    train = partial(
        train_cohort,
        work.model().to(device),
        mask=request.mask,
        config=training,
        lr=round_learning_rate(training, request.round_index),
        augmented=config.data.augment,
    )
    members = [job.member for job in jobs]
    with computing(training.threads):
        if measure:
            size = fitting_cohort(
                train, members, batch_size=training.batch_size, at_most=size, device=device
            )
        return train_in_cohorts(train, members, size=size)


def _decoded_job(record: RecordDict, context: Context) -> TrainJob:
    return decode_job(record, context, *_place(context))


def _growth_batch(
    request: TrainRequest, data: ClientData, work: Workspace, client: int
) -> GrowthBatch:
    """One mini-batch, drawn anew, for the gradients at pruned weights after local training."""
    seed = (SEED_GROWTH, work.config.seed, request.round_index, client)
    order = rng(*seed).permutation(len(data.train_labels))
    samples = torch.from_numpy(order[: work.config.training.batch_size])
    return GrowthBatch(request.growth, samples)


def _measure(record: RecordDict, context: Context, work: Workspace, client: int) -> RecordDict:
    pool = _hold_pool(record, context, work)
    data = work.client(client)
    _require_dev(data)
    model = work.model().to(compute_device(work.config.training.device))
    statistics = measure_candidates(model, pool, torch.from_numpy(data.dev_images))
    return wire.encode_reply(MeasureReply(len(data.dev_labels), statistics))


def _score(record: RecordDict, context: Context, work: Workspace, client: int) -> RecordDict:
    pool = _hold_pool(record, context, work)
    data = work.client(client)
    _require_dev(data)
    names = {name for pair in work.batch_norms for name in pair}
    statistics = wire.decode_statistics(
        record, shapes={name: shape for name, shape in work.shapes.items() if name in names}
    )
    model = work.model().to(compute_device(work.config.training.device))
    request = ScoreRequest(pool=pool, statistics=statistics)
    images, labels = torch.from_numpy(data.dev_images), torch.from_numpy(data.dev_labels)
    return wire.encode_reply(score_candidates(model, request, images, labels))


def _require_dev(data: ClientData) -> None:
    if len(data.dev_labels) < 1:
        raise ClientError("no development sample: the client has a single training sample")


# --- what a client remembers -------------------------------------------------------------------


def _held_masks(context: Context, work: Workspace) -> list[Mask]:
    """Masks that the client holds: the current one, or those of the candidate pool."""
    if _MASK in context.state:
        return [_decoded(_mask_bytes(context))]
    stored = _stored_pool(context)
    if stored is None:
        return []
    _, pool = wire.decode_pool(stored, shapes=work.shapes)
    return pool.masks if pool else []


def _mask_bytes(context: Context) -> bytes:
    data = context.state.config_records[_MASK]["mask"]
    assert isinstance(data, bytes)
    return data


@lru_cache(maxsize=8)
def _decoded(data: bytes) -> Mask:
    return Mask.from_csr(decode_mask(data))


def _hold_mask(context: Context, mask: Mask | None) -> None:
    """Remember the current mask; the candidate pool is not needed any more."""
    for key in _POOL_PARTS:
        context.state.pop(key, None)
    if mask is None:
        context.state.pop(_MASK, None)
    elif _MASK not in context.state or mask != _decoded(_mask_bytes(context)):
        context.state[_MASK] = ConfigRecord({"mask": encode_mask(mask.csr())})


def _hold_pool(record: RecordDict, context: Context, work: Workspace) -> Pool:
    """The pool that the message brings or names; remembered for the next step."""
    digest, pool = wire.decode_pool(record, shapes=work.shapes)
    if pool is not None:
        fields, arrays = wire.record_parts(record)
        context.state[_POOL_PARTS[0]], context.state[_POOL_PARTS[1]] = fields, arrays
        return pool
    stored = _stored_pool(context)
    if stored is None:
        raise wire.NeedsResync
    held_digest, held = wire.decode_pool(stored, shapes=work.shapes)
    if held is None or held_digest != digest:
        raise wire.NeedsResync
    return held


def _stored_pool(context: Context) -> RecordDict | None:
    if _POOL_PARTS[0] not in context.state:
        return None
    return wire.join_parts(
        context.state.config_records[_POOL_PARTS[0]], context.state.array_records[_POOL_PARTS[1]]
    )
