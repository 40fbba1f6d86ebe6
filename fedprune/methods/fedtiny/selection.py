"""FedTiny's adaptive batch-norm selection: which coarse mask suits the clients' data.

Clients measure every candidate's batch-norm statistics on their development split, the server
pools them, clients evaluate every candidate with the pooled statistics, and the candidate of
smallest weighted loss wins. Forward passes only, one candidate in memory at a time.

Departs from the paper: a client's statistics are the exact mean and population variance of
what its batch norms saw, instead of a momentum average of batches, so that the pooled values
are those of the union of the clients' data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fedprune.errors import ClientError
from fedprune.exchange.messages import Expected, Reply, Request, losses, metrics
from fedprune.exchange.robust import MEAN, Aggregation
from fedprune.local.model import LocalModel
from fedprune.methods.fedtiny.pool import Pool, pool_request, received_pool
from prunelab.errors import RunError
from sparsemodel.runtime.state import SparseState, Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local
    from fedprune.methods.base import Ask

# --- client half -------------------------------------------------------------------------------


def measure(request: Request, local: Local) -> Reply:
    """First step: statistics of every candidate on the development split."""
    inputs = _dev_inputs(local)
    tensors = {
        str(number): model.statistics(inputs)
        for number, model in _candidates(received_pool(request), local)
    }
    return Reply(len(inputs), tensors=tensors)


def score(request: Request, local: Local) -> Reply:
    """Second step: loss of every candidate with the statistics that it was given."""
    inputs = _dev_inputs(local)
    pool = received_pool(request)
    if set(request.tensors) != {str(number) for number in range(len(pool.counts))}:
        raise ClientError("expected statistics of every candidate")
    scores = [
        model.evaluate(inputs, local.data.dev.targets)
        for _, model in _candidates(pool, local, request.tensors)
    ]
    sums = {"losses": [s.loss_sum for s in scores], "metrics": [s.metric_sum for s in scores]}
    return Reply(len(inputs), sums)


def _dev_inputs(local: Local) -> Any:
    if len(local.data.dev) < 1:
        raise ClientError("no development sample: the client has a single training sample")
    return local.data.dev.inputs


def _candidates(
    pool: Pool, local: Local, statistics: dict[str, Tensors] | Any = None
) -> Iterator[tuple[int, LocalModel]]:
    """Each candidate's number, and a model that holds it until the next."""
    model: LocalModel | None = None
    for number in range(len(pool.counts)):
        state = pool.candidate(number)
        if statistics is not None:
            state = state.replace(statistics[str(number)])
        if model is None:
            model = local.open(state)
        else:
            model.load(state)
        yield number, model


# --- server half -------------------------------------------------------------------------------


def select_candidate(
    pool: Pool,
    ask: Ask,
    *,
    adaptive: bool,
    metric: str,
    aggregation: Aggregation = MEAN,
) -> tuple[int, Tensors, dict[str, Any]]:
    """Run both steps over the clients and choose.

    Args:
        adaptive: False is the ablation "vanilla selection": candidates are evaluated with the
            pre-trained model's statistics and no adaptation takes place.
        metric: what the task's metric is called; for the account alone.

    Returns:
        The winner's index, its batch-norm statistics, and a JSON account for the report.
    """
    size = len(pool.counts)
    names = [name for name in pool.union.values if name.endswith(STATISTICS)]
    if adaptive:
        expected = Expected(tensors={str(number): names for number in range(size)})
        request = pool_request(pool, "measure", expected=expected)
        statistics = pool_statistics(
            (reply for _, reply in ask(request)), size, aggregation=aggregation
        )
    else:
        statistics = [{name: pool.union.values[name] for name in names}] * size
    # Losses of all clients are kept and added in client order: the sum must not depend on
    # the order in which replies arrive, and it is one number for each client.
    request = pool_request(
        pool,
        "score",
        tensors={str(number): each for number, each in enumerate(statistics)},
        expected=Expected(fields=["losses", "metrics"]),
        check=_check_scores(size, metric),
    )
    scores = dict(ask(request))
    if not scores:
        raise RunError("candidate selection: no client could evaluate the candidates")
    ordered = [scores[client] for client in sorted(scores)]
    samples = [reply.num_examples for reply in ordered]
    weights = [reply.weight for reply in ordered]

    def means(key: str) -> list[float]:
        sums = [[reply.fields[key][c] for reply in ordered] for c in range(size)]
        return [aggregation.mean_of(own, samples=samples, weights=weights) for own in sums]

    mean_losses = means("losses")
    winner = min(range(size), key=lambda c: (mean_losses[c], c))
    assert pool.union.patterns is not None
    sizes = {name: p.num_weights for name, p in pool.union.patterns.items()}
    account = {
        "adaptive": adaptive,
        "winner": winner,
        "losses": mean_losses,
        "metrics": means("metrics"),
        "densities": [
            {name: count / sizes[name] for name, count in each.items()} for each in pool.counts
        ],
        "clients": sorted(scores),
    }
    return winner, statistics[winner], account


STATISTICS = (".running_mean", ".running_var")


def pool_statistics(
    replies: Iterable[Reply], num_candidates: int, *, aggregation: Aggregation = MEAN
) -> list[Tensors]:
    """Pooled statistics of every candidate, by default weighted by the clients' samples.

    μ = Σ p_k μ_k and σ² = Σ p_k (σ_k² + μ_k²) − μ²: those of the union of the data.

    Raises:
        RunError: no client measured anything.
    """
    means = [aggregation.states() for _ in range(num_candidates)]
    for reply in replies:
        for number, mean in enumerate(means):
            mean.add(SparseState(reply.tensors[str(number)]), weight=reply.weight)
    if means[0].num_replies == 0:
        raise RunError(
            "candidate selection: no client could measure the candidates' batch-norm statistics"
        )
    return [mean.result().values for mean in means]


def _check_scores(size: int, metric: str) -> Any:
    def check(reply: Reply) -> None:
        losses(reply.fields, "losses", size, reply.num_examples)
        metrics(reply.fields, "metrics", size, reply.num_examples, metric=metric)

    return check
