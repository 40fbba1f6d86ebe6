"""The values of a model's state as bytes: of layers under a pattern only the active weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from sparsemodel.codec.dtypes import (
    DTYPES,
    count_value_bytes,
    encode_values,
    read_values,
)
from sparsemodel.codec.frame import DEFAULT_LIMITS, Kind, Limits, Part, open_frame, seal_frame
from sparsemodel.codec.reader import Reader, encode_signature
from sparsemodel.errors import CodecError, MaskMismatch
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

Shapes = Mapping[str, tuple[int, ...]]
MASK_DIGEST_BYTES = 8
_SHAPES_DIGEST_BYTES = 8
_DTYPE_NAMES = {code: name for name, code in DTYPES.items()}


def encode_state(state: SparseState, *, dtype: str = "fp32") -> bytes:
    """A state as a frame: of layers under a pattern the active values, the rest whole.

    Names, shapes and patterns do not travel, but digests of them do. See FORMAT.md.

    Args:
        state: float32 arrays; their order is part of the frame. Its patterns may name more than
            it holds values of.
        dtype: "fp32" (bit exact), "fp16" and "bf16" (to nearest, ties to even), or "int8"
            (symmetric, one float32 scale max|x| / 127 a tensor; the error is half a step).

    Raises:
        CodecError: an unknown dtype, an array that is not float32 or does not fit its pattern, or
            values that `dtype` cannot carry (see `dtype`).

    >>> patterns = Patterns({"w": Pattern.from_positions((2,), np.array([0]))})
    >>> frame = encode_state(SparseState({"w": np.float32([0.5])}, patterns))
    >>> decode_state(frame, shapes={"w": (2,)}, patterns=patterns).values
    {'w': array([0.5], dtype=float32)}
    """
    if dtype not in DTYPES:
        raise CodecError(f"unknown dtype {dtype!r}; known are {list(DTYPES)}")
    parts: list[Part] = [
        bytes((DTYPES[dtype],)),
        mask_digest(state.patterns),
        _shapes_digest(state.shapes()),
    ]
    for name, values in state.values.items():
        if values.dtype != np.float32:
            raise CodecError(f"{name!r}: expected float32, got {values.dtype}; cast it first")
        pattern = state.pattern(name)
        if pattern is not None and values.shape != (pattern.num_active,):
            raise CodecError(
                f"{name!r} has values of shape {values.shape}, but its pattern "
                f"{pattern.num_active} active weights"
            )
        parts.append(encode_values(values.reshape(-1), dtype=dtype, name=name))
    return seal_frame(parts, kind=Kind.TENSORS)


def decode_state(
    data: bytes, *, shapes: Shapes, patterns: Patterns | None, limits: Limits = DEFAULT_LIMITS
) -> SparseState:
    """Read a frame that `encode_state` wrote.

    Args:
        shapes: name -> shape of the whole tensor, as the sender had them and in its order.
        patterns: those that the sender had.

    Returns:
        The state under `patterns`, its arrays copies of their own.

    Raises:
        MaskMismatch: the sender had other patterns.
        CodecError: not such a frame, damaged, above `limits`, or for other names or shapes.
    """
    reader = open_frame(data, kind=Kind.TENSORS, limits=limits)
    code = reader.byte(what="the dtype")
    if code not in _DTYPE_NAMES:
        raise CodecError(f"values of unknown dtype {code}; known are {DTYPES}")
    dtype = _DTYPE_NAMES[code]
    check_mask_digest(reader, patterns)
    if reader.take(_SHAPES_DIGEST_BYTES, what="the digest of the shapes") != _shapes_digest(shapes):
        raise CodecError(
            "the frame holds tensors of other names, shapes or order than the receiver expects"
        )
    if sum(math.prod(shape) for shape in shapes.values()) > limits.max_elements:
        raise CodecError(f"more weights than the limit max_elements, {limits.max_elements}")
    wanted = _value_shapes(shapes, patterns)
    num_bytes = sum(count_value_bytes(math.prod(s), dtype=dtype) for s in wanted.values())
    if num_bytes != reader.remaining:
        raise CodecError(f"expected {num_bytes} bytes of values, got {reader.remaining}")
    values = {
        name: read_values(reader, num_values=math.prod(shape), dtype=dtype).reshape(shape)
        for name, shape in wanted.items()
    }
    return SparseState(values, patterns)


def mask_digest(patterns: Patterns | None) -> bytes:
    """The first bytes of the patterns' digest; zeros where there are none."""
    if patterns is None:
        return bytes(MASK_DIGEST_BYTES)
    return bytes.fromhex(patterns.digest())[:MASK_DIGEST_BYTES]


def check_mask_digest(reader: Reader, patterns: Patterns | None) -> None:
    """Read a mask's digest and raise MaskMismatch unless it is that of `patterns`."""
    sent, held = reader.take(MASK_DIGEST_BYTES, what="the mask's digest"), mask_digest(patterns)
    if sent != held:
        raise MaskMismatch(
            f"the frame was made with mask {sent.hex()}, the receiver holds {held.hex()} (zeros: "
            "no mask): synchronise the masks and send it again"
        )


def _value_shapes(shapes: Shapes, patterns: Patterns | None) -> Shapes:
    wanted = dict(shapes)
    for name, shape in shapes.items():
        pattern: Pattern | None = None if patterns is None else patterns.get(name)
        if pattern is None:
            continue
        if pattern.shape != tuple(shape):
            raise CodecError(f"{name!r} has shape {tuple(shape)}, but the mask {pattern.shape}")
        wanted[name] = (pattern.num_active,)
    return wanted


def _shapes_digest(shapes: Shapes) -> bytes:
    return _digest_of(tuple((name, tuple(shape)) for name, shape in shapes.items()))


@lru_cache(maxsize=8)  # a server reads many frames of one model
def _digest_of(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> bytes:
    signatures = b"".join(encode_signature(name, shape) for name, shape in shapes)
    return hashlib.sha256(signatures).digest()[:_SHAPES_DIGEST_BYTES]
