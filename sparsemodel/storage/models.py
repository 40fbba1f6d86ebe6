"""Models to sparse files (`storage.format`) and back, pruned layers never made whole."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import overload

import torch
from torch import nn

from sparsemodel.errors import CheckpointError, MaskError
from sparsemodel.layers.gate import check_copied, replaceable_layer
from sparsemodel.layers.linear_and_conv import Execution, SparseLayer
from sparsemodel.layers.sparsify import exchange, sparse_layer_of, sparse_layers
from sparsemodel.masks.mask import Mask
from sparsemodel.runtime.pattern import Pattern
from sparsemodel.runtime.state import is_counter
from sparsemodel.storage.checkpoint import SparseCheckpoint, load_sparse, save_sparse
from sparsemodel.storage.format import layer_tensors, read_file, take_layer, write_file

_STATE_KEYS = ("values", "row_ptr", "cols")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    mask: Mask | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model to `path`, replacing what is there in one step.

    A sparsified model and the plain one under the same mask give the same bytes.

    Args:
        model: sparsified, or plain.
        path: the file; its folder must exist.
        mask: of a plain model: which weights to store; the others have to be zero. None stores
            all of them. A sparsified model has its own.
        metadata: strings to store beside the model.

    Raises:
        CheckpointError: a mask that does not fit, a pruned weight that is not zero, metadata that
            are not strings, or a file that cannot be written.
    """
    layers = sparse_layers(model)
    if not layers:
        save_sparse(path, model.state_dict(), mask, metadata=metadata or {})
        return
    if mask is not None:
        raise CheckpointError(
            f"{path}: a mask was given, but the model is sparsified and has its own; leave it out"
        )
    path, left_out = Path(path), _sparse_keys(layers)
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
        if name not in left_out
    }
    for name, layer in layers.items():
        csr = (part.cpu().numpy() for part in (layer.row_ptr, layer.cols))
        pattern = Pattern(tuple(layer.weight_shape), *csr)
        parts = layer_tensors(name, layer.values.detach().cpu(), pattern)
        taken = sorted(parts.keys() & tensors.keys())
        if taken:
            raise CheckpointError(f"{path}: the state already has tensors named {taken}")
        tensors |= parts
    shapes = {name: layer.weight_shape for name, layer in layers.items()}
    write_file(path, tensors, shapes, metadata or {})


@overload
def load(path: str | os.PathLike[str]) -> SparseCheckpoint: ...


@overload
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    execution: Execution = "auto",
    fuse: bool = True,
) -> nn.Module: ...


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    execution: Execution = "auto",
    fuse: bool = True,
) -> nn.Module | SparseCheckpoint:
    """Read what `save` wrote.

    Args:
        path: the file.
        model: the architecture: plain, freshly built for instance, or sparsified under whatever
            mask; stays as it is. Built under `torch.device("meta")`, it takes no memory.
        execution: as in `sparsify`, for layers that are plain in `model`.
        fuse: as in `sparsify`.

    Returns:
        With `model` a copy of it with the file's state, sparsified if the file has a mask.
        Without, the state (dense, zeros at pruned weights), the mask and the metadata.

    Raises:
        CheckpointError: a file that is missing, damaged, or of another model.
        SparseModelError: a model that cannot be copied, or a layer under a mask that has no sparse
            form (as in `sparsify`).
    """
    if model is None:
        return load_sparse(path)
    path = Path(path)
    tensors, layers, _ = read_file(path)
    check_copied(model)
    new = {}
    for name, shape in layers:
        values, pattern = take_layer(path, name, shape, tensors)
        try:
            layer = replaceable_layer(model, name, shape)
        except MaskError as error:
            raise CheckpointError(f"{path}: {error}; is it another model?") from error
        new[id(layer)] = _with_values(layer, pattern, values, execution)
    loaded = exchange(model, new, fuse=fuse) if layers else copy.deepcopy(model)
    _check_names(path, loaded, tensors, {name for name, _ in layers})
    on_meta = any(tensor.is_meta for tensor in loaded.state_dict().values())
    try:
        loaded.load_state_dict(tensors, strict=False, assign=on_meta)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: made for another model ({error})") from error
    for path_, module in loaded.named_modules():  # what the file does not hold
        for key, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta:
                continue
            if not is_counter(key):
                raise CheckpointError(
                    f"{path}: it does not hold the buffer {key!r} of {path_!r}; build the model on "
                    "the CPU"
                )
            module._buffers[key] = torch.zeros_like(buffer, device="cpu")
    return loaded


def _check_names(
    path: Path, loaded: nn.Module, tensors: Mapping[str, torch.Tensor], masked: set[str]
) -> None:
    """Refuse a file with other names than the model's; integer counters may be missing in it."""
    layers = sparse_layers(loaded)
    own = {n: t for n, t in loaded.state_dict().items() if n not in _sparse_keys(layers)}
    missing = {name for name, t in own.items() if t.is_floating_point()} - tensors.keys()
    differing = sorted(missing | tensors.keys() - own.keys() | layers.keys() ^ masked)
    if differing:
        raise CheckpointError(f"{path}: file and model differ in {differing}; is it another model?")


def _with_values(
    layer: nn.Module, pattern: Pattern, values: torch.Tensor, execution: Execution
) -> SparseLayer:
    """A sparse layer like `layer`, with this pattern and these values; its bias comes later."""
    if isinstance(layer, SparseLayer):
        sparse = copy.deepcopy(layer)
        sparse.move_pattern(torch.from_numpy(pattern.positions()))
        with torch.no_grad():
            sparse.values.copy_(values)
        return sparse
    weight = layer.weight
    assert isinstance(weight, torch.Tensor), "checked above"
    device = torch.device("cpu") if weight.is_meta else weight.device
    csr = (
        torch.from_numpy(pattern.row_ptr).to(device),
        torch.from_numpy(pattern.cols).to(device),
    )
    values = values.to(device, weight.dtype)
    bias = None if layer.bias is None else values.new_empty(len(weight))
    return sparse_layer_of(layer, csr, values, bias, execution=execution)


def _sparse_keys(layers: Mapping[str, SparseLayer]) -> set[str]:
    """Names in the state dict of what stands for the layers' weights."""
    prefixes = [name.removesuffix("weight") for name in layers]
    return {f"{prefix}{key}" for prefix in prefixes for key in _STATE_KEYS}
