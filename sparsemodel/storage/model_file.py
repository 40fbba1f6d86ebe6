"""Sparse checkpoints of sparsified models, written and read without their dense weights.

The files are those of `storage.checkpoint`, to the byte: what is saved here can be read there as
dense state and mask, and the other way round.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sparsemodel.errors import CheckpointError
from sparsemodel.layers.linear_and_conv import Execution, SparseLayer
from sparsemodel.layers.sparsify import exchange, sparse_layer, sparse_layers
from sparsemodel.storage.checkpoint import layer_tensors, read_file, take_layer, write_file

_STATE_KEYS = ("values", "row_ptr", "cols")


def save_sparse_model(
    path: str | os.PathLike[str], model: nn.Module, *, metadata: Mapping[str, str]
) -> None:
    """Write a sparsified model to `path`, replacing what is there in one step.

    The bytes are those that `save_sparse` writes for the dense state and the model's mask.

    Args:
        path: the file; its folder must exist.
        model: sparsified.
        metadata: strings to store beside the state.

    Raises:
        CheckpointError: the model has no sparse layer, metadata that are not strings, or a file
            that cannot be written.
    """
    path, layers = Path(path), sparse_layers(model)
    if not layers:
        raise CheckpointError(f"{path}: the model has no sparse layers; use save_sparse")
    if not all(isinstance(item, str) for pair in metadata.items() for item in pair):
        raise CheckpointError(f"{path}: metadata must map strings to strings, got {dict(metadata)}")
    left_out = _sparse_keys(layers)
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
        if name not in left_out
    }
    for name, layer in layers.items():
        parts = layer_tensors(name, layer.values.detach().cpu(), layer.mask().cpu())
        taken = sorted(parts.keys() & tensors.keys())
        if taken:
            raise CheckpointError(f"{path}: the state already has tensors named {taken}")
        tensors |= parts
    shapes = {name: layer.weight_shape for name, layer in layers.items()}
    write_file(path, tensors, shapes, metadata)


def load_sparse_model(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    execution: Execution = "auto",
    fuse: bool = True,
) -> tuple[nn.Module, dict[str, str]]:
    """Read a sparse checkpoint into a sparsified copy of `model`.

    Args:
        path: a file that `save_sparse_model` or `save_sparse` wrote, with a mask.
        model: the architecture, plain or sparsified under whatever mask; stays as it is.
        execution: as in `sparsify`, for layers that are plain in `model`.
        fuse: as in `sparsify`.

    Returns:
        The model and the metadata.

    Raises:
        CheckpointError: a file that is missing, damaged, without a mask, or of another model.
    """
    path = Path(path)
    tensors, layers, metadata = read_file(path)
    if not layers:
        raise CheckpointError(f"{path}: it was saved without a mask; use load_sparse")
    new = {}
    for name, shape in layers:
        values, pattern = take_layer(path, name, shape, tensors)
        layer = _layer(path, model, name, shape)
        new[id(layer)] = _with_values(layer, pattern, values, execution)
    loaded = exchange(model, new, fuse=fuse)
    expected = loaded.state_dict().keys() - _sparse_keys(dict(sparse_layers(loaded)))
    masked = {name for name, _ in layers}
    differing = sorted(expected ^ tensors.keys() | sparse_layers(loaded).keys() ^ masked)
    if differing:
        raise CheckpointError(f"{path}: file and model differ in {differing}; is it another model?")
    try:
        loaded.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: made for another model ({error})") from error
    return loaded, metadata


def _layer(path: Path, model: nn.Module, name: str, shape: tuple[int, ...]) -> nn.Module:
    """The layer of `model` whose weight is called `name`."""
    layers: dict[str, nn.Module] = dict(model.named_modules())
    layer = layers.get(name.removesuffix("weight").removesuffix("."))
    weight = getattr(layer, "weight", None)
    if layer is None or not isinstance(weight, torch.Tensor) or tuple(weight.shape) != shape:
        found = None if weight is None else tuple(weight.shape)
        raise CheckpointError(
            f"{path}: its layer {name!r} has shape {shape}, in the model {found}; is it another "
            "model?"
        )
    return layer


def _with_values(
    layer: nn.Module, pattern: torch.Tensor, values: torch.Tensor, execution: Execution
) -> SparseLayer:
    """A sparse layer like `layer`, with this pattern and these values."""
    if isinstance(layer, SparseLayer):
        sparse = copy.deepcopy(layer)
        sparse.move_pattern(torch.nonzero(pattern.reshape(-1)).reshape(-1))
    else:
        sparse = sparse_layer(layer, pattern, execution=execution)
    with torch.no_grad():
        sparse.values.copy_(values)
    return sparse


def _sparse_keys(layers: Mapping[str, SparseLayer]) -> set[str]:
    """Names in the state dict of what stands for the layers' weights."""
    prefixes = [name.removesuffix("weight") for name in layers]
    return {f"{prefix}{key}" for prefix in prefixes for key in _STATE_KEYS}
