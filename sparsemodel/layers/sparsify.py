"""From a masked model to one that stores only its active weights, and back."""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.layers.fusing import fuse_forward, unfuse_forward
from sparsemodel.layers.gate import check_copied, replaceable_layer
from sparsemodel.layers.linear_and_conv import Execution, SparseConv2d, SparseLayer, SparseLinear
from sparsemodel.layers.norm_and_pool import FUSED
from sparsemodel.masks.mask import Mask

_PRETRAINED = "save_pretrained"
_PLAIN = {fused: plain for plain, fused in FUSED.items()}


def sparsify(
    model: nn.Module, mask: Mask, *, execution: Execution = "auto", fuse: bool = True
) -> nn.Module:
    """A copy of `model` whose layers in the mask store and train only their active weights.

    `model` stays as it is. In the copy a layer's `weight` becomes `values` (with `row_ptr` and
    `cols` as buffers); all other parameters and buffers keep their names. Weights outside the
    mask are dropped. Batch norms and pools are exchanged for equivalents that work in the layout
    of sparse layers. Give it to any optimiser; SparseSGD and SparseAdam have native steps.

    Args:
        model: its masked layers are nn.Linear or nn.Conv2d.
        mask: weight name -> pattern.
        execution: for each layer "sparse" or "dense" kernels, or "auto": what the cost model
            takes for faster. Under masks of whole blocks of linear layers also "blocks"; of a
            model where only some layers are so, set `execution` of those.
        fuse: whether batch norm, addition and ReLU become one pass where the model can be
            traced by torch.fx. Results are the same up to rounding. What forward decides by
            Python values from elsewhere (globals, isinstance) is decided once, here; a model that
            gets hooks, other parts or other settings later goes module by module.

    Raises:
        MaskError: the model lacks a parameter of the mask, it has another shape, or its pattern
            is not made as `execution` needs.
        SparseModelError: a layer that has no sparse form, does not take `execution`, is
            parametrised, has hooks, or whose weight or bias is tied to another; a parameter with
            hooks anywhere in the model (a copy has none). The message names it.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> mask = Mask({"2.weight": torch.eye(2, 8).bool()})
    >>> [(name, len(p)) for name, p in sparsify(model, mask).named_parameters()]
    [('0.weight', 8), ('0.bias', 8), ('2.values', 2), ('2.bias', 2)]
    """
    check_copied(model)
    layers = {name: replaceable_layer(model, name, tuple(mask[name].shape)) for name in mask}
    new = {}
    for name, layer in layers.items():
        try:
            new[id(layer)] = sparse_layer(layer, mask[name], execution=execution)
        except SparseModelError as error:
            raise type(error)(f"{name!r}: {error}") from error
    return exchange(model, new, fuse=fuse)


def densify(model: nn.Module) -> nn.Module:
    """A copy of a sparsified model with plain layers again, zeros at pruned weights.

    Parameters and buffers have the names, values and order that `model` had before `sparsify`.
    """
    new = {
        id(layer): layer.to_dense()
        for layer in model.modules()
        if isinstance(layer, SparseLinear | SparseConv2d)
    }
    dense: nn.Module = copy.deepcopy(model, new)
    for module in dense.modules():
        unfuse_forward(module)
        module.__dict__.pop(_PRETRAINED, None)
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
    return dense


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers of a model by the name of the weight they stand for, in its order."""
    return {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, SparseLayer)
    }


def mask_of(model: nn.Module) -> Mask:
    """The mask that a sparsified model is under.

    Raises:
        MaskError: the model has no sparse layer.
    """
    layers = sparse_layers(model)
    if not layers:
        raise MaskError(f"{type(model).__name__} has no sparse layers; call sparsify(model, mask)")
    return Mask({name: layer.mask() for name, layer in layers.items()})


def sparse_layer(
    layer: nn.Module, pattern: torch.Tensor, *, execution: Execution
) -> SparseLinear | SparseConv2d:
    """The sparse form of a plain layer under a pattern of its weight."""
    match layer:
        case nn.Linear():
            return SparseLinear.from_dense(layer, pattern, execution=execution)
        case nn.Conv2d():
            return SparseConv2d.from_dense(layer, pattern, execution=execution)
    raise _no_sparse_form(layer)


def sparse_layer_of(
    layer: nn.Module,
    csr: tuple[torch.Tensor, torch.Tensor],
    values: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    execution: Execution,
) -> SparseLinear | SparseConv2d:
    """A sparse layer in the place of a plain one, of which no weight is read."""
    match layer:
        case nn.Linear():
            return SparseLinear.from_csr(layer, csr, values, bias, execution=execution)
        case nn.Conv2d():
            return SparseConv2d.from_csr(layer, csr, values, bias, execution=execution)
    raise _no_sparse_form(layer)


def _no_sparse_form(layer: nn.Module) -> SparseModelError:
    return SparseModelError(
        f"a {type(layer).__name__} has no sparse form (nn.Linear and nn.Conv2d have); leave it out "
        "of the mask"
    )


def exchange(model: nn.Module, new: Mapping[int, nn.Module], *, fuse: bool) -> nn.Module:
    """A copy of `model` with some modules (by id) replaced and the rest in the sparse layout."""
    # As entries of the memo, replaced layers are never copied: no second dense weight is made.
    sparse: nn.Module = copy.deepcopy(model, dict(new))
    for module in sparse.modules():
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
    if fuse:
        fuse_forward(sparse)
    for module in sparse.modules():
        if new and hasattr(module, _PRETRAINED):
            module.__dict__[_PRETRAINED] = types.MethodType(_no_pretrained, module)
    return sparse


def _no_pretrained(model: nn.Module, *_: Any, **__: Any) -> None:
    """In the place of transformers' method, whose files know no sparse layers."""
    raise SparseModelError(
        f"from_pretrained would take a file of a sparse {type(model).__name__} for a dense one and "
        "draw its weights anew; write it by sparsemodel.save(model, path), or "
        "sparsemodel.densify(model).save_pretrained(path)"
    )
