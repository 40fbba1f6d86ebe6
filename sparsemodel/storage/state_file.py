"""Sparse states on disk: the files of `storage.format`, without a dense weight or mask."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from sparsemodel.errors import CheckpointError
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.format import read_file, take_layer, write_file


def save_state(
    path: str | os.PathLike[str], state: SparseState, *, metadata: Mapping[str, str]
) -> None:
    """Write a state to `path`, replacing what is there in one step; the bytes of `save_sparse`.

    Raises:
        CheckpointError: names that collide, metadata that are not strings, or a file that cannot
            be written.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in state.values.items():
        pattern = state.pattern(name)
        parts = {name: value}
        if pattern is not None:
            parts = {
                f"{name}.values": value,
                f"{name}.mask": np.concatenate([*pattern.bitmap()]),
            }
        taken = parts.keys() & tensors.keys()
        if taken:
            raise CheckpointError(f"{path}: the state already has tensors named {sorted(taken)}")
        tensors |= {key: torch.from_numpy(np.ascontiguousarray(v)) for key, v in parts.items()}
    write_file(path, tensors, {} if state.patterns is None else state.patterns.shapes(), metadata)


def load_state(path: str | os.PathLike[str]) -> tuple[SparseState, dict[str, str]]:
    """Read a file that `save_state` or `save_sparse` wrote: the state, and the caller's strings.

    Raises:
        CheckpointError: as `load_sparse`; or a tensor that is not float32.
    """
    path = Path(path)
    tensors, layers, metadata = read_file(path)
    patterns: dict[str, Pattern] = {}
    for name, shape in layers:
        values, active = take_layer(path, name, shape, tensors)
        tensors[name] = values
        patterns[name] = Pattern.from_positions(shape, np.flatnonzero(active.numpy()))
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"{path}: {name!r} is {tensor.dtype}, expected float32")
    arrays = {name: tensor.numpy() for name, tensor in sorted(tensors.items())}
    return SparseState(arrays, Patterns(patterns) if patterns else None), metadata
