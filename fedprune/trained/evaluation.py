"""How good a model is: in all, class by class, and client by client; numpy alone.

Shares of nothing are None, never NaN: a class that the data lack has no recall, one that was never
said has no precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class ClassScore:
    """One class.

    Attributes:
        count: samples of it in the data.
        precision: share of those called so that are; None where none is called so.
        recall: share of its samples that are called so; None where the data have none.
    """

    name: str
    count: int
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class ClientScore:
    """One client, on samples of its own.

    Attributes:
        loss, metric: means over them; None where it has none.
    """

    client: int
    samples: int
    loss: float | None
    metric: float | None


@dataclass(frozen=True)
class Fairness:
    """How evenly clients are served, each counting the same; of those with samples.

    Attributes:
        worst_client: its number, the lowest of several.
        worst: its accuracy.
        percentile_10: a tenth of the clients do worse.
        spread: standard deviation of the clients' accuracies.
    """

    worst_client: int
    worst: float
    percentile_10: float
    spread: float


@dataclass(frozen=True)
class Evaluation:
    """What `Trained.evaluate` found.

    Attributes:
        data: what it was evaluated on.
        samples: how many.
        loss, metric: means over samples; `metric_name` says of what, "" where there is none.
        classes: of a model that tells classes apart, in their order.
        clients: where the run says how its data were divided.
        clients_on: which of their samples: "test" (seen by nothing before) or "development" (no
            training, but masks may have been chosen by them).
        fairness: where there are clients and the metric is accuracy.
    """

    data: str
    samples: int
    loss: float
    metric_name: str
    metric: float | None
    classes: tuple[ClassScore, ...] = ()
    clients: tuple[ClientScore, ...] = ()
    clients_on: str = ""
    fairness: Fairness | None = None

    @property
    def accuracy(self) -> float | None:
        """The metric where it is accuracy."""
        return self.metric if self.metric_name == "accuracy" else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with the metric under its own name too."""
        return asdict(self) | ({"accuracy": self.accuracy} if self.accuracy is not None else {})


def class_scores(labels: Array, predicted: Array, names: Sequence[str]) -> tuple[ClassScore, ...]:
    """Precision, recall and count of each class.

    Args:
        labels: int64 [N], 0 ... len(names) - 1.
        predicted: int64 [N], any class.

    >>> for score in class_scores(np.array([0, 0, 1]), np.array([0, 1, 1]), ["a", "b", "c"]):
    ...     print(score.name, score.count, score.precision, score.recall)
    a 2 1.0 0.5
    b 1 0.5 1.0
    c 0 None None
    """
    scores = []
    for number, name in enumerate(names):
        is_it, is_said = labels == number, predicted == number
        hits, count, said = (int(mask.sum()) for mask in (is_it & is_said, is_it, is_said))
        scores.append(
            ClassScore(name, count, hits / said if said else None, hits / count if count else None)
        )
    return tuple(scores)


def client_scores(
    owners: Array, losses: Array, metrics: Array | None, *, num_clients: int
) -> tuple[ClientScore, ...]:
    """Means over each client's samples.

    Args:
        owners: int64 [N], the client of each sample.
        losses, metrics: float64 [N].
    """
    scores = []
    for client in range(num_clients):
        own = owners == client
        count = int(own.sum())
        loss, metric = (
            float(values[own].mean()) if count and values is not None else None
            for values in (losses, metrics)
        )
        scores.append(ClientScore(client, count, loss, metric))
    return tuple(scores)


def fairness(clients: Sequence[ClientScore]) -> Fairness | None:
    """Worst, tenth percentile and spread of the clients' accuracies; None where nobody has any.

    >>> fairness([ClientScore(0, 5, 1.0, 0.5), ClientScore(1, 0, None, None),
    ...           ClientScore(2, 5, 1.0, 1.0)])
    Fairness(worst_client=0, worst=0.5, percentile_10=0.55, spread=0.25)
    """
    known = {score.client: score.metric for score in clients if score.metric is not None}
    if not known:
        return None
    worst = min(known, key=lambda client: (known[client], client))
    values = np.array(list(known.values()))
    tenth = float(np.percentile(values, 10))
    return Fairness(worst, known[worst], round(tenth, 12), float(values.std()))
