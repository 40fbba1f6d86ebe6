"""How a sparse model lies in a safetensors file: pruned weights are left out.

A masked tensor NAME is stored as two: `NAME.values`, its active values in flat order, and
`NAME.mask`, its pattern in flat order, eight weights a byte, the first in the highest bit, the
last byte filled with zeros. All other tensors are stored whole. The header's metadata has one
key, `fedprune`, with a JSON object: "checksum" of the file (`storage.sealed`), "format" and
"version", "layers" ([name, shape] pairs in the mask's order) or null without a mask, and
"metadata", the caller's own strings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemodel.errors import CheckpointError
from sparsemodel.runtime.pattern import Pattern, Shape
from sparsemodel.storage.files import write_atomically
from sparsemodel.storage.sealed import BLANK, CHECKSUM, is_whole, seal

FORMAT = "sparse-checkpoint"
VERSION = 2  # 1: without a checksum
METADATA_KEY = "fedprune"

Layers = list[tuple[str, tuple[int, ...]]]


def header_metadata(
    path: Path, layers: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
) -> dict[str, str]:
    """What safetensors stores beside the tensors: shapes of the masked layers, and `metadata`.

    Raises:
        CheckpointError: metadata that are not strings.
    """
    check_metadata(path, metadata)
    header = {
        CHECKSUM: BLANK,
        "format": FORMAT,
        "version": VERSION,
        "layers": [[name, list(shape)] for name, shape in layers.items()] or None,
        "metadata": dict(metadata),
    }
    # safetensors orders tensors by itself, but several metadata keys as they happen to hash.
    return {METADATA_KEY: json.dumps(header, sort_keys=True)}


def write_bytes(path: Path, data: bytes) -> None:
    """Seal a file with the metadata of `header_metadata`, and write it in one step.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        write_atomically(path, seal(data, FORMAT))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path"
        ) from error


def check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise CheckpointError unless metadata map strings to strings."""
    if not all(isinstance(item, str) for pair in metadata.items() for item in pair):
        raise CheckpointError(f"{path}: metadata must map strings to strings, got {dict(metadata)}")


def read_header(
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
        raise damaged(path, "its metadata is not JSON") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise damaged(path, f"its metadata does not say {FORMAT!r}")
    if header.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: format version {header.get('version')!r}, this release reads {VERSION}; "
            "update the package or save the model again"
        )
    if not is_whole(data, FORMAT):
        raise damaged(path, "its checksum does not fit")
    return _read_layers(path, header.get("layers")), _read_strings(path, header.get("metadata"))


def packed_bits(pattern: Pattern) -> NDArray[np.uint8]:
    """A pattern as a file holds it."""
    return np.concatenate([*pattern.bitmap()])


def stored_pattern(path: Path, name: str, shape: Shape, packed: NDArray[Any]) -> Pattern:
    """The pattern of a layer of which the file holds `packed`.

    Raises:
        CheckpointError: it has another length or type, or bits past the layer's weights.
    """
    numel = math.prod(shape)
    num_bytes = -(-numel // 8)
    if packed.dtype != np.uint8 or packed.shape != (num_bytes,):
        raise damaged(
            path,
            f"the mask of {name!r} has shape {packed.shape} and dtype {packed.dtype}, "
            f"expected {num_bytes} bytes for shape {shape}",
        )
    positions = np.flatnonzero(np.unpackbits(packed))
    if len(positions) and positions[-1] >= numel:
        raise damaged(path, f"the mask of {name!r} has bits past its {numel} weights")
    return Pattern.from_positions(shape, positions)


def _read_layers(path: Path, layers: Any) -> list[tuple[str, tuple[int, ...]]]:
    if layers is None:
        return []
    if not isinstance(layers, list) or not layers:
        raise damaged(path, "its list of masked layers is no list or is empty")
    checked = []
    for layer in layers:
        match layer:
            case [str(name), [*shape]] if all(type(n) is int and n > 0 for n in shape):
                checked.append((name, tuple(shape)))
            case _:
                raise damaged(path, f"a masked layer is no name and shape: {str(layer)[:80]}")
    return checked


def _read_strings(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "the caller's metadata does not map strings to strings")
    return metadata


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file that is not what it should be."""
    return CheckpointError(f"{path}: damaged, {what}; copy it again or go back to an older one")
