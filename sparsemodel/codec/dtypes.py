"""Flat float32 values in the number formats that travel."""

from __future__ import annotations

import struct

import numpy as np

from sparsemodel.codec.frame import Part
from sparsemodel.codec.reader import Reader
from sparsemodel.errors import CodecError

# Name -> code in the frame. The order is part of the format.
DTYPES = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3}
_ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_SCALE = struct.Struct("<f")
_INT8_MAX = 127
_FLOAT32 = np.finfo(np.float32)
_BF16_NAN = np.uint16(0x7FC0)  # the quiet NaN that every NaN becomes


def count_value_bytes(num_values: int, *, dtype: str) -> int:
    """Number of bytes that one tensor of `num_values` values takes."""
    return num_values * _ITEM_BYTES[dtype] + (_SCALE.size if dtype == "int8" else 0)


def encode_values(values: np.ndarray, *, dtype: str, name: str) -> Part:
    """Float32 values, shape [n], as little-endian bytes; `name` is for the error's text.

    The bytes of fp32 are those of `values` itself where it is contiguous.

    Raises:
        CodecError: a finite value that fp16 or bf16 would turn into infinity, or a value that is
            not finite for int8.
    """
    if dtype == "fp32":
        return np.ascontiguousarray(values, dtype="<f4").view(np.uint8).data
    if dtype == "int8":
        return _encode_int8(values, name=name)
    if dtype == "fp16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            half = values.astype("<f2")
        infinite = np.isinf(half)
    else:
        half = round_to_bf16(values)
        infinite = half & 0x7FFF == 0x7F80
    overflow = infinite & np.isfinite(values)
    if overflow.any():
        largest = float(np.abs(values[overflow]).max())
        raise CodecError(f"{name!r} holds {largest:g}, too large for {dtype}: send it as fp32")
    return half.view(np.uint8).data


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Float32 values, shape [n], as the bits of bf16: "<u2", to nearest, ties to even.

    A bf16 number is the upper half of a float32. Adding one less than half of its last place, and
    one more where that place is odd, carries into the upper half exactly where rounding goes up.

    >>> [f"{bits:04x}" for bits in round_to_bf16(np.float32([1.0, 1 + 2**-8, 1 + 3 * 2**-8]))]
    ['3f80', '3f80', '3f82']
    """
    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    half = rounded.astype("<u2")
    half[np.isnan(values)] = _BF16_NAN
    return half


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
        bits <<= np.uint32(16)
        return bits.view(np.float32)
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
    steps = values / scale
    np.rint(steps, out=steps)
    return _SCALE.pack(scale) + steps.astype(np.int8).tobytes()
