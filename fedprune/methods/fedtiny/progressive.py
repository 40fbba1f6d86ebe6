"""FedTiny's progressive pruning: move the mask's weights, a block at a time, by gradients.

Every ΔR rounds until R_stop one block of layers, from the output towards the input and round
again, loses its smallest active weights and grows where the clients' gradients are largest.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedprune.methods.base import RunState
from sparsemodel.masks.schedule import adjustment_counts, block_of_adjustment, cosine
from sparsemodel.runtime.adjust import prune_and_grow
from sparsemodel.runtime.state import Entries, SparseState


def is_adjustment_round(round_number: int, *, every: int, until: int) -> bool:
    """Whether the mask is adjusted after round `round_number` (1-based)."""
    return round_number % every == 0 and round_number < until


def growth_counts(state: RunState, *, every: int, rate: float, after: int = 0) -> dict[str, int]:
    """a_l for each layer of the block that the coming round adjusts; empty in other rounds.

    a_l = floor(α/2 (1 + cos(π r / R_stop)) · nnz_l), r the round's number. The block pointer
    counts adjustments, not rounds: a pointer of `round % blocks` would skip blocks.

    Args:
        state: its memory holds "blocks", "adjustments" and "until" (R_stop).
        every: ΔR.
        rate: α.
        after: rounds before which nothing moves; the cosine then begins there.
    """
    round_number, until = state.round_index + 1, state.memory["until"]
    patterns = state.model.patterns
    if patterns is None or not is_adjustment_round(round_number, every=every, until=until):
        return {}
    if round_number <= after:
        return {}
    blocks = state.memory["blocks"]
    block = blocks[block_of_adjustment(state.memory["adjustments"], len(blocks))]
    counts = adjustment_counts(
        {name: patterns[name].num_active for name in block},
        {name: patterns[name].num_weights for name in block},
        rate=cosine(round_number - after, value=rate, end=until - after),
    )
    return {name: count for name, count in counts.items() if count > 0}


def adjust(
    mean: SparseState,
    growth: Entries,
    counts: dict[str, int],
    *,
    keep: Mapping[str, NDArray[np.bool_]] | None = None,
) -> SparseState:
    """The block's mask moved: layer densities stay, grown weights start at 0.

    Args:
        keep: layer -> which active weights stay, however small.
    """
    asked = {name: growth[name] for name in counts if name in growth}
    return prune_and_grow(mean, asked, counts, keep=keep)
