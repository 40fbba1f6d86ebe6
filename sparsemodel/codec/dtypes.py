"""Flat float32 values in the number formats that travel."""

from __future__ import annotations

import struct

import numpy as np
import torch

from sparsemodel.codec.reader import Reader
from sparsemodel.errors import CodecError

# Name -> code in the frame. The order is part of the format.
DTYPES = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3}
_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_SCALE = struct.Struct("<f")
_INT8_MAX = 127
_FLOAT32 = np.finfo(np.float32)


def count_value_bytes(num_values: int, *, dtype: str) -> int:
    """Number of bytes that one tensor of `num_values` values takes."""
    return num_values * _ITEM_BYTES[dtype] + (_SCALE.size if dtype == "int8" else 0)


def encode_values(values: np.ndarray, *, dtype: str, name: str) -> bytes:
    """Float32 values, shape [n], as little-endian bytes; `name` is for the error's text.

    Raises:
        CodecError: a finite value that fp16 or bf16 would turn into infinity, or a value that is
            not finite for int8.
    """
    if dtype == "fp32":
        return values.astype("<f4", copy=False).tobytes()
    if dtype == "int8":
        return _encode_int8(values, name=name)
    if dtype == "fp16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            half = values.astype("<f2")
        overflow = np.isinf(half) & np.isfinite(values)
        encoded = half.tobytes()
    else:
        # Torch has this cast (to nearest, ties to even) and numpy lacks the type.
        brain = torch.from_numpy(values.copy()).to(torch.bfloat16)
        overflow = torch.isinf(brain).numpy() & np.isfinite(values)
        encoded = brain.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
    if overflow.any():
        largest = float(np.abs(values[overflow]).max())
        raise CodecError(f"{name!r} holds {largest:g}, too large for {dtype}: send it as fp32")
    return encoded


def read_values(reader: Reader, *, num_values: int, dtype: str) -> np.ndarray:
    """Read what `encode_values` wrote: float32, shape [num_values], a copy of its own.

    Raises:
        CodecError: too few bytes, or an int8 scale or value that no encoder writes.
    """
    scale = np.float32(0.0)
    if dtype == "int8":
        scale = np.float32(_SCALE.unpack(reader.take(_SCALE.size, what="an int8 scale"))[0])
        if not (scale == 0 or _FLOAT32.tiny <= scale <= _FLOAT32.max):
            raise CodecError(f"an int8 scale of {scale}; expected zero or a positive normal number")
    raw = reader.take(num_values * _ITEM_BYTES[dtype], what="the values of a tensor")
    if dtype == "fp32":
        return np.frombuffer(raw, dtype="<f4").astype(np.float32)
    if dtype == "fp16":
        with np.errstate(invalid="ignore"):
            return np.frombuffer(raw, dtype="<f2").astype(np.float32)
    if dtype == "bf16":
        bits = np.frombuffer(raw, dtype="<u2").astype(np.uint32)
        return (bits << np.uint32(16)).view(np.float32)
    steps = np.frombuffer(raw, dtype=np.int8)
    if (steps < -_INT8_MAX).any() or (scale == 0 and steps.any()):
        raise CodecError("int8 values that no encoder writes: -128, or not zero under scale zero")
    with np.errstate(over="ignore"):
        values: np.ndarray = steps.astype(np.float32) * scale
    return np.clip(values, _FLOAT32.min, _FLOAT32.max, out=values)


def _encode_int8(values: np.ndarray, *, name: str) -> bytes:
    if not np.isfinite(values).all():
        raise CodecError(f"{name!r} holds values that are not finite, which int8 cannot carry")
    largest = np.float32(np.abs(values).max(initial=0.0))
    if largest == 0:
        return _SCALE.pack(0.0) + bytes(len(values))
    # A subnormal scale would be too coarse a number for the error bound of half a step to hold.
    scale = max(largest / np.float32(_INT8_MAX), _FLOAT32.tiny)
    steps = np.rint(values / scale).astype(np.int8)
    return _SCALE.pack(scale) + steps.tobytes()
