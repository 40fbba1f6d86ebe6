"""FedTiny's progressive pruning: move the mask's weights, a block at a time, by gradients.

Every ΔR rounds until R_stop one block of layers, from the output towards the input and round
again, loses its smallest active weights and grows where the clients' gradients are largest.
"""

from __future__ import annotations

from dataclasses import replace

from fedprune.config import RunConfig
from fedprune.exchange.messages import Entries, State
from fedprune.methods.base import RunState
from sparsemodel.masks.adjust import carry_weights, prune_and_grow
from sparsemodel.masks.schedule import adjustment_counts, block_of_adjustment, cosine


def is_adjustment_round(round_number: int, config: RunConfig) -> bool:
    """Whether the mask is adjusted after round `round_number` (1-based)."""
    every, stop = config.pruning.adjust_every, config.adjust_until
    return round_number % every == 0 and round_number < stop


def growth_counts(state: RunState, blocks: list[list[str]], config: RunConfig) -> dict[str, int]:
    """a_l for each layer of the block that the coming round adjusts; empty in other rounds.

    a_l = floor(α/2 (1 + cos(π r / R_stop)) · nnz_l), r the round's number. The block pointer
    counts adjustments, not rounds: a pointer of `round % blocks` would skip blocks.
    """
    round_number = state.round_index + 1
    if state.mask is None or not is_adjustment_round(round_number, config):
        return {}
    block = blocks[block_of_adjustment(state.adjustments, len(blocks))]
    rate = cosine(round_number, value=config.pruning.adjust_rate, end=config.adjust_until)
    counts = adjustment_counts(
        {name: int(state.mask[name].sum()) for name in block},
        {name: state.mask[name].numel() for name in block},
        rate=rate,
    )
    return {name: count for name, count in counts.items() if count > 0}


def adjust(state: RunState, mean: State, growth: Entries, counts: dict[str, int]) -> RunState:
    """The state with the block's mask moved: layer densities stay, grown weights start at 0."""
    assert state.mask is not None
    mask = prune_and_grow(
        state.mask,
        {name: mean[name] for name in counts},
        {name: growth[name] for name in counts if name in growth},
        counts,
    )
    weights = carry_weights(mean, old=state.mask, new=mask)
    return replace(
        state,
        round_index=state.round_index + 1,
        weights=weights,
        mask=mask,
        adjustments=state.adjustments + 1,
    )
