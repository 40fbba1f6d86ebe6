"""How a client computes with a model under a mask: truly sparse, masked, or plainly dense.

All three make the same updates up to rounding. `sparse` stores and multiplies active weights
only; `masked` multiplies dense weights but keeps gradients and momentum of active ones only;
`dense` is what most code does: dense everything, pruned weights set to zero after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from fedprune.config import TrainingConfig
from fedprune.exchange.messages import Entries
from sparsemodel.errors import PlanError
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.layers import growth as grow
from sparsemodel.layers.sparsify import densify, sparsify
from sparsemodel.masks import adjust
from sparsemodel.masks.mask import Mask
from sparsemodel.optim import MaskedSGD, SparseSGD
from sparsemodel.plans.plan import TrainingPlan
from sparsemodel.storage.meter import state_bytes


class LocalModel(Protocol):
    """A model in training on one client; `finish` leaves the outcome in the model it came from."""

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """One SGD step on a mini-batch; returns its mean loss before the step."""
        ...

    def growth(
        self, counts: Mapping[str, int], images: torch.Tensor, labels: torch.Tensor
    ) -> Entries:
        """The largest gradients at pruned weights on one mini-batch; no more steps after it."""
        ...

    def state_bytes(self) -> int:
        """Bytes of storage held now for weights, gradients, momentum and indices."""
        ...

    def finish(self) -> None:
        """Bring weights and statistics back into the dense model."""
        ...


def local_model(
    model: nn.Module,
    mask: Mask | None,
    *,
    input_shape: tuple[int, ...],
    config: TrainingConfig,
    lr: float,
) -> LocalModel:
    """`model`, already under `mask`, ready to train as `config.execution` says.

    Args:
        input_shape: of one sample, without the batch dimension.
    """
    kind = _EXECUTIONS[choose_execution(config, mask)]
    model.train()
    return kind(model, mask, input_shape, config, lr)


def choose_execution(config: TrainingConfig, mask: Mask | None) -> str:
    """What "auto" stands for: sparse on a CPU that has the native kernels, else masked."""
    if mask is None:
        return "masked"
    if config.execution != "auto":
        return config.execution
    return "sparse" if config.device == "cpu" and cpu.library() is not None else "masked"


class SparseModel:
    """Weights, gradients and momentum as long as the active weights; kernels skip the others.

    A step is one call of a native plan where the network has one, else it goes module by module.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask | None,
        input_shape: tuple[int, ...],
        config: TrainingConfig,
        lr: float,
    ) -> None:
        assert mask is not None
        self._dense = model
        self._model = sparsify(model, mask)
        self._optimizer = SparseSGD(
            self._model.parameters(),
            lr=lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self._plan = _plan(self._model, input_shape, config)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        if self._plan is None:
            return _step(self._model, self._optimizer, images, labels)
        loss, _ = self._plan.step(images, labels, optimizer=self._optimizer)
        return loss

    def growth(
        self, counts: Mapping[str, int], images: torch.Tensor, labels: torch.Tensor
    ) -> Entries:
        if self._plan is None or len(images) > self._plan.batch_size:
            return grow.topk_pruned_gradients(self._model, counts, _loss(images, labels))
        return self._plan.topk_pruned_gradients(counts, images, labels)

    def state_bytes(self) -> int:
        held = state_bytes(self._model, self._optimizer)
        return sum(held[kind] for kind in ("weights", "gradients", "optimizer", "indices"))

    def finish(self) -> None:
        self._dense.load_state_dict(densify(self._model).state_dict())


class MaskedModel:
    """Dense weights and kernels; gradients and momentum as long as the active weights."""

    def __init__(
        self,
        model: nn.Module,
        mask: Mask | None,
        input_shape: tuple[int, ...],
        config: TrainingConfig,
        lr: float,
    ) -> None:
        self._model, self._mask = model, mask
        self._optimizer = MaskedSGD(
            model, mask, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay
        )

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        return _step(self._model, self._optimizer, images, labels)

    def growth(
        self, counts: Mapping[str, int], images: torch.Tensor, labels: torch.Tensor
    ) -> Entries:
        assert self._mask is not None
        self._optimizer.close()
        return adjust.topk_pruned_gradients(self._model, self._mask, counts, _loss(images, labels))

    def state_bytes(self) -> int:
        return sum(self._optimizer.state_bytes().values())

    def finish(self) -> None:
        self._optimizer.close()


class DenseModel:
    """Dense weights, gradients and momentum; the mask is laid over the weights after each step."""

    def __init__(
        self,
        model: nn.Module,
        mask: Mask | None,
        input_shape: tuple[int, ...],
        config: TrainingConfig,
        lr: float,
    ) -> None:
        assert mask is not None
        self._model, self._mask = model, mask
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=config.momentum, weight_decay=config.weight_decay
        )

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        loss = _step(self._model, self._optimizer, images, labels)
        self._mask.apply(self._model)
        return loss

    def growth(
        self, counts: Mapping[str, int], images: torch.Tensor, labels: torch.Tensor
    ) -> Entries:
        return adjust.topk_pruned_gradients(self._model, self._mask, counts, _loss(images, labels))

    def state_bytes(self) -> int:
        held = state_bytes(self._model, self._optimizer)
        return sum(held[kind] for kind in ("weights", "gradients", "optimizer"))

    def finish(self) -> None:
        pass


_EXECUTIONS: dict[str, type[SparseModel] | type[MaskedModel] | type[DenseModel]] = {
    "sparse": SparseModel,
    "masked": MaskedModel,
    "dense": DenseModel,
}


def _plan(
    model: nn.Module, input_shape: tuple[int, ...], config: TrainingConfig
) -> TrainingPlan | None:
    """The native plan of a sparsified model; None where there are no kernels or no such plan."""
    if config.device != "cpu" or cpu.library() is None:
        return None
    try:
        # The last batch of an epoch may be larger by one (see batches.py).
        return TrainingPlan(model, input_shape, batch_size=config.batch_size + 1)
    except PlanError:
        return None


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | MaskedSGD,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> float:
    optimizer.zero_grad()
    loss = _loss(images, labels)(model)
    loss.backward()
    optimizer.step()
    return loss.item()


def _loss(images: torch.Tensor, labels: torch.Tensor) -> Callable[[nn.Module], torch.Tensor]:
    return lambda model: functional.cross_entropy(model(images), labels)
