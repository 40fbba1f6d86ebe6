"""The clients of a run as its metrics tell of them: each by itself, or of very many the sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

import numpy as np

from fedprune.exchange.messages import ClientInfo

LISTED = 1000  # clients that are told of one by one: 100 kB of metrics


def told(clients: Mapping[int, ClientInfo]) -> dict[str, Any]:
    """What the line "start" says of the clients: the first LISTED, and of more the sums of all."""
    infos = (clients[client] for client in sorted(clients))
    listed: list[dict[str, Any]] = []
    sizes: list[tuple[int, int, int]] = []
    for info in infos:
        sizes.append((info.client, info.num_train, info.num_dev))
        if len(listed) < LISTED:
            listed.append(
                {
                    "client": info.client,
                    "num_train": info.num_train,
                    "num_dev": info.num_dev,
                    "labels": info.label_histogram,
                }
            )
    if len(sizes) == len(listed):
        return {"clients": listed}
    train = [num_train for _, num_train, _ in sizes]
    every = {
        "count": len(sizes),
        "num_train": sum(train),
        "num_dev": sum(num_dev for _, _, num_dev in sizes),
        "smallest": min(train),
        "largest": max(train),
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
        return bool(start["all_clients"]["digest"] == _digest(sizes))
    expected = {client: (train, dev) for client, train, dev in sizes}
    return all(
        expected.get(entry["client"]) == (entry["num_train"], entry["num_dev"])
        for entry in start.get("clients", [])
    )


def _digest(sizes: list[tuple[int, int, int]]) -> str:
    return sha256(np.array(sizes, "<i8").tobytes()).hexdigest()[:32]
