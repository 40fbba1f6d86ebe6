"""One optimiser step: loss, gradients and update, by autograd or by a native plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.errors import RunError
from prunelab.training.precision import check_precision, computing_in
from prunelab.training.task import Classification, ImageClassification, Task
from sparsemodel.layers.sparsify import sparse_layers
from sparsemodel.optim import SparseAdam, SparseSGD
from sparsemodel.plans import stepper as planned_steps

Objective = Callable[[Tensor, Any, Tensor], Tensor]
"""(logits, batch, rows) -> scalar loss, the mean over the batch."""

Look = Callable[[Tensor, Tensor], None]
"""Called with detached logits [B, C] and labels [B] between the forward pass and the update."""

OPTIMIZERS = ("sgd", "adam", "adamw")


class Loss:
    """The loss of a batch and the logits it was computed from, in one forward pass."""

    def __init__(self, task: Task, objective: Objective | None) -> None:
        if objective is not None and not isinstance(task, Classification):
            raise RunError(
                f"an objective needs logits, and {type(task).__name__} gives none; use a "
                "Classification task, or leave out the objective"
            )
        self._task, self._objective = task, objective

    def mean(self, model: nn.Module, batch: Any, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scalar objective, and logits [B, C] of a Classification."""
        task = self._task
        if not isinstance(task, Classification):
            return task.loss(model, batch).mean(), None
        if self._objective is not None:
            logits = task.logits(model, batch)
            return self._objective(logits, batch, rows), logits
        losses, seen = task.loss_and_logits(model, batch)
        if seen is None:
            raise RunError(
                f"{type(task).__name__}.loss does not call self.logits(model, batch), so nothing "
                "can be recorded of it; let it do so, or derive from Task"
            )
        return losses.mean(), seen

    def labels(self, batch: Any) -> Tensor:
        """int64 [B], of a Classification."""
        assert isinstance(self._task, Classification), "only its batches are looked at"
        return self._task.labels(batch)


class Stepper:
    """Takes optimiser steps on a model; the learning rate is set in the optimiser.

    Args:
        objective: None: the mean of the task's loss.
        batch_size: usual size of a batch; one more is allowed (see `batches.batches`).
        planned: whether a native plan may take the steps, where there is one; it tells nothing
            of logits.
        precision: in what numbers the network computes, one of PRECISIONS.

    Raises:
        RunError: a sparsified model in another precision than float32.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: torch.optim.Optimizer,
        *,
        objective: Objective | None,
        batch_size: int,
        planned: bool,
        precision: str,
    ) -> None:
        check_precision(precision, model)
        self._model, self._optimizer, self._precision = model, optimizer, precision
        self._loss = Loss(task, objective)
        # One sample more: the last batch of an epoch may be larger by one.
        plain = planned and objective is None and is_planned(model, task)
        self._planned = planned_steps.Stepper(model, batch_size=batch_size + 1) if plain else None

    def step(self, batch: Any, rows: Tensor, look: Look) -> Tensor:
        """One update; returns the loss before it, float64, where the model is.

        Raises:
            RunError: a single sample that the model cannot be trained on.
        """
        if self._planned is not None and self._planned.plan(batch[0].shape[1:]) is not None:
            loss, _ = self._planned.step(*batch, optimizer=self._optimizer)
            return torch.tensor(loss, dtype=torch.float64)
        self._optimizer.zero_grad()
        try:
            with computing_in(self._precision, self._model):
                mean, logits = self._loss.mean(self._model, batch, rows)
        except ValueError as error:
            raise _explained(error, len(rows)) from None
        if logits is not None:
            look(logits.detach(), self._loss.labels(batch))
        mean.backward()
        self._optimizer.step()
        return mean.detach().double()


def is_planned(model: nn.Module, task: Task) -> bool:
    """Whether a plan's loss is the task's: softmax cross-entropy of a sparse network's logits."""
    return bool(sparse_layers(model)) and is_classification(task)


def is_classification(task: Task) -> bool:
    """Whether a task is the programs': softmax cross-entropy and hits of the logits of images."""
    kind: Any = type(task)
    return (
        isinstance(task, ImageClassification)
        and (kind.loss, kind.measure) == (Classification.loss, Classification.measure)
        and (kind.logits, kind.labels) == (ImageClassification.logits, ImageClassification.labels)
    )


def make_optimizer(
    model: nn.Module, name: str, *, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """An optimiser of the parameters with requires_grad, sparse where the model is.

    The learning rate is 0 until it is set. Adam and AdamW have their usual moments, (0.9, 0.999).

    Raises:
        RunError: there is no such parameter.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise RunError(f"{type(model).__name__} has no parameter with requires_grad to train")
    is_sparse = bool(sparse_layers(model))
    if name in ("adam", "adamw"):
        decoupled = name == "adamw"
        if is_sparse:
            return SparseAdam(trained, lr=0.0, weight_decay=weight_decay, decoupled=decoupled)
        dense = torch.optim.AdamW if decoupled else torch.optim.Adam
        return dense(trained, lr=0.0, weight_decay=weight_decay)
    assert name == "sgd", f"checked against {OPTIMIZERS}"
    kind = SparseSGD if is_sparse else torch.optim.SGD
    return kind(trained, lr=0.0, momentum=momentum, weight_decay=weight_decay)


def _explained(error: ValueError, num_samples: int) -> ValueError:
    if num_samples == 1 and "more than 1 value per channel" in str(error):
        return RunError(
            "batch norm cannot be trained on a single sample; use a batch_size of 2 or more and "
            "keep at least 2 samples"
        )
    return error
