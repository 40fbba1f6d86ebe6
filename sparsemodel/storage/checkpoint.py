"""Sparse checkpoints: a model's state in a safetensors file, pruned weights left out.

A masked tensor NAME is stored as two: `NAME.values`, its active values in flat order, and
`NAME.mask`, its pattern in flat order, eight weights a byte, the first in the highest bit, the
last byte filled with zeros. All other tensors are stored whole. The header's metadata has one
key, `fedprune`, with a JSON object: "format" and "version", "layers" ([name, shape] pairs in
the mask's order) or null without a mask, and "metadata", the caller's own strings.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from sparsemodel.errors import CheckpointError
from sparsemodel.masks.mask import Mask
from sparsemodel.storage.files import write_atomically

FORMAT = "sparse-checkpoint"
VERSION = 1
METADATA_KEY = "fedprune"

_VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    if not all(isinstance(item, str) for pair in metadata.items() for item in pair):
        raise CheckpointError(f"{path}: metadata must map strings to strings, got {dict(metadata)}")
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model_state.items()
    }
    for name, pattern in () if mask is None else mask.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: the state has no tensor {name!r} that the mask names")
        parts = _compress(path, name, tensors.pop(name), pattern)
        taken = parts.keys() & model_state.keys()
        if taken:
            raise CheckpointError(f"{path}: the state already has tensors named {sorted(taken)}")
        tensors |= parts
    write_file(path, tensors, {} if mask is None else mask.shapes(), metadata)


def write_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    layers: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
) -> None:
    """Write stored tensors (on the CPU) and the shapes of the masked layers, in their order."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "layers": [[name, list(shape)] for name, shape in layers.items()] or None,
        "metadata": dict(metadata),
    }
    # safetensors orders tensors by itself, but several metadata keys as they happen to hash.
    text = json.dumps(header, sort_keys=True)
    data = safetensors.torch.save(dict(tensors), metadata={METADATA_KEY: text})
    try:
        write_atomically(path, data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error


def load_sparse(path: str | os.PathLike[str]) -> SparseCheckpoint:
    """Read a file that `save_sparse` wrote.

    The whole file is read into memory, so it may be replaced or deleted afterwards.

    Raises:
        CheckpointError: the file is missing, truncated or damaged, was not written by
            `save_sparse`, or by a version that this one does not know.
    """
    path = Path(path)
    tensors, layers, metadata = read_file(path)
    patterns: dict[str, torch.Tensor] = {}
    for name, shape in layers:
        values, patterns[name] = take_layer(path, name, shape, tensors)
        weight = torch.zeros(shape, dtype=values.dtype)
        weight[patterns[name]] = values
        tensors[name] = weight
    mask = Mask(patterns) if patterns else None
    return SparseCheckpoint(state=dict(sorted(tensors.items())), mask=mask, metadata=metadata)


def read_file(
    path: Path,
) -> tuple[dict[str, torch.Tensor], list[tuple[str, tuple[int, ...]]], dict[str, str]]:
    """A file's tensors as stored, its masked layers (name, shape) and the caller's metadata.

    Raises:
        CheckpointError: as `load_sparse`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path"
        ) from error
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(path, f"it is no whole safetensors file ({error})") from error
    layers, metadata = _read_header(path, data)
    seen = set(tensors)
    for name, _ in layers:
        if name in seen:
            raise _damaged(path, f"it holds {name!r} twice")
        seen.add(name)
    return tensors, layers, metadata


def _compress(
    path: Path, name: str, weight: torch.Tensor, pattern: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The two tensors that stand for a masked one."""
    if weight.shape != pattern.shape or weight.dtype not in _VALUE_DTYPES:
        raise CheckpointError(
            f"{path}: {name!r} has shape {tuple(weight.shape)} and dtype {weight.dtype}; its mask "
            f"expects floating point of shape {tuple(pattern.shape)}"
        )
    if weight[~pattern].count_nonzero():
        raise CheckpointError(
            f"{path}: pruned weights of {name!r} are not zero and would be lost; "
            "call mask.apply(model) before saving"
        )
    return layer_tensors(name, weight[pattern], pattern)


def layer_tensors(
    name: str, values: torch.Tensor, pattern: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The two tensors that a file holds of a masked layer."""
    bits = np.packbits(pattern.numpy().reshape(-1))
    return {f"{name}.values": values, f"{name}.mask": torch.from_numpy(bits)}


def take_layer(
    path: Path, name: str, shape: tuple[int, ...], tensors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a masked layer's two tensors out of `tensors`; return its values and its pattern.

    Raises:
        CheckpointError: they are missing or do not fit each other or the shape.
    """
    values, packed = take_packed(path, name, shape, tensors)
    bits = np.unpackbits(packed, count=math.prod(shape))
    return values, torch.from_numpy(bits.view(np.bool_)).reshape(shape)


def take_packed(
    path: Path, name: str, shape: tuple[int, ...], tensors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """As `take_layer`, with the pattern as the file holds it: eight weights a byte."""
    missing = [key for key in (f"{name}.values", f"{name}.mask") if key not in tensors]
    if missing:
        raise _damaged(path, f"it lacks the tensors {missing}")
    values, packed = tensors.pop(f"{name}.values"), tensors.pop(f"{name}.mask")
    numel = math.prod(shape)
    num_bytes = -(-numel // 8)
    if packed.dtype != torch.uint8 or packed.shape != (num_bytes,):
        raise _damaged(
            path,
            f"the mask of {name!r} has shape {tuple(packed.shape)} and dtype {packed.dtype}, "
            f"expected {num_bytes} bytes for shape {shape}",
        )
    bits: np.ndarray[Any, Any] = packed.numpy()
    if bits[-1] & ((1 << (8 * num_bytes - numel)) - 1):
        raise _damaged(path, f"the mask of {name!r} has bits past its {numel} weights")
    num_active = int(np.unpackbits(bits).sum())
    if values.dtype not in _VALUE_DTYPES or values.shape != (num_active,):
        raise _damaged(
            path,
            f"the values of {name!r} have shape {tuple(values.shape)} and dtype {values.dtype}, "
            f"expected {num_active} floating-point values",
        )
    return values, bits


def _read_header(
    path: Path, data: bytes
) -> tuple[list[tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Layers of the mask in order (none without a mask) and the caller's metadata."""
    # safetensors.torch.load has checked the outer header: eight bytes of length, then JSON.
    length = int.from_bytes(data[:8], "little")
    text = (json.loads(data[8 : 8 + length]).get("__metadata__") or {}).get(METADATA_KEY)
    if text is None:
        raise CheckpointError(
            f"{path}: a safetensors file, but not a sparse checkpoint; read it with safetensors"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its metadata is not JSON") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _damaged(path, f"its metadata does not say {FORMAT!r}")
    if header.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: format version {header.get('version')!r}, this release reads {VERSION}; "
            "update the package or save the model again"
        )
    return _read_layers(path, header.get("layers")), _read_strings(path, header.get("metadata"))


def _read_layers(path: Path, layers: Any) -> list[tuple[str, tuple[int, ...]]]:
    if layers is None:
        return []
    if not isinstance(layers, list) or not layers:
        raise _damaged(path, "its list of masked layers is no list or is empty")
    checked = []
    for layer in layers:
        match layer:
            case [str(name), [*shape]] if all(type(n) is int and n > 0 for n in shape):
                checked.append((name, tuple(shape)))
            case _:
                raise _damaged(path, f"a masked layer is no name and shape: {str(layer)[:80]}")
    return checked


def _read_strings(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "the caller's metadata does not map strings to strings")
    return metadata


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged, {what}; copy it again or go back to an older one")
