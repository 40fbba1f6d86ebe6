"""Sparse files (`storage.header` has their layout) as torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from sparsemodel.runtime.pattern import Pattern, Shape
from sparsemodel.storage.header import (
    damaged,
    header_metadata,
    packed_bits,
    read_bytes,
    read_header,
    stored_pattern,
    write_bytes,
)

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
    beside = header_metadata(path, layers, metadata)
    write_bytes(path, safetensors.torch.save(dict(tensors), metadata=beside))


def read_file(
    path: Path,
) -> tuple[dict[str, torch.Tensor], list[tuple[str, tuple[int, ...]]], dict[str, str]]:
    """A file's tensors as stored, its masked layers (name, shape) and the caller's metadata.

    Raises:
        CheckpointError: the file is missing, truncated or damaged, or of another kind or version.
    """
    data = read_bytes(path)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise damaged(path, f"it is no whole safetensors file ({error})") from error
    layers, metadata = read_header(path, data)
    seen = set(tensors)
    for name, _ in layers:
        if name in seen:
            raise damaged(path, f"it holds {name!r} twice")
        seen.add(name)
    return tensors, layers, metadata


def layer_tensors(name: str, values: torch.Tensor, pattern: Pattern) -> dict[str, torch.Tensor]:
    """The two tensors that a file holds of a masked layer."""
    return {f"{name}.values": values, f"{name}.mask": torch.from_numpy(packed_bits(pattern))}


def take_layer(
    path: Path, name: str, shape: Shape, tensors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, Pattern]:
    """Take a masked layer's two tensors out of `tensors`; return its values and its pattern.

    Raises:
        CheckpointError: they are missing or do not fit each other or the shape.
    """
    missing = [key for key in (f"{name}.values", f"{name}.mask") if key not in tensors]
    if missing:
        raise damaged(path, f"it lacks the tensors {missing}")
    values, packed = tensors.pop(f"{name}.values"), tensors.pop(f"{name}.mask")
    pattern = stored_pattern(path, name, shape, packed.numpy())
    if values.dtype not in VALUE_DTYPES or values.shape != (pattern.num_active,):
        raise damaged(
            path,
            f"the values of {name!r} have shape {tuple(values.shape)} and dtype {values.dtype}, "
            f"expected {pattern.num_active} floating-point values",
        )
    return values, pattern
