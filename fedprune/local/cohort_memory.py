"""How many clients are trained at once on a GPU: as many as its memory holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fedprune.local.cohort import Member

MEMORY_SHARE = 0.8  # of what is free; the rest is for what sizes of batches leave in pieces


def clients_that_fit(free_bytes: int, *, bytes_each: int, at_most: int) -> int:
    """How many clients of `bytes_each` go into MEMORY_SHARE of the free memory; at least one.

    >>> clients_that_fit(10_000, bytes_each=1_500, at_most=20)
    5
    """
    return max(1, min(at_most, int(MEMORY_SHARE * free_bytes) // max(1, bytes_each)))


def fitting_cohort(
    train: Callable[[Sequence[Member]], object],
    members: Sequence[Member],
    *,
    batch_size: int,
    at_most: int,
    device: torch.device,
) -> int:
    """How many such members to train at a time, from the peak memory of a first mini-batch.

    The member with most samples, whose batches are the largest, is trained twice over side by
    side, since one alone takes other operators. What that gives is thrown away.

    Args:
        train: trains a cohort on `device`, a GPU.
        batch_size: of local training.
    """
    if at_most == 1:
        return 1
    member = max(members, key=lambda entry: len(entry.labels))
    # The last mini-batch of an epoch may be larger by one (see batches.py).
    part = slice(0, batch_size + 1)
    sample = replace(member, images=member.images[part], labels=member.labels[part], growth=None)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        train([sample, sample])
    except torch.OutOfMemoryError:
        return 1
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return clients_that_fit(free, bytes_each=-(-peak // 2), at_most=at_most)
