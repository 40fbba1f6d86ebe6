"""A data set divided among clients, as an image store that each client reads its own part of.

Written where the data are divided, read by a client with numpy alone: only its own samples
come into its memory. A node's own folder is a store without shares, and all of it is the
client's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedprune.local.data import DEV_SHARE, ClientData, split_development
from prunelab.data.batches import Images, Integers, Preprocessing
from prunelab.data.store import ImageStore, open_store, write_store
from prunelab.errors import DataError

SHARES, SHARE_ENDS = "shares", "share_ends"


def write_shares(
    folder: Path,
    images: Images,
    labels: Integers,
    shares: Sequence[Integers],
    *,
    num_classes: int,
    name: str,
    preprocessing: Preprocessing | None = None,
    made_for: str = "",
) -> ImageStore:
    """Write a store (see `write_store`) that knows each client's samples.

    Args:
        images, labels: of the training side.
        shares: each client's ascending indices into them, int64; none in two shares.

    Raises:
        DataError: as `write_store`, or indices that are no such shares.
    """
    joined = np.concatenate(shares) if shares else np.empty(0, np.int64)
    used = np.bincount(joined, minlength=1) if len(joined) and joined.min() >= 0 else None
    if used is None or used.max() > 1 or joined.max() >= len(labels):
        raise DataError(
            f"{folder}: shares must hold indices 0 to {len(labels) - 1}, each at most once"
        )
    ends = np.cumsum([len(share) for share in shares], dtype=np.int64)
    return write_store(
        folder, images, labels, num_classes=num_classes, name=name, preprocessing=preprocessing,
        arrays={SHARES: joined, SHARE_ENDS: ends}, made_for=made_for,
    )  # fmt: skip


def open_client(
    folder: Path,
    client: int,
    *,
    seed: int,
    dev_share: float = DEV_SHARE,
    made_for: str | None = None,
) -> ClientData:
    """A client's samples, copied out of a store; its split is that of `client_data`.

    Args:
        client: its number in the division; without meaning in a store without shares.
        seed: of the development split.
        made_for: as of `open_store`.

    Raises:
        DataError: no store, a damaged one, or one without such a client.
    """
    store = open_store(folder, made_for=made_for)
    train, dev = split_development(share_of(store, client), dev_share=dev_share, seed=seed)
    return ClientData(*store.take(train), *store.take(dev), store.num_classes)


def share_of(store: ImageStore, client: int) -> Integers:
    """Ascending indices of a client's samples, int64; all of them where there are no shares.

    Raises:
        DataError: the store has no such client, or its shares are damaged.
    """
    if SHARES not in store.arrays and SHARE_ENDS not in store.arrays:
        return np.arange(len(store))
    if not {SHARES, SHARE_ENDS} <= store.arrays.keys():
        raise DataError(f"{store.folder} is damaged: {SHARES} and {SHARE_ENDS} belong together")
    indices, ends = store.arrays[SHARES], store.arrays[SHARE_ENDS]
    if indices.ndim != 1 or ends.ndim != 1:
        raise DataError(f"{store.folder} is damaged: {SHARES} and {SHARE_ENDS} must be lists")
    if not 0 <= client < len(ends):
        raise DataError(f"{store.folder} has shares for {len(ends)} clients, 0 first; not {client}")
    start = int(ends[client - 1]) if client else 0
    end = int(ends[client])
    share = np.array(indices[start:end])
    good = 0 <= start <= end <= len(indices) and (np.diff(share) > 0).all()
    if not good or (len(share) and not 0 <= share[0] <= share[-1] < len(store)):
        raise DataError(f"{store.folder} is damaged: the share of client {client} cannot be")
    return share
