"""The global model on test data, the server's or the clients' own, for the record only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fedprune.exchange.messages import (
    EVALUATE,
    MODEL,
    Expected,
    Reply,
    Request,
    loss,
    metrics,
)
from fedprune.exchange.pooled import Pooler
from fedprune.local.model import LocalModel, Network, open_model
from fedprune.local.site import other_network
from fedprune.methods.base import Ask
from fedprune.rounds.setup import Setup
from prunelab.data.store import SampleStore
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState

BATCH = 64  # of the runtime: enough for its kernels, little memory


@dataclass(frozen=True)
class Tested:
    """What a test gave.

    Attributes:
        loss, metric: means over the samples.
        clients: of each client that tested on its own: number, samples, loss, metric; empty where
            nobody's answer is seen alone.
    """

    loss: float
    metric: float
    clients: list[dict[str, Any]] = field(default_factory=list)


class Evaluator:
    """Evaluates states of the run's network; the model is kept and only its values change.

    Args:
        ask: reaches the clients.
        pooler: adds up their answers where single ones are not to be seen.
    """

    def __init__(self, setup: Setup, ask: Ask, *, pooler: Pooler | None = None) -> None:
        self._setup, self._ask, self._pooler = setup, ask, pooler
        self._model: LocalModel | None = None
        self._dense = False

    def evaluate(
        self,
        state: SparseState,
        *,
        round_index: int,
        personal: Callable[[int], SparseState] | None = None,
    ) -> Tested | None:
        """Means over the test samples; None where no client could test.

        Args:
            personal: client -> what it tests in place of `state`, where clients test.
        """
        test = self._setup.test
        if test is None:
            ask = partial(evaluation_request, round_index=round_index, metric=self._setup.metric)
            request = ask(state)
            if personal is not None:
                request = replace(request, personal=lambda client: ask(personal(client)))
            if self._pooler is None:
                return joined(self._ask(request))
            means = self._pooler(request)
            return Tested(**means.fields) if means.clients else None
        dense = state.patterns is None
        if self._model is None or dense != self._dense:
            self._model = _opened(self._setup, self._setup.network, state)
            self._dense = dense
        else:
            self._model.load(state)
        return _tested(self._model, test)


def tested_by_server(setup: Setup, program: Program, state: SparseState) -> Tested | None:
    """Another network than the run's on the server's test samples; None where clients test."""
    if setup.test is None:
        return None
    return _tested(_opened(setup, other_network(program), state), setup.test)


def _opened(setup: Setup, network: Network, state: SparseState) -> LocalModel:
    training = replace(setup.config.training, batch_size=BATCH - 1)
    return open_model(network, state, training)


def _tested(model: LocalModel, test: SampleStore) -> Tested:
    score = model.evaluate(test.inputs, test.targets)
    return Tested(score.loss_sum / len(test), score.metric_sum / len(test))


def evaluation_request(state: SparseState, round_index: int, *, metric: str) -> Request:
    """The question how a model does on clients' own test samples; they keep it for the round.

    Args:
        metric: what the task's metric is called; hits of "accuracy" are whole numbers.
    """

    def check(reply: Reply) -> None:
        loss(reply.fields, "loss", reply.num_examples)
        sums = {"metric": [reply.fields["metric"]]}
        metrics(sums, "metric", 1, reply.num_examples, metric=metric)

    return Request(
        EVALUATE,
        round_index,
        states={MODEL: state},
        hold=frozenset([MODEL]),
        expected=Expected(sums={"loss": 0, "metric": 0}),
        on="test",
        check=check,
    )


def joined(replies: Iterable[tuple[int, Reply]]) -> Tested | None:
    """The clients' results, weighted by what each counts for, added up in the order of clients."""
    ordered = sorted(replies, key=lambda pair: pair[0])
    total = sum(reply.weight for _, reply in ordered)
    if not total:
        return None
    means = [
        (reply.weight, *(reply.fields[key] / reply.num_examples for key in ("loss", "metric")))
        for _, reply in ordered
    ]
    each = [
        {"client": client, "samples": reply.num_examples, "loss": own[1], "metric": own[2]}
        for (client, reply), own in zip(ordered, means, strict=True)
    ]
    loss_sum, metric_sum = (sum(own[0] * own[place] for own in means) for place in (1, 2))
    return Tested(loss_sum / total, metric_sum / total, each)
