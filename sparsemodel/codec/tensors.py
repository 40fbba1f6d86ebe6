"""The values of a model's tensors as bytes: of masked tensors only the active weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch

from sparsemodel.codec.dtypes import (
    DTYPES,
    count_value_bytes,
    encode_values,
    read_values,
)
from sparsemodel.codec.frame import DEFAULT_LIMITS, Kind, Limits, open_frame, seal_frame
from sparsemodel.codec.reader import Reader, encode_signature
from sparsemodel.errors import CodecError, MaskMismatch
from sparsemodel.masks.mask import Mask

Shapes = Mapping[str, tuple[int, ...]]
MASK_DIGEST_BYTES = 8
_SHAPES_DIGEST_BYTES = 8
_DTYPE_NAMES = {code: name for name, code in DTYPES.items()}


def encode_tensors(
    tensors: Mapping[str, torch.Tensor], *, mask: Mask | None, dtype: str = "fp32"
) -> bytes:
    """Float32 tensors as a frame; of those that `mask` names, the active weights alone.

    Names and shapes do not travel, but a digest of them does. See FORMAT.md.

    Args:
        tensors: name -> float32 tensor of any shape and device; the order is part of the frame.
        mask: which weights exist; a tensor that it does not name, or all where it is None,
            travel whole. It may name more than `tensors` holds.
        dtype: "fp32" (bit exact), "fp16" and "bf16" (to nearest, ties to even), or "int8"
            (symmetric, one float32 scale max|x| / 127 a tensor; the error is half a step).

    Raises:
        CodecError: an unknown dtype, a tensor that is not float32 or not of the mask's shape, or
            values that `dtype` cannot carry (see `dtype`).

    >>> mask = Mask({"w": torch.tensor([True, False])})
    >>> frame = encode_tensors({"w": torch.tensor([0.5, 7.0])}, mask=mask)
    >>> decode_tensors(frame, shapes={"w": (2,)}, mask=mask)
    {'w': tensor([0.5000, 0.0000])}
    """
    if dtype not in DTYPES:
        raise CodecError(f"unknown dtype {dtype!r}; known are {list(DTYPES)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    parts = [bytes((DTYPES[dtype],)), mask_digest(mask), _shapes_digest(shapes)]
    _check_mask_shapes(shapes, mask)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise CodecError(f"{name!r}: expected float32, got {tensor.dtype}; cast it first")
        values = tensor.detach().cpu().numpy().reshape(-1)
        if mask is not None and name in mask:
            values = values[mask[name].numpy().reshape(-1)]
        parts.append(encode_values(values, dtype=dtype, name=name))
    return seal_frame(b"".join(parts), kind=Kind.TENSORS)


def decode_values(
    data: bytes, *, shapes: Shapes, mask: Mask | None, limits: Limits = DEFAULT_LIMITS
) -> dict[str, torch.Tensor]:
    """Read a frame that `encode_tensors` wrote, masked tensors as vectors of active values.

    Args:
        shapes: name -> shape, as the sender had them and in the sender's order.
        mask: the mask that the sender had.

    Returns:
        Name -> float32 tensor: shape [num_active], in the order of `Mask.active`, for names in
        the mask; the tensor's own shape for the others.

    Raises:
        MaskMismatch: the sender had another mask.
        CodecError: not such a frame, damaged, above `limits`, or for other names or shapes.
    """
    reader = open_frame(data, kind=Kind.TENSORS, limits=limits)
    code = reader.byte(what="the dtype")
    if code not in _DTYPE_NAMES:
        raise CodecError(f"values of unknown dtype {code}; known are {DTYPES}")
    dtype = _DTYPE_NAMES[code]
    check_mask_digest(reader, mask)
    if reader.take(_SHAPES_DIGEST_BYTES, what="the digest of the shapes") != _shapes_digest(shapes):
        raise CodecError(
            "the frame holds tensors of other names, shapes or order than the receiver expects"
        )
    _check_mask_shapes(shapes, mask)
    if sum(math.prod(shape) for shape in shapes.values()) > limits.max_elements:
        raise CodecError(f"more weights than the limit max_elements, {limits.max_elements}")
    wanted = _value_shapes(shapes, mask)
    num_bytes = sum(count_value_bytes(math.prod(s), dtype=dtype) for s in wanted.values())
    if num_bytes != reader.remaining:
        raise CodecError(f"expected {num_bytes} bytes of values, got {reader.remaining}")
    return {
        name: torch.from_numpy(
            read_values(reader, num_values=math.prod(shape), dtype=dtype)
        ).reshape(shape)
        for name, shape in wanted.items()
    }


def decode_tensors(
    data: bytes, *, shapes: Shapes, mask: Mask | None, limits: Limits = DEFAULT_LIMITS
) -> dict[str, torch.Tensor]:
    """Read a frame that `encode_tensors` wrote as dense tensors, zero at the pruned positions.

    Arguments and errors are those of `decode_values`.

    Returns:
        Name -> float32 tensor of the shape given, in the order of `shapes`.
    """
    values = decode_values(data, shapes=shapes, mask=mask, limits=limits)
    if mask is None:
        return values
    dense = {}
    for name, vector in values.items():
        dense[name] = vector
        if name in mask:
            flat = np.zeros(mask[name].numel(), dtype=np.float32)
            flat[mask[name].numpy().reshape(-1)] = vector.numpy()
            dense[name] = torch.from_numpy(flat).reshape(mask[name].shape)
    return dense


def mask_digest(mask: Mask | None) -> bytes:
    """The first bytes of the mask's digest; zeros where there is no mask."""
    if mask is None:
        return bytes(MASK_DIGEST_BYTES)
    return bytes.fromhex(mask.digest())[:MASK_DIGEST_BYTES]


def check_mask_digest(reader: Reader, mask: Mask | None) -> None:
    """Read a mask's digest and raise MaskMismatch unless it is that of `mask`."""
    sent, held = reader.take(MASK_DIGEST_BYTES, what="the mask's digest"), mask_digest(mask)
    if sent != held:
        raise MaskMismatch(
            f"the frame was made with mask {sent.hex()}, the receiver holds {held.hex()} (zeros: "
            "no mask): synchronise the masks and send it again"
        )


def _value_shapes(shapes: Shapes, mask: Mask | None) -> Shapes:
    if mask is None:
        return shapes
    return {
        name: (int(mask[name].sum()),) if name in mask else shape for name, shape in shapes.items()
    }


def _check_mask_shapes(shapes: Shapes, mask: Mask | None) -> None:
    for name, shape in shapes.items():
        if mask is not None and name in mask and tuple(mask[name].shape) != tuple(shape):
            raise CodecError(
                f"{name!r} has shape {tuple(shape)}, but the mask {tuple(mask[name].shape)}"
            )


def _shapes_digest(shapes: Shapes) -> bytes:
    signatures = b"".join(encode_signature(name, tuple(shape)) for name, shape in shapes.items())
    return hashlib.sha256(signatures).digest()[:_SHAPES_DIGEST_BYTES]
