"""Selections that look at how candidates train, for when all of them have forgotten the same.

At low densities every candidate's loss is that of guessing, and batch-norm statistics cannot tell
them apart. "steps" lets each take the same few local steps on the client's training samples and
compares losses on its development samples after them. "flow" compares the squared norm of the
gradient at the mask, ‖Σ_b n_b g_b / Σ_b n_b‖² over a few mini-batches: the rate at which gradient
descent on those weights lowers the client's loss at the start (gradient flow; Evci et al., Gradient
Flow in Sparse Neural Networks and How Lottery Tickets Win, AAAI 2022).

One question, one answer: the pool goes down once, and of each candidate its batch-norm statistics,
measured before any step, and one number or two come up.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprune.errors import ClientError
from fedprune.exchange.messages import Expected, Reply, Request, count, number
from fedprune.exchange.pooled import Pooler
from fedprune.local.model import LocalModel, Sgd
from fedprune.local.optimizer import Optimizer
from fedprune.local.training import epoch_batches, require_samples
from fedprune.methods.fedtiny.pool import POOL, Pool, pool_request, received_pool
from fedprune.methods.fedtiny.selection import (
    check_scores,
    densities_of,
    dev_inputs,
    statistics_of,
)
from prunelab.errors import RunError
from prunelab.runs.seeds import stream_seed
from sparsemodel.runtime.state import SparseState, Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local

STEPS, FLOW = "steps", "flow"
SEED_TRIAL = 14  # the first part of a derived seed says what it is for


# --- client half -------------------------------------------------------------------------------


def try_steps(request: Request, local: Local) -> Reply:
    """Each candidate's loss on the development samples after the same few local steps."""
    inputs, batches = dev_inputs(local), _batches(request, local)
    tensors, losses, hits = {}, [], []
    for place, state, model in _opened(request, local):
        tensors[str(place)] = model.statistics(inputs)
        optimizer = Optimizer(local.config.training, 0)
        model.load(state)
        for step, (images, labels) in enumerate(batches):
            drawn = stream_seed(SEED_TRIAL, local.client, step)
            correction = optimizer.correction
            model.step(images, labels, sgd=optimizer.sgd, correction=correction, seed=drawn)
        # Running statistics have hardly moved in so few steps.
        model.load(model.state().replace(model.statistics(inputs)))
        score = model.evaluate(inputs, local.data.dev.targets)
        losses.append(score.loss_sum)
        hits.append(score.metric_sum)
    return Reply(len(inputs), {"losses": losses, "metrics": hits}, tensors=tensors)


def measure_flow(request: Request, local: Local) -> Reply:
    """Each candidate's squared norm of the mean gradient at its mask, times the samples."""
    inputs, batches = dev_inputs(local), _batches(request, local)
    tensors, flows = {}, []
    for place, state, model in _opened(request, local):
        tensors[str(place)] = model.statistics(inputs)
        model.load(state)
        flows.append(len(inputs) * _squared_norm(model, state, batches))
    return Reply(len(inputs), {"flows": flows}, tensors=tensors)


def _squared_norm(model: LocalModel, state: SparseState, batches: list[tuple[Any, Any]]) -> float:
    names = list(state.patterns or ())
    sums = {name: np.zeros(len(state.values[name])) for name in names}

    def collect(_: Tensors, gradients: Tensors) -> None:
        for name in names:
            sums[name] += len(labels) * gradients[name].astype(np.float64)

    for images, labels in batches:
        model.step(images, labels, sgd=Sgd(0.0, 0.0, 0.0), correction=collect)
    samples = sum(len(labels) for _, labels in batches)
    return float(sum((total**2).sum() for total in sums.values())) / samples**2


def _batches(request: Request, local: Local) -> list[tuple[Any, Any]]:
    """The mini-batches of the question's many steps, the same for every candidate."""
    data, steps = local.data.train, count(request.fields, "steps")
    require_samples(len(data), request, POOL)
    if not 1 <= steps <= MOST_STEPS:
        raise ClientError(f"field 'steps': expected 1 to {MOST_STEPS}, got {steps}")
    source = epoch_batches(
        data.inputs,
        data.targets,
        epochs=steps,  # at most: each has one batch or more
        batch_size=local.config.training.batch_size,
        seed=local.seed(SEED_TRIAL),
        augmented=local.config.data.augment,
    )
    return [(images, labels) for _, images, labels in islice(source, steps)]


MOST_STEPS = 1000


def _opened(request: Request, local: Local) -> Any:
    """Each candidate's number and state, and a model that holds it until the next."""
    pool, model = received_pool(request), None
    for place in range(len(pool)):
        state = pool.candidate(place)
        if model is None:
            model = local.open(state)
        else:
            model.load(state)
        yield place, state, model


# --- server half -------------------------------------------------------------------------------


def select_by_trial(
    pool: Pool, ask: Pooler, *, selection: str, steps: int, metric: str
) -> tuple[int, Tensors, dict[str, Any]]:
    """Ask the clients, once, and choose: smallest loss after steps, or largest flow.

    Args:
        selection: STEPS or FLOW.
        steps: local steps, or mini-batches of the gradient.

    Returns:
        As `selection.select_candidate`.

    Raises:
        RunError: no client could answer.
    """
    size, names = len(pool), statistics_of(pool)
    by_steps = selection == STEPS
    request = pool_request(
        pool,
        selection,
        fields={"steps": steps},
        passes=3 if by_steps else 1,  # statistics, before and after, and losses
        batch_passes=pool.kept() * (3 * steps),
        expected=Expected(
            sums=dict.fromkeys(("losses", "metrics") if by_steps else ("flows",), size),
            tensors={str(place): names for place in range(size)},
        ),
        check=check_scores(size, metric) if by_steps else _check_flows,
    )
    found = ask(request)
    if not found.clients:
        raise RunError(f"candidate selection by {selection}: no client could try the candidates")
    scores = found.fields["losses"] if by_steps else [-flow for flow in found.fields["flows"]]
    winner = min(range(size), key=lambda place: (scores[place], place))
    account = {
        "selection": selection,
        "winner": winner,
        **{name: found.fields[name] for name in request.expected.sums},
        "densities": densities_of(pool),
        "clients": list(found.clients),
    }
    return winner, found.tensors[str(winner)], account


def _check_flows(reply: Reply) -> None:
    for flow in reply.fields["flows"]:
        if number({"flows": flow}, "flows") < 0:
            raise ClientError(f"field 'flows': expected 0 or more, got {flow}")
