"""FedTiny's adaptive batch-norm selection: which coarse mask suits the clients' data.

Clients measure every candidate's batch-norm statistics on their development split, the server
pools them, clients evaluate every candidate with the pooled statistics, and the candidate of
smallest weighted loss wins. Forward passes only, one candidate in memory at a time.

Departs from the paper: a client's statistics are the exact mean and population variance of
what its batch norms saw, instead of a momentum average of batches, so that the pooled values
are those of the union of the clients' data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedprune.errors import ClientError
from fedprune.exchange.messages import Expected, Reply, Request, losses, metrics
from fedprune.exchange.pooled import Pooler
from fedprune.local.model import LocalModel
from fedprune.methods.fedtiny.pool import Pool, pool_request, received_pool
from prunelab.errors import RunError
from sparsemodel.runtime.state import Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local

# --- client half -------------------------------------------------------------------------------


def measure(request: Request, local: Local) -> Reply:
    """First step: statistics of every candidate on the development split."""
    inputs = dev_inputs(local)
    tensors = {
        str(number): model.statistics(inputs)
        for number, model in _candidates(received_pool(request), local)
    }
    return Reply(len(inputs), tensors=tensors)


def score(request: Request, local: Local) -> Reply:
    """Second step: loss of every candidate with the statistics that it was given."""
    inputs = dev_inputs(local)
    pool = received_pool(request)
    if set(request.tensors) != {str(number) for number in range(len(pool))}:
        raise ClientError("expected statistics of every candidate")
    scores = [
        model.evaluate(inputs, local.data.dev.targets)
        for _, model in _candidates(pool, local, request.tensors)
    ]
    sums = {"losses": [s.loss_sum for s in scores], "metrics": [s.metric_sum for s in scores]}
    return Reply(len(inputs), sums)


def dev_inputs(local: Local) -> Any:
    """A client's development samples.

    Raises:
        ClientError: it has none.
    """
    if len(local.data.dev) < 1:
        raise ClientError("no development sample: the client has a single training sample")
    return local.data.dev.inputs


def _candidates(
    pool: Pool, local: Local, statistics: dict[str, Tensors] | Any = None
) -> Iterator[tuple[int, LocalModel]]:
    """Each candidate's number, and a model that holds it until the next."""
    model: LocalModel | None = None
    for number in range(len(pool)):
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
    pool: Pool, ask: Pooler, *, adaptive: bool, metric: str
) -> tuple[int, Tensors, dict[str, Any]]:
    """Run both steps over the clients and choose.

    Args:
        ask: reaches the clients and adds up their answers. Of statistics μ = Σ p_k μ_k and
            σ² = Σ p_k (σ_k² + μ_k²) − μ²: those of the union of the data.
        adaptive: False is the ablation "vanilla selection": candidates are evaluated with the
            pre-trained model's statistics and no adaptation takes place.
        metric: what the task's metric is called; for the account alone.

    Returns:
        The winner's index, its batch-norm statistics, and a JSON account for the report.

    Raises:
        RunError: no client could measure, or none could evaluate.
    """
    size, names = len(pool), statistics_of(pool)
    statistics: list[Tensors]
    if adaptive:
        expected = Expected(tensors={str(number): names for number in range(size)})
        measured = ask(pool_request(pool, "measure", expected=expected))
        if not measured.clients:
            raise RunError(
                "candidate selection: no client could measure the candidates' batch-norm statistics"
            )
        statistics = [measured.tensors[str(number)] for number in range(size)]
    else:
        statistics = [{name: pool.values(c)[name] for name in names} for c in range(size)]
    request = pool_request(
        pool,
        "score",
        tensors={str(number): each for number, each in enumerate(statistics)},
        expected=Expected(sums={"losses": size, "metrics": size}),
        check=check_scores(size, metric),
    )
    scores = ask(request)
    if not scores.clients:
        raise RunError("candidate selection: no client could evaluate the candidates")
    mean_losses = scores.fields["losses"]
    winner = min(range(size), key=lambda c: (mean_losses[c], c))
    account = {
        "adaptive": adaptive,
        "winner": winner,
        "losses": mean_losses,
        "metrics": scores.fields["metrics"],
        "densities": densities_of(pool),
        "clients": list(scores.clients),
    }
    return winner, statistics[winner], account


STATISTICS = (".running_mean", ".running_var")


def statistics_of(pool: Pool) -> list[str]:
    """Names of the running statistics of batch norms."""
    return [name for name in pool.union.values if name.endswith(STATISTICS)]


def densities_of(pool: Pool) -> list[dict[str, float]]:
    """For each candidate: layer -> its density."""
    assert pool.union.patterns is not None
    sizes = {name: p.num_weights for name, p in pool.union.patterns.items()}
    return [{name: count / sizes[name] for name, count in each.items()} for each in pool.kept()]


def check_scores(size: int, metric: str) -> Any:
    """What refuses losses and metrics of candidates that cannot be."""

    def check(reply: Reply) -> None:
        losses(reply.fields, "losses", size, reply.num_examples)
        metrics(reply.fields, "metrics", size, reply.num_examples, metric=metric)

    return check
