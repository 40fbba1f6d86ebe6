"""Sparse states on disk: the files of `storage.header`, without torch or a dense weight."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from sparsemodel.errors import CheckpointError
from sparsemodel.runtime.pattern import Pattern, Patterns, Shape
from sparsemodel.runtime.state import Array, SparseState, is_counter
from sparsemodel.storage.header import (
    damaged,
    header_metadata,
    packed_bits,
    read_bytes,
    read_header,
    stored_pattern,
    write_bytes,
)


def save_state(
    path: str | os.PathLike[str], state: SparseState, *, metadata: Mapping[str, str]
) -> None:
    """Write a state to `path`, replacing what is there in one step; the bytes of `save_sparse`.

    Raises:
        CheckpointError: names that collide, metadata that are not strings, or a file that cannot
            be written.
    """
    path = Path(path)
    arrays: dict[str, Array] = {}
    for name, value in state.values.items():
        pattern = state.pattern(name)
        parts = {name: value}
        if pattern is not None:
            parts = {f"{name}.values": value, f"{name}.mask": packed_bits(pattern)}
        taken = parts.keys() & arrays.keys()
        if taken:
            raise CheckpointError(f"{path}: the state already has tensors named {sorted(taken)}")
        arrays |= {key: np.ascontiguousarray(part) for key, part in parts.items()}
    layers = {} if state.patterns is None else state.patterns.shapes()
    beside = header_metadata(path, layers, metadata)
    write_bytes(path, safetensors.numpy.save(arrays, metadata=beside))


def load_state(path: str | os.PathLike[str]) -> tuple[SparseState, dict[str, str]]:
    """Read a file that `save_state` or `save_sparse` wrote: the state, and the caller's strings.

    What torch's batch norms count of their batches is no part of a state, and left out.

    Raises:
        CheckpointError: the file is missing, truncated or damaged, of another kind or version, or
            holds a tensor that is not float32.
    """
    path = Path(path)
    data = read_bytes(path)
    try:
        arrays = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise damaged(path, f"it is no whole safetensors file of float32 ({error})") from error
    arrays = {n: array for n, array in arrays.items() if not is_counter(n) or array.shape}
    layers, metadata = read_header(path, data)
    patterns: dict[str, Pattern] = {}
    for name, shape in layers:
        if name in arrays:
            raise damaged(path, f"it holds {name!r} twice")
        arrays[name], patterns[name] = _take_layer(path, name, shape, arrays)
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise CheckpointError(f"{path}: {name!r} is {array.dtype}, expected float32")
    values = dict(sorted(arrays.items()))
    return SparseState(values, Patterns(patterns) if patterns else None), metadata


def _take_layer(
    path: Path, name: str, shape: Shape, arrays: dict[str, Array]
) -> tuple[Array, Pattern]:
    """Take a masked layer's two arrays out; its values and its pattern."""
    missing = [key for key in (f"{name}.values", f"{name}.mask") if key not in arrays]
    if missing:
        raise damaged(path, f"it lacks the tensors {missing}")
    values, packed = arrays.pop(f"{name}.values"), arrays.pop(f"{name}.mask")
    pattern = stored_pattern(path, name, shape, packed)
    if values.shape != (pattern.num_active,):
        raise damaged(
            path,
            f"the values of {name!r} have shape {values.shape}, expected {pattern.num_active} "
            "values",
        )
    return values, pattern
