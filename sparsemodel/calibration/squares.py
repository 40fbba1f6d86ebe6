"""Σ x² of what each weight of a row multiplies: what Wanda needs of data, in linear layers and
convolutions alike.

A weight is looked at as a matrix [out, row], a convolution's row being a patch of
[in/groups · kh · kw], as `sparsemodel.masks.structure` has it. Rows of one group multiply the same
inputs, so that a layer has groups × row sums, and a linear layer one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparsemodel.calibration.batches import first_tensor, moved_to, padding_of, run, unpadded
from sparsemodel.errors import CalibrationError
from sparsemodel.masks.probe import probing

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def rows_of(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Name -> (groups, length of a row) of weights, whose layers are looked at and not called.

    Args:
        names: of weights of linear layers and convolutions.

    Raises:
        CalibrationError: one that is none.

    >>> rows_of(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Linear(5, 3)), ["0.weight"])
    {'0.weight': (2, 18)}
    """
    return {name: _rows(layer) for name, layer in _layers(model, names).items()}


def input_squares(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] = run,
) -> dict[str, Tensor]:
    """Σ x² of the inputs of each layer over all batches: of a layer that is never called, zeros.

    The model runs in eval mode and is left as it was. Where an "attention_mask" of the batch is 0,
    the inputs of linear layers, [n, tokens, in] or [n · tokens, in], are left out.

    Args:
        names: of weights of linear layers and convolutions.
        batches: as of `calibrate`; tensors are moved to the model's device.
        forward: calls the model with a batch.

    Returns:
        Name -> float64 [groups, row] on the CPU (`rows_of`), summed over tokens, or over samples
        and places of an output; what a convolution pads with counts, mostly zeros.

    Raises:
        CalibrationError: a name of something else.
    """
    layers = _layers(model, names)
    device = next(model.parameters()).device
    sums = {
        name: torch.zeros(_rows(layer), dtype=torch.float64, device=device)
        for name, layer in layers.items()
    }
    padding: list[Tensor | None] = [None]

    def watch(name: str, layer: Layer) -> Callable[..., None]:
        def look(_: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = first_tensor(args, kwargs).detach()
            if isinstance(layer, nn.Linear):
                found = unpadded(inputs, padding[0]).double().square().sum(0)
            else:
                found = _patches(layer, inputs)
            sums[name] += found.reshape(sums[name].shape)

        return look

    with probing(model), ExitStack() as hooks, torch.no_grad():
        model.eval()
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(watch(name, layer), with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in batches:
            moved = moved_to(batch, device)
            padding[0] = padding_of(moved)
            forward(model, moved)
    return {name: total.cpu() for name, total in sums.items()}


def _layers(model: nn.Module, names: Iterable[str]) -> dict[str, Layer]:
    modules, found = dict(model.named_modules()), {}
    for name in names:
        path, _, parameter = name.rpartition(".")
        layer = modules.get(path)
        if parameter != "weight" or not isinstance(layer, Layer):
            what = "nothing" if layer is None else f"of a {type(layer).__name__}"
            raise CalibrationError(
                f"{name!r} is {what}: inputs are watched of the weights of linear layers and "
                "convolutions"
            )
        found[name] = layer
    return found


def _rows(layer: Layer) -> tuple[int, int]:
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return groups, math.prod(layer.weight.shape[1:])


def _patches(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    """Σ x² over all patches, [groups, in/groups, *kernel].

    A convolution is linear in its weight: of one that is given x² the gradient of the sum of its
    outputs is the sum of all patches, whatever its stride and padding are. Samples add up before.
    """
    batched = inputs if inputs.dim() == layer.weight.dim() else inputs.unsqueeze(0)
    squares = batched.double().square().sum(0, keepdim=True)
    shape = (layer.groups, *layer.weight.shape[1:])
    weight = torch.zeros(shape, dtype=torch.float64, device=inputs.device, requires_grad=True)
    with torch.enable_grad():
        total = layer._conv_forward(squares, weight, None).sum()
    return torch.autograd.grad(total, weight)[0]
