"""Clients of a round trained together in this process, with stacked weights."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.flower import wire
from fedprune.flower.client import encode_answer, guarded, open_request, remember
from fedprune.flower.inline import InlineGrid
from fedprune.local.cohort import Member, train_cohort, train_in_cohorts
from fedprune.local.cohort_memory import fitting_cohort
from fedprune.local.optimizer import is_plain, round_sgd
from fedprune.local.site import Local
from fedprune.local.training import (
    SEED_ROUND,
    growth_counts,
    growth_rows,
    require_samples,
    train,
)
from fedprune.rounds.workspace import compute_device
from prunelab.data.tensors import batch_of
from prunelab.runs.threads import computing
from prunelab.training.steps import is_classification
from prunelab.training.task import forward

Job = tuple[Request, Local]


class BatchedGrid(InlineGrid):
    """An InlineGrid whose clients of a round are trained together, with stacked weights.

    The first train reply that is pulled takes the waiting train messages of as many clients
    along as are trained at a time; their replies are kept until they are pulled.

    Args:
        size: clients to train at a time; halved where the GPU's memory ends.
        measure: whether the first round measures how many fit, up to `size`.
    """

    stacked = True

    def __init__(
        self,
        client_app: ClientApp,
        *,
        run_config: dict[str, Any],
        num_nodes: int,
        size: int,
        introduced: bool = False,
        measure: bool = False,
    ) -> None:
        super().__init__(
            client_app, run_config=run_config, num_nodes=num_nodes, introduced=introduced
        )
        self._size, self._measure = size, measure
        self._replies: dict[str, Message] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the clients work, those that train together, and return the replies."""
        for message_id in message_ids:
            waiting = self._messages.get(message_id)
            if waiting is not None and waiting.metadata.message_type == MessageType.TRAIN:
                with self._working():
                    self._train_waiting(message_id)
            if message_id in self._replies:
                yield self._replies.pop(message_id)
            else:
                yield from super().pull_messages([message_id])

    def _train_waiting(self, first: str) -> None:
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
            answers = [wire.error_reply(message, reason) for message in messages]
        self._replies |= dict(zip(chosen, answers, strict=True))


def train_together(
    messages: Sequence[tuple[Message, Context]], *, size: int, measure: bool = False
) -> tuple[list[Message], int]:
    """Answer several clients' train messages with one training of stacked weights.

    Where a method answers "train" in its own way, or asks clients for different things, or the
    step is not the stack's (another optimiser, gradients that are clipped, another task than
    classification, dropout), clients are asked one by one.

    Args:
        messages: train messages of one round, each with its client's context.
        size: how many clients to train at a time.
        measure: whether to train fewer where a first mini-batch says that the GPU holds fewer.

    Returns:
        The answers in the order of the messages, and the size that fitted into memory.
    """
    decoded = [guarded(partial(_opened, message.content, ctx)) for message, ctx in messages]
    jobs = [entry for entry in decoded if isinstance(entry, tuple)]
    replies: Iterable[Reply | RecordDict] = []
    if jobs and _trains_together(jobs[0][1]) and _alike(jobs):
        replies, size = _train_jobs(jobs, size=size, measure=measure)
    elif jobs:
        action = jobs[0][1].config.method.actions["train"]
        replies = [guarded(partial(action, request, _masked(local))) for request, local in jobs]
    outcome, answers = iter(replies), []
    for (message, context), entry in zip(messages, decoded, strict=True):
        answer = next(outcome) if isinstance(entry, tuple) else entry
        if isinstance(entry, tuple):
            if isinstance(answer, Reply):
                answer = guarded(partial(encode_answer, answer, *entry))
            remember(entry[1], context)
        assert isinstance(answer, RecordDict)
        answers.append(Message(answer, reply_to=message))
    return answers, size


def _alike(jobs: Sequence[Job]) -> bool:
    """Whether all train one network under one mask."""
    request, local = jobs[0]
    patterns, program = request.state(MODEL).patterns, local.network.program
    return all(
        r.state(MODEL).patterns == patterns and own.network.program == program for r, own in jobs
    )


def _masked(local: Local) -> Local:
    """The same place, computing with dense kernels as the stack does."""
    training = replace(local.config.training, execution="masked")
    return replace(local, config=replace(local.config, training=training))


def _trains_together(local: Local) -> bool:
    config = local.config
    if config.method.actions["train"] is not train or not is_plain(config.training):
        return False
    return is_classification(local.network.task()) and not _draws(local)


@torch.no_grad()
def _draws(local: Local) -> bool:
    """Whether the network draws random numbers while it trains, as dropout does; by trying."""
    model = local.network.build().train()
    batch = batch_of(local.data.train.inputs[:2], local.data.train.targets[:2])
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        forward(model, batch)
        return not torch.equal(before, torch.get_rng_state())


def _opened(record: RecordDict, context: Context) -> Job:
    request, local = open_request(record, context)
    require_samples(len(local.data.train), request)
    return request, local


def _train_jobs(jobs: Sequence[Job], *, size: int, measure: bool) -> tuple[list[Reply], int]:
    """The jobs of one round, trained; arguments and size as of `train_together`."""
    request, local = jobs[0]
    config, training = local.config, local.config.training
    device = compute_device(training.device)
    with computing(training.threads):
        work = partial(
            train_cohort,
            local.network.build().to(device),
            config=training,
            sgd=round_sgd(training, request.round_index),
            augmented=config.data.augment,
        )
        members = [_member(*job) for job in jobs]
        if measure:
            size = fitting_cohort(
                work, members, batch_size=training.batch_size, at_most=size, device=device
            )
        return train_in_cohorts(work, members, size=size)


def _member(request: Request, local: Local) -> Member:
    counts = growth_counts(request)
    return Member(
        state=request.state(MODEL),
        images=local.data.train.inputs,
        labels=local.data.train.targets,
        seed=local.seed(SEED_ROUND, request.round_index),
        growth=(counts, growth_rows(local, request.round_index)) if counts else None,
        report_resources=request.report_resources,
    )
