"""When and how much: step -> density or adjustment rate, and which block is adjusted.

A step is a round, an epoch or an iteration, counted from 0 by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sparsemodel.errors import SparseModelError


def cosine(step: float, *, value: float, end: float) -> float:
    """From `value` at step 0 down half a cosine to 0 at `end`, and 0 after it.

    value / 2 · (1 + cos(π step / end)). FedTiny and RigL let the adjustment rate decay so, and
    learning rates fall along it. A step may be a part of one.

    Raises:
        SparseModelError: a negative step, or an end below 1.

    >>> cosine(0, value=0.3, end=100), cosine(100, value=0.3, end=100)
    (0.3, 0.0)
    """
    if step < 0 or end < 1:
        raise SparseModelError(f"expected step >= 0 and end >= 1, got {step} and {end}")
    if step >= end:
        return 0.0
    return value / 2.0 * (1.0 + math.cos(math.pi * step / end))


def adjustment_counts(
    counts: Mapping[str, int], capacities: Mapping[str, int], *, rate: float
) -> dict[str, int]:
    """How many weights of each layer one adjustment may exchange: ⌊rate · active⌋.

    Never more than the layer has pruned weights to grow.

    Args:
        counts: name -> number of active weights.
        capacities: name -> number of weights, active or pruned, at least for these names.
        rate: share of the active weights to exchange, in [0, 1].

    Raises:
        SparseModelError: a rate outside [0, 1], or a count outside [0, capacity].

    >>> adjustment_counts({"a": 10, "b": 10}, {"a": 100, "b": 12}, rate=0.3)
    {'a': 3, 'b': 2}
    """
    if not 0 <= rate <= 1:
        raise SparseModelError(f"an adjustment rate must be in [0, 1], got {rate}")
    for name, count in counts.items():
        if not 0 <= count <= capacities.get(name, -1):
            raise SparseModelError(
                f"{name!r}: {count} active weights do not fit its capacity {capacities.get(name)}"
            )
    return {
        name: min(math.floor(rate * count), capacities[name] - count)
        for name, count in counts.items()
    }


def block_of_adjustment(adjustment: int, num_blocks: int) -> int:
    """The block that adjustment number 0, 1, ... works on: output to input, then round again.

    Adjustments are counted, not rounds: round % num_blocks would skip blocks for ever whenever
    the interval and the number of blocks share a divisor.

    Args:
        adjustment: number of adjustments done before this one.
        num_blocks: number of blocks, at least 1.

    Returns:
        Index of the block in [0, num_blocks), where 0 is nearest to the input.

    Raises:
        SparseModelError: a negative adjustment, or no block.

    >>> [block_of_adjustment(adjustment, 3) for adjustment in range(5)]
    [2, 1, 0, 2, 1]
    """
    if adjustment < 0 or num_blocks < 1:
        raise SparseModelError(
            f"expected adjustment >= 0 and num_blocks >= 1, got {adjustment} and {num_blocks}"
        )
    return num_blocks - 1 - adjustment % num_blocks
