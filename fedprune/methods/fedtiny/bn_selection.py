"""FedTiny's adaptive batch-norm selection: which coarse mask suits the clients' data.

Clients measure every candidate's batch-norm statistics on their development split, the server
pools them, clients evaluate every candidate with the pooled statistics, and the candidate of
smallest weighted loss wins. Forward passes only.

Departs from the paper: a client's statistics are the exact mean and population variance of
what its batch norms saw, instead of a momentum average of batches, so that the pooled values
are those of the union of the clients' data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedprune.exchange.aggregate import WeightedMean
from fedprune.exchange.messages import (
    MeasureReply,
    MeasureRequest,
    Pool,
    ScoreReply,
    ScoreRequest,
    State,
)
from fedprune.local.training import EVALUATION_BATCH, evaluate
from fedprune.methods.base import Ask
from prunelab.data.tensors import prepare
from prunelab.errors import RunError
from prunelab.networks import batch_norm_pairs, load_float_state_

BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def measure_batch_norms(model: nn.Module, images: torch.Tensor) -> State:
    """Exact statistics of the input of every batch norm over `images`, in train mode.

    Args:
        images: [N, C, H, W]; passes in batches, each normalised by its own statistics.

    Returns:
        running-mean and running-variance names of the model -> float32 [channels]: the mean
        and population variance over all samples and positions. Weights and buffers of the
        model are left as they were.
    """
    device = next(model.parameters()).device
    sums: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}
    was_training = model.training
    model.train()
    with _recording(model, sums):
        for batch in images.split(EVALUATION_BATCH):
            model(prepare(batch).to(device))
    model.train(was_training)
    statistics: State = {}
    for name, (total, squares, count) in sums.items():
        mean = total / count
        statistics[f"{name}.running_mean"] = mean.float().cpu()
        statistics[f"{name}.running_var"] = (squares / count - mean**2).clamp_min(0).float().cpu()
    return statistics


@contextmanager
def _recording(
    model: nn.Module, sums: dict[str, tuple[torch.Tensor, torch.Tensor, int]]
) -> Iterator[None]:
    """Add up each batch norm's input and its square in float64; running buffers stand still."""
    handles: list[Any] = []
    momenta: dict[str, float | None] = {}
    norms = {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm)}

    def record(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1).double()
        total, squares, count = values.sum(1), (values**2).sum(1), values.shape[1]
        if name in sums:
            old = sums[name]
            total, squares, count = old[0] + total, old[1] + squares, old[2] + count
        sums[name] = (total, squares, count)

    for name, norm in norms.items():
        momenta[name], norm.momentum = norm.momentum, 0.0
        handles.append(
            norm.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            norm.momentum = momenta[name]


def measure_candidates(model: nn.Module, pool: Pool, images: torch.Tensor) -> list[State]:
    """Client side, first step: statistics of every candidate on the development split."""
    statistics = []
    for mask in pool.masks:
        load_float_state_(model, pool.weights)
        mask.apply(model)
        statistics.append(measure_batch_norms(model, images))
    return statistics


def score_candidates(
    model: nn.Module, request: ScoreRequest, images: torch.Tensor, labels: torch.Tensor
) -> ScoreReply:
    """Client side, second step: loss of every candidate with the statistics it was given."""
    losses, correct = [], []
    for mask, statistics in zip(request.pool.masks, request.statistics, strict=True):
        load_float_state_(model, {**request.pool.weights, **statistics})
        mask.apply(model)
        result = evaluate(model, images, labels)
        losses.append(result.loss_sum)
        correct.append(result.num_correct)
    return ScoreReply(num_examples=len(labels), loss_sums=losses, num_correct=correct)


def pool_statistics(
    replies: Iterable[MeasureReply], pairs: list[tuple[str, str]], num_candidates: int
) -> list[State]:
    """Server side: pooled statistics of every candidate, weighted by the clients' samples.

    μ = Σ p_k μ_k and σ² = Σ p_k (σ_k² + μ_k²) − μ²: those of the union of the data.

    Raises:
        RunError: no client measured anything.
    """
    means = [WeightedMean(pairs) for _ in range(num_candidates)]
    for reply in replies:
        for mean, statistics in zip(means, reply.statistics, strict=True):
            mean.add(statistics, weight=reply.num_examples)
    if means[0].num_replies == 0:
        raise RunError(
            "candidate selection: no client could measure batch-norm statistics; "
            "give clients more samples (fewer clients) or use method 'magnitude'"
        )
    return [mean.result() for mean in means]


def select_candidate(
    model: nn.Module, pool: Pool, ask: Ask, *, adaptive: bool
) -> tuple[int, State, dict[str, Any]]:
    """Run both steps over the clients and choose.

    Args:
        adaptive: False is the ablation "vanilla selection": candidates are evaluated with the
            pre-trained model's statistics and no adaptation takes place.

    Returns:
        The winner's index, its batch-norm statistics, and a JSON account for the report.
    """
    pairs = batch_norm_pairs(model)
    if adaptive:
        replies = (reply for _, reply in ask(MeasureRequest(pool)))
        measured = (reply for reply in replies if isinstance(reply, MeasureReply))
        statistics = pool_statistics(measured, pairs, len(pool.masks))
    else:
        names = [name for pair in pairs for name in pair]
        statistics = [{name: pool.weights[name] for name in names}] * len(pool.masks)
    # Losses of all clients are kept and added in client order: the sum must not depend on
    # the order in which replies arrive, and it is one number for each client.
    scores: dict[int, ScoreReply] = {}
    for client, reply in ask(ScoreRequest(pool, statistics)):
        if isinstance(reply, ScoreReply):
            scores[client] = reply
    samples = sum(reply.num_examples for reply in scores.values())
    if samples == 0:
        raise RunError("candidate selection: no client could evaluate the candidates")
    ordered = [scores[client] for client in sorted(scores)]
    losses = [sum(r.loss_sums[c] for r in ordered) / samples for c in range(len(pool.masks))]
    correct = [sum(r.num_correct[c] for r in ordered) / samples for c in range(len(pool.masks))]
    winner = min(range(len(losses)), key=lambda c: (losses[c], c))
    account = {
        "adaptive": adaptive,
        "winner": winner,
        "losses": losses,
        "accuracies": correct,
        "densities": [mask.densities() for mask in pool.masks],
        "clients": sorted(scores),
    }
    return winner, statistics[winner], account
