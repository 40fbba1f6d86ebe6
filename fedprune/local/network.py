"""The run's network as a torch module, built from the configuration."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedprune.given import given_model, given_task
from prunelab.networks import (
    build_model,
    is_wholly_exchanged,
    narrow_width,
    uninitialised,
)
from prunelab.networks.builtin import MODELS
from prunelab.training.task import TEXT_TASKS, Task, make_task
from sparsemodel.layers.from_state import carried_tensors

if TYPE_CHECKING:
    from fedprune.config import RunConfig

_width_of_ours = lru_cache(maxsize=8)(narrow_width)


@dataclass(frozen=True, eq=False)
class TorchNetwork:
    """Builds the network of a run; the same bits for the same configuration.

    Attributes:
        num_classes, input_shape: of the data.
        kind: what the samples are for, a name in prunelab.training.task.TASKS.
    """

    config: RunConfig
    num_classes: int | None
    input_shape: tuple[int, ...]
    kind: str

    @cached_property
    def task(self) -> Task:
        """What the network is trained for."""
        return make_task(given_task(self.task_name))

    @property
    def task_name(self) -> str:
        """As configured, or what the samples are for."""
        return self.config.training.task or self.kind

    def model(self) -> nn.Module:
        """A fresh model of the run's method, dense."""
        return self.config.method.build_model(self.reference, self._widest)

    def empty_model(self) -> nn.Module:
        """The same without drawing its weights, for what overwrites them."""
        if not self._known[1]:
            return self.model()
        with uninitialised():
            return self.model()

    @cached_property
    def _known(self) -> tuple[dict[str, tuple[int, ...]], bool]:
        """Shapes of the float state, and whether it is all that the network knows."""
        model = self._outline()  # not kept: where it has values, it is dense
        shapes = {name: tuple(tensor.shape) for name, tensor in carried_tensors(model).items()}
        return shapes, is_wholly_exchanged(model)

    def _outline(self) -> nn.Module:
        """The network without values, on no memory where its code allows that."""
        # Whatever its code raises without values is no harm.
        with uninitialised(), suppress(Exception), torch.device("meta"):
            return self.model()
        with uninitialised():
            return self.model()

    def reference(self, *, width: int | None = None) -> nn.Module:
        """The full network that savings are measured against, or one of another width, float32."""
        return build_model(
            given_model(self.config.model_name),
            num_classes=self.num_classes,
            input_shape=self._image_shape,
            seed=self.config.seed,
            width=width or self.config.model.width or None,
        ).float()

    @property
    def _image_shape(self) -> tuple[int, ...] | None:
        """What networks are told of the inputs: nothing of texts, whose length varies."""
        return None if self.kind in TEXT_TASKS else self.input_shape

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the float state, in the order in which states hold it."""
        return self._known[0]

    @cached_property
    def skeleton(self) -> nn.Module:
        """The run's network, whatever its weights: to look at, never to train."""
        return self.empty_model()

    def _widest(self, max_bytes: int) -> int:
        # A client builds its network for each answer; ours have the same widths every time.
        name = self.config.model_name
        find = _width_of_ours if name in MODELS else narrow_width
        return find(
            given_model(name),
            num_classes=self.num_classes,
            input_shape=self._image_shape,
            max_bytes=max_bytes,
        )
