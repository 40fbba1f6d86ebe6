"""Single (position, value) entries at pruned weights as bytes: what a client's top-K uploads."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from sparsemodel.codec.bits import decode_subset, encode_subset
from sparsemodel.codec.dtypes import count_value_bytes, encode_values, read_values
from sparsemodel.codec.frame import DEFAULT_LIMITS, Kind, Limits, open_frame, seal_frame
from sparsemodel.codec.reader import Reader, encode_varint
from sparsemodel.codec.tensors import check_mask_digest, mask_digest
from sparsemodel.errors import CodecError
from sparsemodel.masks.mask import Mask

Entries = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def encode_entries(entries: Entries, *, mask: Mask) -> bytes:
    """Values at some of the pruned weights of some layers as a frame.

    Positions travel as ranks among the layer's pruned weights, values as float32, bit exact. See
    FORMAT.md.

    Args:
        entries: layer -> (flat indices: int64, strictly ascending, shape [k]; values: float32,
            shape [k]). Layers may come in any order; k may be 0.
        mask: names the layers; every index must be pruned in it.

    Raises:
        CodecError: a layer that the mask lacks, indices or values of another type or shape,
            indices not ascending, or an index that is out of range or active.

    >>> mask = Mask({"w": torch.tensor([True, False, False])})
    >>> frame = encode_entries({"w": (torch.tensor([2]), torch.tensor([0.5]))}, mask=mask)
    >>> decode_entries(frame, mask=mask)
    {'w': (tensor([2]), tensor([0.5000]))}
    """
    unknown = [name for name in entries if name not in mask]
    if unknown:
        raise CodecError(f"entries of {unknown}, which the mask lacks; it has {list(mask)}")
    parts = [mask_digest(mask)]
    previous = -1
    for index, name in enumerate(mask):
        if name not in entries:
            continue
        indices, values = entries[name]
        pruned = np.flatnonzero(~mask[name].numpy().reshape(-1))
        ranks = _ranks(name, indices, values, pruned=pruned)
        parts.append(encode_varint(index - previous - 1))
        parts.append(encode_varint(len(ranks)))
        parts.append(encode_subset(ranks, num_total=len(pruned)))
        parts.append(encode_values(values.detach().cpu().numpy(), dtype="fp32", name=name))
        previous = index
    return seal_frame(b"".join(parts), kind=Kind.ENTRIES)


def decode_entries(
    data: bytes, *, mask: Mask, limits: Limits = DEFAULT_LIMITS
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Read a frame that `encode_entries` wrote, with the mask it was written with.

    Returns:
        Layer -> (flat indices: int64, ascending, shape [k]; values: float32, shape [k]), in the
        mask's order.

    Raises:
        MaskMismatch: the sender had another mask.
        CodecError: not such a frame, damaged, or above `limits`.
    """
    reader = open_frame(data, kind=Kind.ENTRIES, limits=limits)
    check_mask_digest(reader, mask)
    names = list(mask)
    entries: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
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
        entries[names[index]] = _read_layer(reader, mask[names[index]], count=count)
    return entries


def _ranks(
    name: str, indices: torch.Tensor, values: torch.Tensor, *, pruned: np.ndarray
) -> np.ndarray:
    if indices.dtype != torch.int64 or values.dtype != torch.float32:
        raise CodecError(
            f"entries of {name!r}: expected int64 indices and float32 values, got "
            f"{indices.dtype} and {values.dtype}"
        )
    if indices.ndim != 1 or indices.shape != values.shape:
        raise CodecError(
            f"entries of {name!r}: expected two vectors of equal length, got shapes "
            f"{tuple(indices.shape)} and {tuple(values.shape)}"
        )
    wanted = indices.cpu().numpy()
    if (np.diff(wanted) <= 0).any():
        raise CodecError(f"entries of {name!r}: the indices are not strictly ascending")
    ranks = np.searchsorted(pruned, wanted)
    found = ranks < len(pruned)
    found[found] = pruned[ranks[found]] == wanted[found]
    if not found.all():
        raise CodecError(
            f"entries of {name!r}: index {wanted[~found][0]} is not a pruned weight of this mask"
        )
    return ranks


def _read_layer(
    reader: Reader, pattern: torch.Tensor, *, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_bytes = count_value_bytes(count, dtype="fp32")
    if num_bytes > reader.remaining:
        raise CodecError(
            f"{count} entries need {num_bytes} bytes of values; {reader.remaining} bytes are left"
        )
    pruned = np.flatnonzero(~pattern.numpy().reshape(-1))
    if count > len(pruned):
        raise CodecError(f"{count} entries at {len(pruned)} pruned weights")
    ranks = decode_subset(reader, num_total=len(pruned), count=count)
    values = read_values(reader, num_values=count, dtype="fp32")
    return torch.from_numpy(pruned[ranks]), torch.from_numpy(values)
