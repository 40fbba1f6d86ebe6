"""How a sparse model lies in a safetensors file: pruned weights are left out.

A masked tensor NAME is stored as two: `NAME.values`, its active values in flat order, and
`NAME.mask`, its pattern in flat order, eight weights a byte, the first in the highest bit, the
last byte filled with zeros. All other tensors are stored whole. The header's metadata has one
key, `fedprune`, with a JSON object: "format" and "version", "layers" ([name, shape] pairs in
the mask's order) or null without a mask, and "metadata", the caller's own strings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from sparsemodel.errors import CheckpointError
from sparsemodel.storage.files import write_atomically

FORMAT = "sparse-checkpoint"
VERSION = 1
METADATA_KEY = "fedprune"

VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    layers: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
) -> None:
    """Write stored tensors (on the CPU) and the shapes of the masked layers, in their order.

    Raises:
        CheckpointError: metadata that are not strings, or a file that cannot be written.
    """
    check_metadata(path, metadata)
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


def check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise CheckpointError unless metadata map strings to strings."""
    if not all(isinstance(item, str) for pair in metadata.items() for item in pair):
        raise CheckpointError(f"{path}: metadata must map strings to strings, got {dict(metadata)}")


def read_file(
    path: Path,
) -> tuple[dict[str, torch.Tensor], list[tuple[str, tuple[int, ...]]], dict[str, str]]:
    """A file's tensors as stored, its masked layers (name, shape) and the caller's metadata.

    Raises:
        CheckpointError: the file is missing, truncated or damaged, or of another kind or version.
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
    bits = np.unpackbits(packed.numpy())
    if bits[numel:].any():
        raise _damaged(path, f"the mask of {name!r} has bits past its {numel} weights")
    pattern = torch.from_numpy(bits[:numel].astype(np.bool_)).reshape(shape)
    num_active = int(pattern.sum())
    if values.dtype not in VALUE_DTYPES or values.shape != (num_active,):
        raise _damaged(
            path,
            f"the values of {name!r} have shape {tuple(values.shape)} and dtype {values.dtype}, "
            f"expected {num_active} floating-point values",
        )
    return values, pattern


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
