"""The clients of a run as its metrics tell of them: each by itself, or of very many the sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedprune.exchange.messages import ClientInfo

LISTED = 1000  # clients that are told of one by one: 100 kB of metrics


def told(clients: Mapping[int, ClientInfo]) -> dict[str, Any]:
    """What the line "start" says of the clients: the first LISTED, and of more the sums of all."""
    numbers, listed = sorted(clients), list[dict[str, Any]]()
    sizes = np.empty((len(numbers), 3), "<i8")
    for row, info in enumerate(map(clients.__getitem__, numbers)):
        sizes[row] = info.client, info.num_train, info.num_dev
        if row < LISTED:
            listed.append(
                {
                    "client": info.client,
                    "num_train": info.num_train,
                    "num_dev": info.num_dev,
                    "labels": info.label_histogram,
                }
            )
    if len(numbers) <= LISTED:
        return {"clients": listed}
    _, train, dev = sizes.T
    every = {
        "count": len(numbers),
        "num_train": int(train.sum()),
        "num_dev": int(dev.sum()),
        "smallest": int(train.min()),
        "largest": int(train.max()),
        "digest": _digest(sizes),
    }
    return {"clients": listed, "all_clients": every}


def totals(start: Mapping[str, Any]) -> dict[str, Any]:
    """Count, samples, smallest and largest of all clients of a line "start"."""
    if "all_clients" in start:
        return dict(start["all_clients"])
    clients = start.get("clients") or []
    train = [entry["num_train"] for entry in clients]
    return {
        "count": len(clients),
        "num_train": sum(train),
        "num_dev": sum(entry["num_dev"] for entry in clients),
        "smallest": min(train, default=0),
        "largest": max(train, default=0),
    }


def had(start: Mapping[str, Any], sizes: Iterable[tuple[int, int, int]]) -> bool:
    """Whether the clients of a line "start" had so many samples: (client, training, development).

    Clients that had not joined do not count, unless there were more than are listed.
    """
    sizes = list(sizes)
    if "all_clients" in start:
        return bool(start["all_clients"]["digest"] == _digest(np.array(sizes, "<i8")))
    expected = {client: (train, dev) for client, train, dev in sizes}
    return all(
        expected.get(entry["client"]) == (entry["num_train"], entry["num_dev"])
        for entry in start.get("clients", [])
    )


def _digest(sizes: NDArray[np.int64]) -> str:
    return sha256(sizes.tobytes()).hexdigest()[:32]
