"""Masks as bytes: each layer in whichever of its codes is the shortest."""

from __future__ import annotations

import enum
import math

import numpy as np

from sparsemodel.codec.bits import (
    best_rice_parameter,
    count_rice_bits,
    count_varint_bytes,
    decode_bitmap,
    decode_gaps,
    decode_rice,
    encode_gaps,
    encode_rice,
    gaps_between,
)
from sparsemodel.codec.frame import DEFAULT_LIMITS, Kind, Limits, Part, open_frame, seal_frame
from sparsemodel.codec.reader import Reader, encode_signature, encode_varint
from sparsemodel.errors import CodecError
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.positions import complement

_MODE_BITS = 3


class Mode(enum.IntEnum):
    """How a layer's pattern is written."""

    EMPTY = 0
    FULL = 1
    BITMAP = 2
    ACTIVE_GAPS = 3
    PRUNED_GAPS = 4
    ACTIVE_RICE = 5
    PRUNED_RICE = 6


_GAPS = (Mode.ACTIVE_GAPS, Mode.PRUNED_GAPS)
_RICE = (Mode.ACTIVE_RICE, Mode.PRUNED_RICE)
_OF_PRUNED = (Mode.PRUNED_GAPS, Mode.PRUNED_RICE)
_MODES = {int(mode): mode for mode in Mode}


def encode_mask(patterns: Patterns) -> bytes:
    """A mask as a self-contained frame: names, shapes and patterns.

    Each layer takes the shortest of a bitmap, varint gaps and a Golomb-Rice code, the last two
    of the active or of the pruned weights, whichever are fewer; an empty or a full layer takes
    one byte. See FORMAT.md.

    Raises:
        CodecError: a name that cannot be written as UTF-8.

    >>> patterns = Patterns({"fc.weight": Pattern.from_positions((2, 2), np.array([0]))})
    >>> decode_mask(encode_mask(patterns)) == patterns
    True
    """
    parts: list[Part] = [encode_varint(len(patterns))]
    for name, pattern in patterns.items():
        parts.append(encode_signature(name, pattern.shape))
        parts += _encode_layer(pattern)
    return seal_frame(parts, kind=Kind.MASK)


def decode_mask(data: bytes, *, limits: Limits = DEFAULT_LIMITS) -> Patterns:
    """Read a frame that `encode_mask` wrote.

    A layer is never held as a dense array: beside the result, memory goes by the weights that
    its code names. Only a full layer is as large as its shape says.

    Raises:
        CodecError: not such a frame, damaged, or above `limits`.
    """
    reader = open_frame(data, kind=Kind.MASK, limits=limits)
    num_layers = reader.varint(what="the number of layers")
    if not 1 <= num_layers <= limits.max_layers:
        raise CodecError(f"a mask of {num_layers} layers; expected 1 to {limits.max_layers}")
    patterns: dict[str, Pattern] = {}
    num_free = limits.max_elements
    for _ in range(num_layers):
        name, shape = _read_signature(reader, limits=limits)
        if name in patterns:
            raise CodecError(f"the layer {name!r} comes twice")
        num_weights = math.prod(shape)
        if num_weights > num_free:
            raise CodecError(f"more weights than the limit max_elements, {limits.max_elements}")
        num_free -= num_weights
        patterns[name] = _decode_layer(reader, shape)
    reader.finish()
    return Patterns(patterns)


def _encode_layer(pattern: Pattern) -> list[Part]:
    num_weights, count = pattern.num_weights, pattern.num_active
    if count == 0:
        return [bytes((Mode.EMPTY,))]
    if count == num_weights:
        return [bytes((Mode.FULL,))]
    code_active = 2 * count <= num_weights
    positions = pattern.positions()
    gaps = gaps_between(positions if code_active else complement(positions, num_total=num_weights))
    parameter = best_rice_parameter(gaps, num_total=num_weights)
    coded = encode_varint(len(gaps))
    num_rice = len(coded) + (count_rice_bits(gaps, parameter=parameter) + 7) // 8
    num_gaps = len(coded) + count_varint_bytes(gaps)
    if (num_weights + 7) // 8 <= min(num_gaps, num_rice):
        return [bytes((Mode.BITMAP,)), *(chunk.data for chunk in pattern.bitmap())]
    if num_gaps <= num_rice:
        return [bytes((_GAPS[not code_active],)), coded, encode_gaps(gaps)]
    head = _RICE[not code_active] | parameter << _MODE_BITS
    return [bytes((head,)), coded, encode_rice(gaps, parameter=parameter)]


def _decode_layer(reader: Reader, shape: tuple[int, ...]) -> Pattern:
    head = reader.byte(what="the mode of a layer")
    parameter, code = head >> _MODE_BITS, head & ((1 << _MODE_BITS) - 1)
    mode = _MODES.get(code)
    if mode is None or (parameter and mode not in _RICE):
        raise CodecError(f"a layer of unknown mode {head}")
    if mode is Mode.FULL:
        return Pattern.full(shape)
    num_weights = math.prod(shape)
    if mode is Mode.EMPTY:
        positions = np.empty(0, dtype=np.int64)
    elif mode is Mode.BITMAP:
        positions = decode_bitmap(reader, num_total=num_weights)
    else:
        positions = _read_positions(reader, num_weights, mode=mode, parameter=parameter)
        if mode in _OF_PRUNED:
            positions = complement(positions, num_total=num_weights)
    return Pattern.from_positions(shape, positions)


def _read_positions(reader: Reader, num_weights: int, *, mode: Mode, parameter: int) -> np.ndarray:
    count = reader.varint(what="the number of coded weights")
    if not 1 <= count <= num_weights // 2:
        raise CodecError(f"{count} coded weights of {num_weights}; expected 1 to half of them")
    if mode in _GAPS:
        return decode_gaps(reader, num_total=num_weights, count=count)
    if parameter >= num_weights.bit_length():
        raise CodecError(f"a Rice parameter of {parameter} for a layer of {num_weights} weights")
    return decode_rice(reader, num_total=num_weights, count=count, parameter=parameter)


def _read_signature(reader: Reader, *, limits: Limits) -> tuple[str, tuple[int, ...]]:
    num_bytes = reader.varint(what="the length of a name")
    if num_bytes > limits.max_name_bytes:
        raise CodecError(f"a name of {num_bytes} bytes; the limit is {limits.max_name_bytes}")
    try:
        name = bytes(reader.take(num_bytes, what="a name")).decode()
    except UnicodeDecodeError as error:
        raise CodecError("a name is not valid UTF-8") from error
    num_dims = reader.varint(what="the number of dimensions")
    if num_dims > limits.max_dims:
        raise CodecError(f"{name!r} has {num_dims} dimensions; the limit is {limits.max_dims}")
    shape = tuple(reader.varint(what="a dimension") for _ in range(num_dims))
    if 0 in shape:
        raise CodecError(f"{name!r} has shape {shape}, which holds no weights")
    return name, shape
