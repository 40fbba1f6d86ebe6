"""What a way of pruning is, in the terms of a survey; without torch.

Source: Cheng et al., A Survey on Deep Neural Network Pruning (IEEE TPAMI 2024): when it prunes,
what it removes and what it goes by.
"""

from __future__ import annotations

from dataclasses import dataclass

BEFORE, DURING, AFTER = "before training", "during training", "after training"
ANY = "any time"
WEIGHTS, N_OF_M = "weights", "N:M"
"""Units of single weights: one by one, or n of m neighbours."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """A way of pruning. Those who hold one also say what data it looks at.

    Attributes:
        criterion: what it goes by.
        source: its paper, or "baseline".
        units: what it removes.
        when: the paper prunes.
    """

    criterion: str
    source: str
    units: tuple[str, ...] = (WEIGHTS,)
    when: str = AFTER
