"""The division of training samples among the server and the clients.

Only the training side is divided: the server's labelled set and every client's development
split come from it, never from test data.
"""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr
from typing import Any

import numpy as np

from fedprune.settings import PARTITIONS
from prunelab.data.batches import Integers
from prunelab.errors import DataError


def split_server_set(labels: Integers, *, per_class: int, seed: int) -> tuple[Integers, Integers]:
    """Set a few labelled samples of each class aside for the server.

    Args:
        labels: int64 [N], of the training side.
        per_class: how many of each class, 0 or more; at most half of a class is taken.

    Returns:
        Server's and remaining indices, both ascending, disjoint, together 0 ... N - 1.
    """
    if per_class < 0:
        raise DataError(f"server set: expected 0 or more samples of a class, got {per_class}")
    random = np.random.default_rng(seed)
    chosen = [
        random.permutation(members)[: min(per_class, len(members) // 2)]
        for label in np.unique(labels)
        for members in [np.flatnonzero(labels == label)]
    ]
    server = np.sort(np.concatenate(chosen)).astype(np.int64)
    return server, np.setdiff1d(np.arange(len(labels), dtype=np.int64), server)


def partition(
    labels: Integers,
    *,
    num_clients: int,
    scheme: str,
    alpha: float = 0.5,
    classes_per_client: int = 2,
    groups: Integers | None = None,
    seed: int,
) -> list[Integers]:
    """Divide samples among clients with flwr-datasets' partitioners.

    Args:
        labels: int64 [N].
        scheme: iid; dirichlet (each class is dealt out by shares drawn with concentration
            `alpha`); pathological (`classes_per_client` labels each, used equally often to
            within one client); natural (by `groups`, several groups a client where there are
            more groups than clients).
        groups: int64 [N], for natural.

    Returns:
        For each client its ascending indices, at least one; every sample is in exactly one.

    Raises:
        DataError: more clients than samples, groups missing or too few, or a scheme that
            cannot be met with these numbers.
    """
    if scheme not in PARTITIONS:
        raise DataError(f"unknown partition {scheme!r}; expected one of {', '.join(PARTITIONS)}")
    if not 1 <= num_clients <= len(labels):
        raise DataError(
            f"cannot divide {len(labels)} training samples among {num_clients} clients; "
            "use at least one client, and no more than there are samples"
        )
    # The partitioners cut each class in the order of the rows, so the order is drawn first:
    # neighbours in a file are often alike.
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    values = labels[order]
    if scheme == "iid":
        shares = _iid(values, num_clients)
    elif scheme == "dirichlet":
        shares = _dirichlet(values, num_clients, alpha, seed)
    elif scheme == "pathological":
        shares = _pathological(values, num_clients, classes_per_client, random)
    else:
        shares = _natural(groups, order, num_clients, random)
    assert sum(map(len, shares)) == len(labels)
    assert all(len(share) for share in shares)
    return [np.sort(order[share]) for share in shares]


def _iid(labels: Integers, num_clients: int) -> list[Integers]:
    from flwr_datasets.partitioner import IidPartitioner  # noqa: PLC0415

    return _divide(labels, IidPartitioner(num_partitions=num_clients), num_clients)


def _dirichlet(labels: Integers, num_clients: int, alpha: float, seed: int) -> list[Integers]:
    from flwr_datasets.partitioner import DirichletPartitioner  # noqa: PLC0415

    # One for development and two to train with: fewer, and the client can never take part.
    smallest = min(3, len(labels) // num_clients)
    try:
        divider = DirichletPartitioner(
            num_partitions=num_clients,
            partition_by="key",
            alpha=float(alpha),
            min_partition_size=smallest,
            self_balancing=False,
            seed=seed,
        )
        return _divide(labels, divider, num_clients)
    except ValueError as error:
        raise DataError(
            f"dirichlet partition of {len(labels)} samples among {num_clients} clients with "
            f"alpha {alpha}: no draw gives every client {smallest} samples; use a larger alpha "
            f"or fewer clients ({str(error)[:100]})"
        ) from None


def _pathological(
    labels: Integers, num_clients: int, per_client: int, random: np.random.Generator
) -> list[Integers]:
    """Parts of one class each, dealt to the clients in turn.

    Asking the partitioner for single-class parts, `per_client` of them a client, reaches every
    class with as few clients as possible; its own assignments leave classes, and so samples, out.
    """
    from flwr_datasets.partitioner import PathologicalPartitioner  # noqa: PLC0415

    classes, sizes = np.unique(labels, return_counts=True)
    num_parts = num_clients * per_client
    if not 1 <= per_client <= len(classes) <= num_parts:
        raise DataError(
            f"pathological partition: {num_clients} clients of {per_client} classes each cannot "
            f"hold {len(classes)} classes; classes_per_client must be 1 to {len(classes)}, and "
            "clients times classes_per_client at least the number of classes"
        )
    codes = random.permutation(len(classes))
    wanted = num_parts // len(classes) + (codes < num_parts % len(classes))
    short = np.flatnonzero(sizes < wanted)
    if len(short):
        first = short[0]
        raise DataError(
            f"pathological partition: class {classes[first]} has {sizes[first]} samples for "
            f"{wanted[first]} clients; use fewer clients or classes_per_client"
        )
    divider = PathologicalPartitioner(
        num_partitions=num_parts,
        partition_by="key",
        num_classes_per_partition=1,
        class_assignment_mode="deterministic",
        shuffle=False,
    )
    parts = _divide(codes[np.searchsorted(classes, labels)], divider, num_parts)
    starts = range(0, num_parts, per_client)
    return [np.concatenate(parts[start : start + per_client]) for start in starts]


def _natural(
    groups: Integers | None, order: Integers, num_clients: int, random: np.random.Generator
) -> list[Integers]:
    """As many groups as clients, by an even dealing of the natural ones."""
    from flwr_datasets.partitioner import NaturalIdPartitioner  # noqa: PLC0415

    if groups is None:
        raise DataError("a natural partition needs a column 'client' in the data")
    found, group = np.unique(groups[order], return_inverse=True)
    if len(found) < num_clients:
        raise DataError(f"{num_clients} clients but only {len(found)} natural groups")
    owner = random.permutation(np.arange(len(found)) % num_clients)
    return _divide(owner[group], NaturalIdPartitioner(partition_by="key"), num_clients)


def _divide(keys: Integers, divider: Any, num_parts: int) -> list[Integers]:
    """Row numbers of each part that a flwr-datasets partitioner makes of rows with `keys`."""
    import datasets  # noqa: PLC0415

    # It warns at every draw that is repeated, and shows bars: noise before a run.
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        divider.dataset = datasets.Dataset.from_dict({"row": np.arange(len(keys)), "key": keys})
        parts = [divider.load_partition(part) for part in range(num_parts)]
        return [part.with_format("numpy")[:]["row"].astype(np.int64) for part in parts]
