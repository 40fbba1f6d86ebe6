"""The fewest bytes that masks and changes of masks can take: what the codec is judged by."""

from __future__ import annotations

import math

from sparsemodel.codec.deltas import check_same_layers
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.positions import find


def mask_entropy_bytes(patterns: Patterns) -> float:
    """Sum over layers of log2 C(numel, num_active), in bytes.

    No code of the patterns is shorter on average once the number of active weights of each layer
    is known and every placement of them is equally likely.
    """
    return sum(_log2_choose(p.num_weights, p.num_active) for p in patterns.values()) / 8


def mask_delta_entropy_bytes(base: Patterns, new: Patterns) -> float:
    """Sum over layers of log2 C(active, pruned) + log2 C(numel - active, grown), in bytes.

    `active` counts the active weights of `base`; `pruned` and `grown` count the changes.

    Raises:
        CodecError: the masks differ in names, order or shapes.
    """
    check_same_layers(base, new)
    bits = 0.0
    for name, old in base.items():
        _, kept = find(old.positions(), new[name].positions())
        num_kept = int(kept.sum())
        bits += _log2_choose(old.num_active, old.num_active - num_kept)
        bits += _log2_choose(old.num_weights - old.num_active, len(kept) - num_kept)
    return bits / 8


def _log2_choose(total: int, chosen: int) -> float:
    nats = math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)
    return nats / math.log(2)
