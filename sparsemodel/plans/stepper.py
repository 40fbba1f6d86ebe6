"""Steps, growth and evaluation by a native plan where a network has one, else by its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsemodel.errors import PlanError
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.layers.growth import topk_pruned_gradients
from sparsemodel.layers.sparsify import sparse_layers
from sparsemodel.masks.adjust import TensorEntries
from sparsemodel.optim import SparseSGD
from sparsemodel.plans.plan import TrainingPlan

Normalization = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel, for pixels in [0, 1]."""


class Stepper:
    """Trains and evaluates a sparsified model on batches; the loss is the mean cross-entropy.

    A `TrainingPlan` does it in native calls where the model lies on the CPU in float32 and plans
    know its operations; otherwise its modules do, to the same results up to rounding. The plan is
    made by the first batch.

    Args:
        model: sparsified; on any device.
        batch_size: the largest batch of a step; evaluation goes in batches of it.
        recompute: as of `TrainingPlan`; modules keep what they keep.
        normalization: needed to give images in bytes.

    >>> from sparsemodel.masks.prune import prune
    >>> from sparsemodel.layers.sparsify import sparsify
    >>> dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = sparsify(dense, prune(dense, density=0.5))
    >>> stepper = Stepper(model, batch_size=16)
    >>> optimizer = SparseSGD(model.parameters(), lr=0.1)
    >>> images, labels = torch.ones(3, 4), torch.tensor([1, 1, 1])
    >>> before, _ = stepper.step(images, labels, optimizer=optimizer)
    >>> after, num_correct = stepper.evaluate(images, labels)
    >>> after / 3 < before
    True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int,
        recompute: bool = False,
        normalization: Normalization | None = None,
    ) -> None:
        self._model, self._batch_size = model, batch_size
        self._recompute, self._normalization = recompute, normalization
        self._plan: TrainingPlan | None = None
        self._may_plan = _may_plan(model)

    def step(
        self, images: Tensor, labels: Tensor, *, optimizer: torch.optim.Optimizer | None = None
    ) -> tuple[float, int]:
        """Loss and gradients of a batch, in training mode; and the update, if asked.

        Args:
            images: [B, ...], float32, or uint8 with `normalization`, where the model is.
            labels: int64 [B].
            optimizer: of the model's parameters; None: only `.grad` is filled.

        Returns:
            Mean cross-entropy before the update, and how many largest logits are at the label.
        """
        plan = self.plan(images.shape[1:])
        if plan is None:
            loss, correct = self._by_modules(images, labels)
        elif isinstance(optimizer, SparseSGD) and len(optimizer.param_groups) == 1:
            return plan.step(images, labels, optimizer=optimizer)
        else:
            loss, correct = plan.step(images, labels)
        if optimizer is not None:
            optimizer.step()
        return loss, correct

    def growth(
        self, counts: Mapping[str, int], images: Tensor, labels: Tensor
    ) -> dict[str, TensorEntries]:
        """The largest gradients at pruned weights (`layers.growth.topk_pruned_gradients`)."""
        plan = self.plan(images.shape[1:])
        if plan is not None and len(images) <= plan.batch_size:
            return plan.topk_pruned_gradients(counts, images, labels)
        inputs = self._inputs(images)
        return topk_pruned_gradients(
            self._model, counts, lambda model: functional.cross_entropy(model(inputs), labels)
        )

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """Sum of cross-entropies and number correct, by running statistics.

        Args:
            images: [N, ...], any number, where the model is.
            labels: int64 [N].
        """
        plan = self.plan(images.shape[1:])
        if plan is not None:
            mean, correct = plan.evaluate(images, labels)
            return mean * len(images), correct
        total, correct = 0.0, 0
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        try:
            pieces = zip(images.split(self._batch_size), labels.split(self._batch_size),
                         strict=True)  # fmt: skip
            for some, theirs in pieces:
                logits = self._model(self._inputs(some))
                losses = functional.cross_entropy(logits, theirs, reduction="none")
                total += float(losses.double().sum())
                correct += int((logits.argmax(1) == theirs).sum())
        finally:
            for module, mode in modes:
                module.training = mode
        return total, correct

    def plan(self, input_shape: Sequence[int]) -> TrainingPlan | None:
        """The plan for samples of this shape; None where the modules have to do it."""
        if self._plan is None and self._may_plan:
            try:
                self._plan = TrainingPlan(
                    self._model,
                    input_shape,
                    batch_size=self._batch_size,
                    recompute=self._recompute,
                    normalization=self._normalization,
                )
            except PlanError:
                self._may_plan = False
        return self._plan

    def _by_modules(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        self._model.train()
        self._model.zero_grad()
        with torch.enable_grad():
            logits = self._model(self._inputs(images))
            loss = functional.cross_entropy(logits, labels)
            loss.backward()
        return loss.item(), int((logits.argmax(1) == labels).sum())

    def _inputs(self, images: Tensor) -> Tensor:
        """What the modules are fed: bytes normalised as the plan does it."""
        if images.is_floating_point() or self._normalization is None:
            return images
        mean, std = (
            torch.tensor(list(part), device=images.device)[:, None, None]
            for part in self._normalization
        )
        return (images.float() / 255 - mean) / std


def _may_plan(model: nn.Module) -> bool:
    """Whether a plan may be tried: sparse layers in float32 on the CPU, native kernels."""
    return (
        cpu.library() is not None
        and bool(sparse_layers(model))
        and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    )
