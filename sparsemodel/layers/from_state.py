"""Torch models that hold a sparse state: a plain one filled in place, or one of sparse layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.layers.gate import check_copied, replaceable_layer
from sparsemodel.layers.linear_and_conv import Execution, SparseConv2d, SparseLayer, SparseLinear
from sparsemodel.layers.sparsify import exchange, sparse_layer_of
from sparsemodel.runtime.state import SparseState


@torch.no_grad()
def load_state_(model: nn.Module, state: SparseState) -> None:
    """Copy a state into a plain model, zeros at pruned places; batch counters start at zero.

    Buffers that a state does not carry (`fixed_buffers`) stay as they are.

    Raises:
        MaskError: names or shapes are not those of the model; nothing is changed then.
    """
    own = model.state_dict()
    _check_names(own, state)
    for name, tensor in own.items():
        if not tensor.is_floating_point():
            if _is_counter(name):
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
        SparseModelError: what `sparsify` refuses, or a buffer of the skeleton that the state does
            not hold and that has no value on "meta".
    """
    _check_names(skeleton.state_dict(), state)
    check_copied(skeleton)
    shapes, new = state.shapes(), dict[int, nn.Module]()
    for name in state.patterns or ():
        layer = replaceable_layer(skeleton, name, tuple(shapes[name]))
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
        name = prefix + key
        if name in state.values:
            module._buffers[key] = torch.from_numpy(state.values[name].copy())
        elif _is_counter(name):
            module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        elif buffer.is_meta:
            raise SparseModelError(
                f"the buffer {name!r} is not part of the state; build the model on the CPU"
            )


def fixed_buffers(model: nn.Module) -> list[str]:
    """Buffers that no state carries, so that they have to be the model's own.

    Those that are not floats or not persistent: index tables, masks, positions. Batch norms'
    counters are not among them.
    """
    carried = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    return [n for n, _ in model.named_buffers() if n not in carried and not _is_counter(n)]


def _is_counter(name: str) -> bool:
    """Whether a state's entry counts the batches of a batch norm."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def _check_names(own: dict[str, Any], state: SparseState) -> None:
    shapes = {name: tuple(t.shape) for name, t in own.items() if t.is_floating_point()}
    if shapes != (found := {name: tuple(s) for name, s in state.shapes().items()}):
        odd = sorted(set(shapes.items()) ^ set(found.items()))
        raise MaskError(f"the state is not of this model; they differ in {odd[:4]}")
