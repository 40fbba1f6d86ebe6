"""What a way of pruning is, in the terms of a survey; without torch.

Source: Cheng et al., A Survey on Deep Neural Network Pruning (IEEE TPAMI 2024): when it prunes,
what it removes and what it goes by.
"""

from __future__ import annotations

from dataclasses import dataclass

BEFORE, DURING, AFTER, ANY, NEVER = "before", "during", "after", "any", "never"
"""When, with respect to training."""
WEIGHTS, N_OF_M, CHANNELS = "weights", "N:M", "channels"
"""Units: single weights, n of m neighbours, channels; sparsemodel.units.unit has more."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """A way of pruning; its children say besides what data it looks at.

    Attributes:
        criterion: what it goes by.
        source: its paper, or "baseline".
        units: what it removes.
        when: the source prunes; one can at other times.
    """

    criterion: str
    source: str
    units: tuple[str, ...] = (WEIGHTS,)
    when: str = AFTER
