"""Single (position, value) entries at pruned weights as bytes: what a client's top-K uploads."""

from __future__ import annotations

import numpy as np

from sparsemodel.codec.bits import decode_subset, encode_subset
from sparsemodel.codec.dtypes import count_value_bytes, encode_values, read_values
from sparsemodel.codec.frame import DEFAULT_LIMITS, Kind, Limits, Part, open_frame, seal_frame
from sparsemodel.codec.reader import Reader, encode_varint
from sparsemodel.codec.states import check_mask_digest, mask_digest
from sparsemodel.errors import CodecError
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.positions import absent_at, find
from sparsemodel.runtime.state import Entries, LayerEntries


def encode_entries(entries: Entries, *, patterns: Patterns) -> bytes:
    """Values at some of the pruned weights of some layers as a frame.

    Positions travel as ranks among the layer's pruned weights, values as float32, bit exact. See
    FORMAT.md.

    Args:
        entries: layer -> (flat indices: int64, strictly ascending, shape [k]; values: float32,
            shape [k]). Layers may come in any order; k may be 0.
        patterns: names the layers; every index must be pruned in them.

    Raises:
        CodecError: a layer that the mask lacks, indices or values of another type or shape,
            indices not ascending, or an index that is out of range or active.

    >>> patterns = Patterns({"w": Pattern.from_positions((3,), np.array([0]))})
    >>> frame = encode_entries({"w": (np.array([2]), np.float32([0.5]))}, patterns=patterns)
    >>> decode_entries(frame, patterns=patterns)
    {'w': (array([2]), array([0.5], dtype=float32))}
    """
    unknown = [name for name in entries if name not in patterns]
    if unknown:
        raise CodecError(f"entries of {unknown}, which the mask lacks; it has {list(patterns)}")
    parts: list[Part] = [mask_digest(patterns)]
    previous = -1
    for index, (name, pattern) in enumerate(patterns.items()):
        if name not in entries:
            continue
        indices, values = entries[name]
        ranks = _ranks(name, indices, values, pattern=pattern)
        parts.append(encode_varint(index - previous - 1))
        parts.append(encode_varint(len(ranks)))
        num_pruned = pattern.num_weights - pattern.num_active
        parts.append(encode_subset(ranks, num_total=num_pruned))
        parts.append(encode_values(values, dtype="fp32", name=name))
        previous = index
    return seal_frame(parts, kind=Kind.ENTRIES)


def decode_entries(
    data: bytes, *, patterns: Patterns, limits: Limits = DEFAULT_LIMITS
) -> dict[str, LayerEntries]:
    """Read a frame that `encode_entries` wrote, with the patterns it was written with.

    Returns:
        Layer -> (flat indices: int64, ascending, shape [k]; values: float32, shape [k]), in the
        order of the patterns.

    Raises:
        MaskMismatch: the sender had another mask.
        CodecError: not such a frame, damaged, or above `limits`.
    """
    reader = open_frame(data, kind=Kind.ENTRIES, limits=limits)
    check_mask_digest(reader, patterns)
    names = list(patterns)
    entries: dict[str, LayerEntries] = {}
    num_free = limits.max_elements
    index = -1
    while reader.remaining:
        index += 1 + reader.varint(what="the index of a layer")
        if index >= len(names):
            raise CodecError(f"layer {index} of a mask of {len(names)} layers")
        count = reader.varint(what="the number of entries")
        num_free -= count
        if num_free < 0:
            raise CodecError(f"more entries than the limit max_elements, {limits.max_elements}")
        entries[names[index]] = _read_layer(reader, patterns[names[index]], count=count)
    return entries


def _ranks(name: str, indices: np.ndarray, values: np.ndarray, *, pattern: Pattern) -> np.ndarray:
    """Ranks among the pruned weights: int64, ascending; see `encode_entries` for the errors."""
    if indices.dtype != np.int64 or values.dtype != np.float32:
        raise CodecError(
            f"entries of {name!r}: expected int64 indices and float32 values, got "
            f"{indices.dtype} and {values.dtype}"
        )
    if indices.ndim != 1 or indices.shape != values.shape:
        raise CodecError(
            f"entries of {name!r}: expected two vectors of equal length, got shapes "
            f"{indices.shape} and {values.shape}"
        )
    if (np.diff(indices) <= 0).any():
        raise CodecError(f"entries of {name!r}: the indices are not strictly ascending")
    below, active = find(pattern.positions(), indices)
    wrong = active | (indices < 0) | (indices >= pattern.num_weights)
    if wrong.any():
        raise CodecError(
            f"entries of {name!r}: index {indices[wrong][0]} is not a pruned weight of this mask"
        )
    ranks: np.ndarray = indices - below
    return ranks


def _read_layer(reader: Reader, pattern: Pattern, *, count: int) -> LayerEntries:
    num_bytes = count_value_bytes(count, dtype="fp32")
    if num_bytes > reader.remaining:
        raise CodecError(
            f"{count} entries need {num_bytes} bytes of values; {reader.remaining} bytes are left"
        )
    num_pruned = pattern.num_weights - pattern.num_active
    if count > num_pruned:
        raise CodecError(f"{count} entries at {num_pruned} pruned weights")
    ranks = decode_subset(reader, num_total=num_pruned, count=count)
    values = read_values(reader, num_values=count, dtype="fp32")
    return absent_at(pattern.positions(), ranks), values
