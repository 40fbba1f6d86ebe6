"""FedTiny: tiny models from a coarse mask chosen by the clients and refined by their gradients.

Huang et al., Distributed Pruning Towards Tiny Neural Networks in Federated Learning,
ICDCS 2023. Three parts, one file each: the candidate pool (pool.py), adaptive batch-norm
selection (selection.py) and progressive pruning (progressive.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fedprune.exchange.messages import Request
from fedprune.exchange.pooled import Pooled
from fedprune.local.training import train
from fedprune.methods.base import Method, RunState, Start, train_request
from fedprune.methods.fedtiny.pool import Pool, candidate_counts, candidate_pool
from fedprune.methods.fedtiny.progressive import adjust, growth_counts
from fedprune.methods.fedtiny.selection import measure, score, select_candidate
from sparsemodel.runtime.state import SparseState, Tensors

GRANULARITIES = ("layer", "block", "entire")


@dataclass(frozen=True)
class FedTiny(Method):
    """A coarse mask that clients choose from a pool and refine by their gradients.

    The two ablations switch one part off.

    Attributes:
        density: share of prunable weights that are kept.
        pool_size: candidates; 0 stands for max(1, round(0.1 / density)), at most `pool_limit`.
            The rule is the paper's optimal pool size as we remember it, not checked against
            its text.
        granularity: what an adjustment moves: a "layer", a "block" or the "entire" network.
        adjust_every: ΔR, rounds between adjustments.
        adjust_until: R_stop, no adjustment at or after this round; 0: 60 % of the rounds.
        adjust_rate: α, the share of a layer's weights that the first adjustment exchanges.
    """

    name: ClassVar[str] = "fedtiny"
    actions = {"train": train, "measure": measure, "score": score}  # noqa: RUF012
    adaptive_selection: ClassVar[bool] = True
    progressive_pruning: ClassVar[bool] = True

    density: float = 0.05
    pool_size: int = 0
    pool_limit: int = 10
    granularity: str = "block"
    adjust_every: int = 2
    adjust_until: int = 0
    adjust_rate: float = 0.3

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if self.granularity not in GRANULARITIES:
            allowed = ", ".join(GRANULARITIES)
            yield f"granularity: expected one of {allowed}; got {self.granularity!r}"
        for key in ("pool_limit", "adjust_every"):
            if getattr(self, key) < 1:
                yield f"{key}: expected at least 1, got {getattr(self, key)}"
        for key in ("pool_size", "adjust_until"):
            if getattr(self, key) < 0:
                yield f"{key}: expected 0 or more, got {getattr(self, key)}"
        if not 0 <= self.adjust_rate <= 1:
            yield f"adjust_rate: expected 0 to 1, got {self.adjust_rate}"

    @property
    def num_candidates(self) -> int:
        """C, the number of candidates."""
        wanted = max(1, round(0.1 / self.density))
        return self.pool_size or min(self.pool_limit, wanted)

    def last_adjustment(self, rounds: int) -> int:
        """R_stop of a run of so many rounds."""
        return self.adjust_until or max(1, round(0.6 * rounds))

    def used(self, rounds: int) -> dict[str, Any]:
        adjusting = {
            "granularity": self.granularity,
            "adjust_every": self.adjust_every,
            "adjust_until": self.last_adjustment(rounds),
            "adjust_rate": self.adjust_rate,
        }
        if not self.progressive_pruning:
            adjusting = dict.fromkeys(adjusting, "not used")
        return {**self.settings(), "pool_size": self.num_candidates, **adjusting}

    def start(self, server: Start) -> RunState:
        counts = candidate_counts(
            server.prunable, self.density, num_candidates=self.num_candidates, seed=server.seed
        )
        return self.started(candidate_pool(server.state(), counts), server)

    def started(self, pool: Pool, server: Start, **noted: Any) -> RunState:
        """The state of the candidate that clients choose.

        Args:
            noted: what the account of the selection says besides.
        """
        winner, statistics, account = self.select(pool, server)
        return RunState(
            round_index=0,
            model=pool.candidate(winner).replace(statistics),
            memory={
                "blocks": server.blocks[self.granularity],
                "adjustments": 0,
                "until": self.last_adjustment(server.rounds),
            },
            notes={"selection": {**account, **noted}},
        )

    def select(self, pool: Pool, server: Start) -> tuple[int, Tensors, dict[str, Any]]:
        """The winner's number, its batch-norm statistics, and an account for the report."""
        return select_candidate(
            pool, server.pooled, adaptive=self.adaptive_selection, metric=server.metric
        )

    def request(self, state: RunState) -> Request:
        return train_request(state, growth=self.growth_counts(state))

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        counts = self.due(state)
        after = super().update(state, pooled)
        if not counts:
            return after
        memory = {**state.memory, "adjustments": state.memory["adjustments"] + 1}
        return replace(after, model=self.adjusted(state, pooled, counts), memory=memory)

    def adjusted(self, state: RunState, pooled: Pooled, counts: dict[str, int]) -> SparseState:
        """The clients' mean model with the block's mask moved."""
        return adjust(pooled.model, pooled.growth, counts)

    def growth_counts(self, state: RunState) -> dict[str, int]:
        """How many growth candidates clients send in the coming round, by layer."""
        return self.due(state)

    def due(self, state: RunState) -> dict[str, int]:
        """How many weights of each layer the end of the coming round exchanges."""
        if not self.progressive_pruning:
            return {}
        return growth_counts(state, every=self.adjust_every, rate=self.adjust_rate)


@dataclass(frozen=True)
class FedTinyVanillaSelection(FedTiny):
    """Ablation: candidates are compared without adapting their batch-norm statistics."""

    name: ClassVar[str] = "fedtiny-vanilla"
    adaptive_selection: ClassVar[bool] = False


@dataclass(frozen=True)
class FedTinyFixedMask(FedTiny):
    """Ablation: the selected mask stays as it is; no progressive pruning."""

    name: ClassVar[str] = "fedtiny-fixed"
    progressive_pruning: ClassVar[bool] = False


__all__ = ["FedTiny", "FedTinyFixedMask", "FedTinyVanillaSelection", "Pool"]
