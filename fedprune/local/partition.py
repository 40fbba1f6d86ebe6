"""The division of training samples among the server and the clients.

Only the training side is divided: the server's labelled set and every client's development
split come from it, never from test data.
"""

from __future__ import annotations

import numpy as np

from fedprune.given import given_object
from fedprune.local.division import Division
from fedprune.settings import PARTITIONS
from prunelab.data.batches import Integers
from prunelab.errors import DataError
from prunelab.runs.imported import imported

DRAWS = 10  # of a dirichlet partition, before it is refused


UNLABELLED_CLASSES = 10  # as so many count samples without classes, for the server's set


def split_server_set(
    labels: Integers | None, *, per_class: int, seed: int, count: int = 0
) -> tuple[Integers, Integers]:
    """Set a few samples, of each class where there are classes, aside for the server.

    Args:
        labels: int64 [N], of the training side; None where there are no classes.
        per_class: how many of each class, 0 or more; at most half of a class is taken. Samples
            without classes count as one, of which UNLABELLED_CLASSES times as many are taken.
        count: N, where there are no labels.

    Returns:
        Server's and remaining indices, both ascending, disjoint, together 0 ... N - 1.
    """
    if per_class < 0:
        raise DataError(f"server set: expected 0 or more samples of a class, got {per_class}")
    random = np.random.default_rng(seed)
    if labels is None:
        labels, per_class = np.zeros(count, np.int64), UNLABELLED_CLASSES * per_class
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
) -> Division:
    """Divide samples among clients, as flwr-datasets' partitioners do.

    Args:
        labels: int64 [N].
        scheme: iid; dirichlet (each class is dealt out by shares drawn with concentration
            `alpha`); pathological (`classes_per_client` labels each, used equally often to
            within one client); natural (by `groups`, several groups a client where there are
            more groups than clients); or "module:function" of (labels, num_clients, seed) -> each
            client's indices, none in two shares.
        groups: int64 [N], for natural.

    Returns:
        For each client its ascending indices, at least one; every sample is in exactly one, but
        for those that a function leaves out.

    Raises:
        DataError: more clients than samples, groups missing or too few, or a scheme that
            cannot be met with these numbers.
    """
    if ":" in scheme:
        return _by_function(scheme, labels, num_clients, seed)
    if scheme not in PARTITIONS:
        raise DataError(f"unknown partition {scheme!r}; expected one of {', '.join(PARTITIONS)}")
    if not 1 <= num_clients <= len(labels):
        raise DataError(
            f"cannot divide {len(labels)} training samples among {num_clients} clients; "
            "use at least one client, and no more than there are samples"
        )
    # Classes are cut in the order of the rows, so the order is drawn first: neighbours in a file
    # are often alike.
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    values = labels[order]
    if scheme == "iid":
        drawn = _evenly(len(values), np.arange(num_clients))
    elif scheme == "dirichlet":
        drawn = _dirichlet(values, num_clients, alpha, np.random.default_rng(seed))
    elif scheme == "pathological":
        drawn = _pathological(values, num_clients, classes_per_client, random)
    else:
        drawn = _natural(groups, order, num_clients, random)
    owners = np.empty_like(drawn)
    owners[order] = drawn
    division = Division.of_owners(owners, num_clients)
    assert (np.diff(division.ends, prepend=0) > 0).all()
    return division


def _evenly(count: int, owners: Integers) -> Integers:
    """Owners of so many samples in a row, each of as many as np.array_split would give it."""
    sizes = np.full(len(owners), count // len(owners))
    sizes[: count % len(owners)] += 1
    return np.repeat(owners, sizes)


def _by_function(name: str, labels: Integers, num_clients: int, seed: int) -> Division:
    """Shares as a user's function gives them, checked."""
    found = given_object(name)
    try:
        divide = imported(name) if found is None else found
    except ImportError as error:
        raise DataError(f"data.partition {name!r}: {error}") from error
    given = list(divide(labels, num_clients, seed))
    if len(given) != num_clients:
        raise DataError(f"{name} gives {len(given)} shares for {num_clients} clients")
    shares = [np.sort(np.asarray(share)) for share in given]
    for client, share in enumerate(shares):
        if share.ndim != 1 or not len(share) or share.dtype.kind not in "iu":
            raise DataError(
                f"{name}: the share of client {client} is {share.dtype} of shape "
                f"{list(share.shape)}; expected indices [n], at least one"
            )
    everything = np.sort(np.concatenate(shares))
    twice = everything[1:][np.diff(everything) == 0]
    if len(twice) or not 0 <= everything[0] <= everything[-1] < len(labels):
        what = f"{twice[0]} in two shares" if len(twice) else "an index beyond the samples"
        raise DataError(f"{name} has {what}; expected 0 to {len(labels) - 1}, each at most once")
    return Division.of([share.astype(np.int64) for share in shares])


def _dirichlet(
    labels: Integers, num_clients: int, alpha: float, random: np.random.Generator
) -> Integers:
    """Each class cut by shares drawn for it, drawn anew until nobody has too little."""
    # One for development and two to train with: fewer, and the client can never take part.
    smallest = min(3, len(labels) // num_clients)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    owners = np.empty(len(labels), np.int64)
    for _ in range(DRAWS):
        for rows in classes:
            drawn = random.dirichlet(np.full(num_clients, alpha))
            cuts = (np.cumsum(drawn) * len(rows)).astype(np.int64)[:-1]
            sizes = np.diff(cuts, prepend=0, append=len(rows))
            owners[rows] = np.repeat(np.arange(num_clients), sizes)
        if np.bincount(owners, minlength=num_clients).min() >= smallest:
            return owners
    raise DataError(
        f"dirichlet partition of {len(labels)} samples among {num_clients} clients with "
        f"alpha {alpha}: no draw gives every client {smallest} samples; use a larger alpha "
        "or fewer clients"
    )


def _pathological(
    labels: Integers, num_clients: int, per_client: int, random: np.random.Generator
) -> Integers:
    """Parts of one class each, dealt to the clients in turn.

    With `per_client` parts a client every class is reached with as few clients as possible.
    """
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
    owners = np.empty(len(labels), np.int64)
    for label, code, count in zip(classes, codes, wanted, strict=True):
        parts = code + len(classes) * np.arange(count)
        rows = np.flatnonzero(labels == label)
        owners[rows] = _evenly(len(rows), parts // per_client)
    return owners


def _natural(
    groups: Integers | None, order: Integers, num_clients: int, random: np.random.Generator
) -> Integers:
    """As many groups as clients, by an even dealing of the natural ones."""
    if groups is None:
        raise DataError(
            "a natural partition needs a column 'client' in the data; add it, or set "
            "data.partition to another division"
        )
    found, group = np.unique(groups[order], return_inverse=True)
    if len(found) < num_clients:
        raise DataError(
            f"{num_clients} clients but only {len(found)} natural groups; set data.clients to "
            f"{len(found)} or fewer"
        )
    owner = random.permutation(np.arange(len(found)) % num_clients)
    return owner[group]
