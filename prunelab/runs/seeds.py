"""Seeds of independent streams, derived from one; without torch, but for torch's own generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_seed(*parts: int) -> int:
    """One 63-bit seed out of several integers, such as (seed, round, client).

    A fixed mixing of the parts (SplitMix64): different tuples give unrelated streams.
    """
    state = 0
    for part in (len(parts), *parts):
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def rng(*parts: int) -> np.random.Generator:
    """numpy's PCG64, seeded with `stream_seed(*parts)`: what draws the order of samples.

    >>> rng(7, 0).permutation(4).tolist() == rng(7, 0).permutation(4).tolist()
    True
    """
    return np.random.Generator(np.random.PCG64(stream_seed(*parts)))


def generator(*parts: int) -> torch.Generator:
    """torch's CPU generator, seeded with `stream_seed(*parts)`."""
    import torch  # noqa: PLC0415

    return torch.Generator().manual_seed(stream_seed(*parts))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators, which dropout reads, seeded inside and restored after."""
    import torch  # noqa: PLC0415

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
