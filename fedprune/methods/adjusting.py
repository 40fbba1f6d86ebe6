"""What methods share that move a mask at intervals: when, and how many weights.

Every `adjust_every` rounds until `adjust_until` some of a layer's weights are exchanged, fewer and
fewer, along half a cosine: α/2 (1 + cos(π r / R_stop)), as RigL does (Evci et al., ICML 2020).
Layers keep their numbers of weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fedprune.methods.base import Method, RunState, Start
from fedprune.methods.fixed_mask import BY_SHAPES
from fedprune.methods.magnitude import Magnitude
from sparsemodel.masks.schedule import adjustment_counts, cosine


@dataclass(frozen=True)
class Adjusting(Method):
    """A mask of which a share is exchanged at intervals.

    Attributes:
        density: share of prunable weights that are kept.
        adjust_every: rounds between adjustments.
        adjust_until: R_stop, no adjustment at or after this round; 0: 60 % of the rounds.
        adjust_rate: α, the share of a layer's weights that the first adjustment may exchange.
    """

    density: float = 0.05
    adjust_every: int = 2
    adjust_until: int = 0
    adjust_rate: float = 0.2

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if self.adjust_every < 1:
            yield f"adjust_every: expected at least 1, got {self.adjust_every}"
        if self.adjust_until < 0:
            yield f"adjust_until: expected 0 or more, got {self.adjust_until}"
        if not 0 <= self.adjust_rate < 1:
            yield f"adjust_rate: expected 0 or more, below 1, got {self.adjust_rate}"

    def last_adjustment(self, rounds: int) -> int:
        """R_stop of a run of so many rounds."""
        return self.adjust_until or max(1, round(0.6 * rounds))

    def used(self, rounds: int) -> dict[str, Any]:
        return {**self.settings(), "adjust_until": self.last_adjustment(rounds)}

    def adjusts(self, state: RunState, *, ahead: int = 1) -> bool:
        """Whether the mask is adjusted after the coming round, or after one further ahead."""
        number = state.round_index + ahead
        return number % self.adjust_every == 0 and number < int(state.memory["until"])

    def exchange_counts(self, state: RunState, *, ahead: int = 1) -> dict[str, int]:
        """How many weights of each layer an adjustment after the coming round may exchange.

        k_l = ⌊α/2 (1 + cos(π r / R_stop)) · nnz_l⌋, r the round's number from 1 on, and no more
        than the layer has pruned weights; layers of which none may move are left out.
        """
        assert state.model.patterns is not None
        patterns, until = state.model.patterns, int(state.memory["until"])
        counts = adjustment_counts(
            patterns.counts(),
            {name: pattern.num_weights for name, pattern in patterns.items()},
            rate=cosine(state.round_index + ahead, value=self.adjust_rate, end=until),
        )
        return {name: count for name, count in counts.items() if count}

    def asked_counts(self, state: RunState) -> dict[str, int]:
        """How many weights of each layer the coming round exchanges; empty in other rounds."""
        return self.exchange_counts(state) if self.adjusts(state) else {}


@dataclass(frozen=True)
class AdjustedMagnitude(Adjusting, Magnitude):
    """The same from the mask of the start's largest weights in each layer.

    Attributes:
        distribution: of the density over layers: "uniform", "erk" or "erk-conv".
    """

    distributions: ClassVar[tuple[str, ...]] = BY_SHAPES

    distribution: str = "erk"

    def start(self, server: Start) -> RunState:
        memory = {"until": self.last_adjustment(server.rounds)}
        return replace(super().start(server), memory=memory)
