"""Evaluate a model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparsemodel.errors import MaskError

Loss = Callable[[nn.Module], torch.Tensor]


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Restore gradients, requires_grad, buffers and train/eval modes of `model` on exit.

    Every `.grad` is None inside. Values of parameters are not saved: the body must not change
    them.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                setattr(module, name, buffer)


@contextmanager
def differentiable(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
    """`probing`, with requires_grad on for the named parameters and off for all others.

    Yields:
        Name -> parameter, in the order of `names`.
    """
    selected = named_weights(model, names)
    with probing(model), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in selected.values():
            parameter.requires_grad_(True)
        yield selected


def named_weights(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of `model` with these names, in the order of `names`.

    Raises:
        MaskError: no name was given, or the model has no such parameter.
    """
    parameters = dict(model.named_parameters())
    selected = {}
    for name in names:
        if name not in parameters:
            raise MaskError(f"the model has no parameter {name!r}; it has {list(parameters)}")
        selected[name] = parameters[name]
    if not selected:
        raise MaskError("expected the names of one parameter or more, got none")
    return selected


def scalar_loss(model: nn.Module, loss: Loss) -> torch.Tensor:
    """The value of `loss(model)`, checked to be a scalar that depends on the parameters.

    Raises:
        MaskError: the value has several elements or no gradient.
    """
    value = loss(model)
    if value.numel() != 1:
        raise MaskError(f"expected a scalar loss, got shape {tuple(value.shape)}; reduce it")
    if not value.requires_grad:
        raise MaskError(
            "the loss has no gradient: it must depend on the layers asked for, without no_grad or "
            "detach on the way"
        )
    return value.reshape(())
