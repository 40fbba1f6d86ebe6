"""Torch models that hold a sparse state: a plain one filled in place, or one of sparse layers.

A state holds what training moves (`carried_tensors`). What is frozen stays the model's own, and
has to be equal wherever the model is built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.layers.gate import check_copied, replaceable_layer
from sparsemodel.layers.linear_and_conv import Execution, SparseConv2d, SparseLayer, SparseLinear
from sparsemodel.layers.sparsify import exchange, sparse_layer_of
from sparsemodel.runtime.state import SparseState, is_counter


@torch.no_grad()
def load_state_(model: nn.Module, state: SparseState) -> None:
    """Copy a state into a plain model, zeros at pruned places; batch counters start at zero.

    What a state does not carry (`fixed_tensors`) stays as it is.

    Raises:
        MaskError: names or shapes are not those of the model; nothing is changed then.
    """
    _check_names(model, state)
    for name, buffer in model.named_buffers():
        if is_counter(name):
            buffer.zero_()
    for name, tensor in carried_tensors(model).items():
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
        SparseModelError: what `sparsify` refuses, or a buffer or frozen parameter of the skeleton
            that the state does not hold and that has no value on "meta".
    """
    _check_names(skeleton, state)
    check_copied(skeleton)
    shapes, new = state.shapes(), dict[int, nn.Module]()
    for name in state.patterns or ():
        layer = replaceable_layer(skeleton, name, tuple(shapes[name]))
        new[id(layer)] = _layer(name, layer, state, execution)
    # Plain layers of a "meta" skeleton are copied as they are: their tensors come below.
    model = exchange(skeleton, new, fuse=fuse)
    _fill(model, state)
    return model


def _layer(
    name: str, layer: nn.Module, state: SparseState, execution: Execution
) -> SparseLinear | SparseConv2d:
    pattern = state.pattern(name)
    assert pattern is not None
    csr = torch.from_numpy(pattern.row_ptr), torch.from_numpy(pattern.cols)
    values = torch.from_numpy(state.values[name].copy())
    own, bias = layer._parameters.get("bias"), None
    if own is not None:
        bias = _filled(f"{name.removesuffix('weight')}bias", own, state).detach().clone()
    try:
        return sparse_layer_of(layer, csr, values, bias, execution=execution)
    except SparseModelError as error:
        raise type(error)(f"{name!r}: {error}") from error


def _fill(model: nn.Module, state: SparseState) -> None:
    """Give all modules but sparse layers tensors of their own with the state's values.

    What several modules share they share afterwards.
    """
    plain = [(p, m) for p, m in model.named_modules() if not isinstance(m, SparseLayer)]
    new: dict[int, Any] = {}
    for path, module in plain:
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in new:
                new[id(tensor)] = _filled(f"{path}.{key}" if path else key, tensor, state)
    for _, module in plain:
        for own in (module._parameters, module._buffers):
            own.update({key: new[id(t)] for key, t in own.items() if t is not None})


def _filled(name: str, tensor: torch.Tensor, state: SparseState) -> torch.Tensor:
    """The tensor of that name with the state's value; itself where the state has none."""
    is_parameter = isinstance(tensor, nn.Parameter)
    if name in state.values:
        value = torch.from_numpy(state.values[name].copy())
        return nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
    if is_counter(name):
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    if tensor.is_meta:
        what = "frozen parameter" if is_parameter else "buffer"
        raise SparseModelError(
            f"the {what} {name!r} is not part of the state; build the model on the CPU"
        )
    return tensor


def carried_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a state carries of a plain model: trained parameters and lasting float buffers.

    A tensor of several names comes once, by the first. Frozen parameters are left out, as they
    stay what the model was built with; where no parameter is trained, all are carried.

    Returns:
        Name -> the model's own tensor, in the order of its state.
    """
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    found: dict[int, str] = {}
    entries = model.state_dict(keep_vars=True)
    for name, tensor in entries.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        is_frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if not (is_trained and is_frozen):
            found.setdefault(id(tensor), name)
    return {name: entries[name].detach() for name in found.values()}


def fixed_tensors(model: nn.Module) -> list[str]:
    """Buffers and parameters that no state carries, so that they have to be the model's own.

    Buffers that are not floats or not persistent (index tables, masks, positions) and frozen
    parameters. Batch norms' counters are not among them.
    """
    carried = carried_tensors(model).keys()
    own = [name for name, _ in (*model.named_buffers(), *model.named_parameters())]
    return [name for name in own if name not in carried and not is_counter(name)]


def _check_names(model: nn.Module, state: SparseState) -> None:
    shapes = {name: tuple(t.shape) for name, t in carried_tensors(model).items()}
    if shapes != (found := {name: tuple(s) for name, s in state.shapes().items()}):
        odd = sorted(set(shapes.items()) ^ set(found.items()))
        raise MaskError(f"the state is not of this model; they differ in {odd[:4]}")
