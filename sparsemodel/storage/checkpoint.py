"""Whole states in sparse files (`storage.header`): what `model.state_dict()` has, and a mask."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsemodel.errors import CheckpointError
from sparsemodel.masks.mask import Mask
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.storage.format import (
    VALUE_DTYPES,
    layer_tensors,
    read_file,
    take_layer,
    write_file,
)
from sparsemodel.storage.header import check_metadata


@dataclass(frozen=True)
class SparseCheckpoint:
    """What a file holds: dense state (zeros at pruned weights), mask and the caller's strings."""

    state: dict[str, torch.Tensor]
    mask: Mask | None
    metadata: dict[str, str]


def save_sparse(
    path: str | os.PathLike[str],
    model_state: Mapping[str, torch.Tensor],
    mask: Mask | None,
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write a model's state to `path`, replacing what is there in one step.

    Equal content gives equal bytes. A reader, or a crash, meets the old file or the new one,
    never a part of either.

    Args:
        path: the file; its folder must exist.
        model_state: name -> tensor, as of `model.state_dict()`; any device.
        mask: which weights exist; None stores every tensor whole.
        metadata: strings to store beside the state.

    Raises:
        CheckpointError: the mask does not fit the state, a pruned weight is not zero, metadata
            that are not strings, or a file that cannot be written.
    """
    path = Path(path)
    check_metadata(path, metadata)
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model_state.items()
    }
    for name, pattern in () if mask is None else mask.csr().items():
        if name not in tensors:
            raise CheckpointError(f"{path}: the state has no tensor {name!r} that the mask names")
        parts = _compress(path, name, tensors.pop(name), pattern)
        taken = parts.keys() & model_state.keys()
        if taken:
            raise CheckpointError(f"{path}: the state already has tensors named {sorted(taken)}")
        tensors |= parts
    write_file(path, tensors, {} if mask is None else mask.shapes(), metadata)


def load_sparse(path: str | os.PathLike[str]) -> SparseCheckpoint:
    """Read a file that `save_sparse` wrote.

    The whole file is read into memory, so it may be replaced or deleted afterwards.

    Raises:
        CheckpointError: the file is missing, truncated or damaged, was not written by
            `save_sparse`, or by a version that this one does not know.
    """
    path = Path(path)
    tensors, layers, metadata = read_file(path)
    patterns: dict[str, Pattern] = {}
    for name, shape in layers:
        values, patterns[name] = take_layer(path, name, shape, tensors)
        weight = torch.zeros(shape, dtype=values.dtype)
        weight.view(-1)[torch.from_numpy(patterns[name].positions())] = values
        tensors[name] = weight
    mask = Mask.from_csr(Patterns(patterns)) if patterns else None
    return SparseCheckpoint(state=dict(sorted(tensors.items())), mask=mask, metadata=metadata)


def _compress(
    path: Path, name: str, weight: torch.Tensor, pattern: Pattern
) -> dict[str, torch.Tensor]:
    """The two tensors that stand for a masked one."""
    if tuple(weight.shape) != pattern.shape or weight.dtype not in VALUE_DTYPES:
        raise CheckpointError(
            f"{path}: {name!r} has shape {tuple(weight.shape)} and dtype {weight.dtype}; its mask "
            f"expects floating point of shape {pattern.shape}"
        )
    values = weight.view(-1)[torch.from_numpy(pattern.positions())]
    if weight.count_nonzero() > values.count_nonzero():
        raise CheckpointError(
            f"{path}: pruned weights of {name!r} are not zero and would be lost; "
            "call mask.apply(model) before saving"
        )
    return layer_tensors(name, values, pattern)
