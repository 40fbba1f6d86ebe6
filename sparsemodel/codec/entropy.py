"""The fewest bytes that masks and changes of masks can take: what the codec is judged by."""

from __future__ import annotations

import math

from sparsemodel.codec.deltas import check_same_layers
from sparsemodel.masks.mask import Mask


def mask_entropy_bytes(mask: Mask) -> float:
    """Sum over layers of log2 C(numel, num_active), in bytes.

    No code of the patterns is shorter on average once the number of active weights of each layer
    is known and every placement of them is equally likely.
    """
    shapes, counts = mask.shapes(), mask.counts()
    return sum(_log2_choose(math.prod(shapes[name]), counts[name]) for name in mask) / 8


def mask_delta_entropy_bytes(base: Mask, new: Mask) -> float:
    """Sum over layers of log2 C(active, pruned) + log2 C(numel - active, grown), in bytes.

    `active` counts the active weights of `base`; `pruned` and `grown` count the changes.

    Raises:
        CodecError: the masks differ in names, order or shapes.
    """
    check_same_layers(base, new)
    bits = 0.0
    for name, old in base.items():
        num_active = int(old.sum())
        num_pruned = int((old & ~new[name]).sum())
        num_grown = int((~old & new[name]).sum())
        bits += _log2_choose(num_active, num_pruned)
        bits += _log2_choose(old.numel() - num_active, num_grown)
    return bits / 8


def _log2_choose(total: int, chosen: int) -> float:
    nats = math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)
    return nats / math.log(2)
