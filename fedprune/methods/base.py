"""What a federated method is: hooks of the round loop on a plain, serialisable state.

A method knows tensors and masks, never transport: the round loop hands it an `Ask`, a function
that sends one request to every client and yields the replies as they arrive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import nn

from fedprune.config import RunConfig
from fedprune.exchange.messages import Entries, Reply, Request, State
from prunelab.data.datasets import ImageSet
from prunelab.networks import build_model
from sparsemodel.masks.mask import Mask


@dataclass(frozen=True)
class RunState:
    """All that a run needs to go on after a stop; written to the checkpoint each round.

    Attributes:
        round_index: rounds completed.
        weights: the global model's float state, zeros at pruned places.
        mask: the global mask, or None for a dense method.
        adjustments: how many mask adjustments have been made.
        notes: JSON values that the report shows (the candidates and the winner, say).
    """

    round_index: int
    weights: State
    mask: Mask | None = None
    adjustments: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


class Ask(Protocol):
    """Send `request` to every client and yield (client, reply) as replies arrive."""

    def __call__(self, request: Request) -> Iterator[tuple[int, Reply]]: ...


class Method:
    """Dense federated averaging; other methods override the hooks they change."""

    uses_density = False  # whether `pruning.density` changes what the method does

    def __init__(self, config: RunConfig, dataset: ImageSet) -> None:
        self.config = config
        self.dataset = dataset

    def build_model(self) -> nn.Module:
        """The network of this run, the same bits on server and clients."""
        return self.build_reference()

    def build_reference(self) -> nn.Module:
        """The full dense network that savings are measured against."""
        return build_model(
            self.config.model_name,
            num_classes=self.dataset.num_classes,
            input_shape=self.dataset.input_shape,
            seed=self.config.seed,
            width=self.config.model.width or None,
        )

    def initialise(self, model: nn.Module, state: RunState, ask: Ask) -> RunState:
        """Choose the starting point of the rounds.

        Args:
            model: the dense model after brief pre-training on the small labelled server set;
                every method starts from the same one. May be changed in place.
            state: round 0, holding that model's float state and no mask.
            ask: reaches the clients.
        """
        return state

    def growth_counts(self, state: RunState) -> dict[str, int]:
        """How many growth candidates clients send in the coming round, by layer."""
        return {}

    def update(self, state: RunState, *, mean: State, growth: Entries) -> RunState:
        """The state after a round.

        Args:
            mean: the clients' weighted mean, dense shapes, zeros at pruned places.
            growth: mean gradients at pruned coordinates of the layers asked for.
        """
        return replace(state, round_index=state.round_index + 1, weights=mean)
