"""Scores from gradients: of the parameters for each sample, and of the input over training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from datapruning.errors import ScoreError
from prunelab.training.task import Classification, Task, to_device
from sparsemodel.errors import SparseModelError
from sparsemodel.gradients.per_sample import gradient_norms

Result = TypeVar("Result")


def grand(
    task: Task, model: nn.Module, batch: Any, *, parameters: Sequence[str] | None = None
) -> Tensor:
    """‖∇θ ℓ(x, y)‖₂ of each sample, from one backward pass of the batch.

    Exact over all chosen parameters, whatever the batch size. Meant for a checkpoint early in
    training, then averaged over independent runs. Of a sparsified model it is the norm over its
    active weights; of one with adapters, over what is trainable.
    Source: Paul et al., Deep Learning on a Data Diet (NeurIPS 2021), definition 2.1, at one time
    and without the expectation.

    Args:
        model: in eval mode: batch norm in train mode mixes samples, dropout draws at random.
        batch: what `Samples.batch` returned; moved to the model's device.
        parameters: their names; None: all that require a gradient.

    Returns:
        float64 [B] on the CPU; high means keep. NaN where the loss is NaN.

    Raises:
        ScoreError: a model in train mode, unknown names, or layers whose gradients cannot be told
            apart by sample (the message names them).
    """
    return norms(task, model, batch, parameters=parameters).cpu()


def norms(
    task: Task, model: nn.Module, batch: Any, *, parameters: Sequence[str] | None = None
) -> Tensor:
    """`grand` on the model's device; the host has not waited for it."""
    batch = on_device(model, batch)
    check_eval(model)
    seen: list[Tensor] = []

    def loss(m: nn.Module) -> Tensor:
        seen.append(task.loss(m, batch))
        return seen[-1]

    found = explained(
        lambda: gradient_norms(model, loss, num_samples=batch_size(batch), parameters=parameters)
    )
    return found.masked_fill(seen[-1].detach().isnan(), torch.nan)


def vog(task: Task, models: Sequence[nn.Module], batch: Any) -> Tensor:
    """Variance of gradients: how much a sample's input gradient moves over checkpoints.

    The gradient of the true label's logit for the input, at K checkpoints of one training run;
    √(1/K Σ_k (S_k − mean S)²) at each number of the input, averaged over them.
    Source: Agarwal et al., Estimating Example Difficulty Using Variance of Gradients (CVPR 2022),
    equations 1 to 3.
    Departs from the paper: not normalised within classes (select with class balance for that);
    colour channels count as separate numbers.

    Args:
        task: of classes.
        models: checkpoints, two or more, in eval mode.
        batch: a tuple whose first tensor is the input.

    Returns:
        float64 [B] on the CPU; high means keep.

    Raises:
        ScoreError: fewer than two models, one in train mode, a task without classes, or an input
            that has no gradient (tokens).
    """
    if not isinstance(task, Classification):
        raise ScoreError(f"vog needs the logits of a task with classes, not {type(task).__name__}")
    if len(models) < 2:
        raise ScoreError(f"vog is a spread over checkpoints: give two or more, got {len(models)}")
    # Welford's running moments: no gradient of an earlier checkpoint has to stay.
    mean = squares = torch.zeros((), dtype=torch.float64)
    for count, model in enumerate(models, start=1):
        gradient = _input_gradient(task, model, batch).double().cpu()
        step = gradient - mean
        mean = mean + step / count
        squares = squares + step * (gradient - mean)
    return (squares / len(models)).sqrt().flatten(1).mean(1)


def _input_gradient(task: Classification, model: nn.Module, batch: Any) -> Tensor:
    """∇x f_y(x) of each sample, [B, …]."""
    check_eval(model)
    parts = on_device(model, batch)
    if isinstance(parts, Mapping) or not parts[0].is_floating_point():
        raise ScoreError("vog needs an input with a gradient, such as images; tokens have none")
    x = parts[0].detach().requires_grad_()
    with torch.enable_grad():
        logits = task.logits(model, (x, *parts[1:]))
        own = logits.gather(1, task.labels(parts)[:, None]).sum()
        gradient: Tensor = torch.autograd.grad(own, x)[0]
    return gradient


def check_eval(model: nn.Module) -> None:
    """Raise ScoreError if a part of the model is in train mode."""
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ScoreError(
            f"{training or type(model).__name__!r} is in train mode, in which batch norm mixes "
            "samples and dropout draws at random; call model.eval() before scoring"
        )


def on_device(model: nn.Module, batch: Any) -> Any:
    """A batch on the model's device."""
    has_parameters = next(model.parameters(), None) is not None
    return to_device(batch, device_of(model)) if has_parameters else batch


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the CPU for one that has none."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def batch_size(batch: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return batch_size(next(iter(parts)))


def explained(compute: Callable[[], Result]) -> Result:
    """What `compute` returns; errors of the sparse core become errors of a score."""
    try:
        return compute()
    except SparseModelError as error:
        raise ScoreError(str(error)) from error
