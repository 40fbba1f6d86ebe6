"""A data set divided among clients, as a sample store that each client reads its own part of.

Written where the data are divided, read by a client with numpy alone: only its own samples
come into its memory. A node's own folder is a store without shares, and all of it is the
client's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.local.data import DEV_SHARE, Array, ClientData, Split, split
from fedprune.local.division import Division
from prunelab.data.batches import Integers
from prunelab.data.store import SampleStore, open_store, write_store
from prunelab.errors import DataError

SHARES, SHARE_ENDS = "shares", "share_ends"


def write_shares(
    folder: Path, inputs: Array, targets: Array, shares: Sequence[Integers], **described: Any
) -> SampleStore:
    """Write a store that knows each client's samples.

    Args:
        inputs, targets: of the training side.
        shares: each client's ascending indices into them, int64; none in two shares.
        described: further arguments of `write_store`.

    Raises:
        DataError: as `write_store`, or indices that are no such shares.
    """
    division = Division.of(shares)
    joined = division.indices
    used = np.bincount(joined, minlength=1) if len(joined) and joined.min() >= 0 else None
    if used is None or used.max() > 1 or joined.max() >= len(targets):
        raise DataError(
            f"{folder}: shares must hold indices 0 to {len(targets) - 1}, each at most once"
        )
    arrays = {SHARES: joined, SHARE_ENDS: division.ends}
    return write_store(folder, inputs, targets, arrays=arrays, **described)


def open_client(
    folder: Path,
    client: int,
    *,
    seed: int,
    dev_share: float = DEV_SHARE,
    with_test: bool = False,
    made_for: str | None = None,
) -> ClientData:
    """A client's samples, copied out of a store.

    Args:
        client: its number in the division; without meaning in a store without shares.
        seed, dev_share, with_test: as of `split`.
        made_for: as of `open_store`.

    Raises:
        DataError: no store, a damaged one, or one without such a client.
    """
    store = _opened(folder, made_for)
    share = share_of(store, client)
    rows = split(share, dev_share=dev_share, with_test=with_test, seed=seed)
    # Not by indexing, which keeps the layout of the whole: kernels want channel by channel.
    train, dev, test = (Split(*store.take(part)) for part in (rows.train, rows.dev, rows.test))
    return ClientData(train, dev, test, store.num_classes, store.task)


def forget_stores() -> None:
    """Close what `open_client` keeps open, so that its folder can be removed everywhere."""
    _store.cache_clear()


def _opened(folder: Path, made_for: str | None) -> SampleStore:
    """The store, read and checked once a process for all clients, and again once it has changed."""
    try:
        found = ((file.name, file.stat()) for file in sorted(folder.iterdir()))
        stamp = tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in found)
    except OSError:
        stamp = ()
    return _store(folder, made_for, stamp)


@lru_cache(maxsize=1)
def _store(folder: Path, made_for: str | None, stamp: tuple[object, ...]) -> SampleStore:
    return open_store(folder, made_for=made_for)


def share_of(store: SampleStore, client: int) -> Integers:
    """Ascending indices of a client's samples, int64; all of them where there are no shares.

    Raises:
        DataError: the store has no such client, or its shares are damaged.
    """
    if SHARES not in store.arrays and SHARE_ENDS not in store.arrays:
        return np.arange(len(store))
    if not {SHARES, SHARE_ENDS} <= store.arrays.keys():
        raise DataError(f"{store.folder} is damaged: {SHARES} and {SHARE_ENDS} belong together")
    # As plain arrays: a memory map takes microseconds to be cut.
    indices, ends = (np.asarray(store.arrays[name]) for name in (SHARES, SHARE_ENDS))
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
