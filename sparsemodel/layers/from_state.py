"""Torch models that hold a sparse state: a plain one filled in place, or one of sparse layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.layers.linear_and_conv import Execution, SparseConv2d, SparseLayer, SparseLinear
from sparsemodel.layers.sparsify import exchange, sparse_layer_of
from sparsemodel.runtime.state import SparseState


@torch.no_grad()
def load_state_(model: nn.Module, state: SparseState) -> None:
    """Copy a state into a plain model, zeros at pruned places; integer counters start at zero.

    Raises:
        MaskError: names or shapes are not those of the model; nothing is changed then.
    """
    own = model.state_dict()
    _check_names(own, state)
    for name, tensor in own.items():
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        value, pattern = torch.from_numpy(state.values[name]), state.pattern(name)
        if pattern is None:
            tensor.copy_(value)
        else:
            places = torch.from_numpy(pattern.positions()).to(tensor.device)
            tensor.zero_().view(-1)[places] = value.to(tensor.device)


def sparse_model(
    skeleton: nn.Module, state: SparseState, *, execution: Execution = "auto", fuse: bool = True
) -> nn.Module:
    """A sparsified model that holds `state`, made on no memory but the state's size.

    Args:
        skeleton: the architecture; its weights are not read, so it may lie on device "meta".
        state: under patterns; its arrays are copied.
        execution, fuse: as in `sparsify`.

    Raises:
        MaskError: names or shapes are not those of the model.
        SparseModelError: a layer under a pattern that has no sparse form, or a buffer of the
            skeleton that the state does not hold and that has no value on "meta".
    """
    _check_names(skeleton.state_dict(), state)
    modules = dict(skeleton.named_modules())
    new: dict[int, nn.Module] = {}
    for name in state.patterns or ():
        layer = modules[name.rpartition(".")[0]]
        new[id(layer)] = _layer(name, layer, state, execution)
    # Plain layers of a "meta" skeleton are copied as they are: their tensors come below.
    model = exchange(skeleton, new, fuse=fuse)
    for path, module in model.named_modules():
        if not isinstance(module, SparseLayer):
            _fill(f"{path}." if path else "", module, state)
    return model


def _layer(
    name: str, layer: nn.Module, state: SparseState, execution: Execution
) -> SparseLinear | SparseConv2d:
    pattern = state.pattern(name)
    assert pattern is not None
    csr = torch.from_numpy(pattern.row_ptr), torch.from_numpy(pattern.cols)
    values = torch.from_numpy(state.values[name].copy())
    offsets = state.values.get(f"{name.removesuffix('weight')}bias")
    bias = None if offsets is None else torch.from_numpy(offsets.copy())
    try:
        return sparse_layer_of(layer, csr, values, bias, execution=execution)
    except SparseModelError as error:
        raise type(error)(f"{name!r}: {error}") from error


def _fill(prefix: str, module: nn.Module, state: SparseState) -> None:
    """Give a module tensors of its own with the state's values."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            value = torch.from_numpy(state.values[prefix + key].copy())
            module._parameters[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for key, buffer in module._buffers.items():
        if buffer is None:
            continue
        if prefix + key in state.values:
            module._buffers[key] = torch.from_numpy(state.values[prefix + key].copy())
        elif not buffer.is_floating_point() and key not in module._non_persistent_buffers_set:
            module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        elif buffer.is_meta:
            raise SparseModelError(
                f"the buffer {prefix + key!r} is not part of the state; build the model on the CPU"
            )


def _check_names(own: dict[str, Any], state: SparseState) -> None:
    shapes = {name: tuple(t.shape) for name, t in own.items() if t.is_floating_point()}
    if shapes != (found := {name: tuple(s) for name, s in state.shapes().items()}):
        odd = sorted(set(shapes.items()) ^ set(found.items()))
        raise MaskError(f"the state is not of this model; they differ in {odd[:4]}")
