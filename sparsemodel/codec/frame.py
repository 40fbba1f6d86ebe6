"""The envelope of every message: magic, version, kind, length, payload, checksum."""

from __future__ import annotations

import dataclasses
import enum
import struct
import zlib
from collections.abc import Sequence

from sparsemodel.codec.reader import Reader, encode_varint
from sparsemodel.errors import CodecError

MAGIC = b"SM"
VERSION = 1
CRC_BYTES = 4

# A piece of a frame; a view of an array's bytes needs no copy of its own.
Part = bytes | memoryview


class Kind(enum.IntEnum):
    """What a frame's payload holds."""

    MASK = 1
    MASK_DELTA = 2
    TENSORS = 3
    ENTRIES = 4


_KINDS = {int(kind): kind for kind in Kind}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a receiver is willing to decode; anything that declares more is refused unread.

    Args:
        max_elements: weights in a frame, all layers together; below 2**31.
        max_layers: layers in a mask.
        max_name_bytes: bytes of a layer's name.
        max_dims: dimensions of a layer's shape.
        max_frame_bytes: bytes of a frame, envelope included.

    Raises:
        CodecError: a limit below 1, or max_elements not below 2**31.
    """

    max_elements: int = 2**28
    max_layers: int = 4096
    max_name_bytes: int = 1024
    max_dims: int = 8
    max_frame_bytes: int = 2**31

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise CodecError(f"{field.name} must be at least 1")
        # Patterns count their weights in int32.
        if self.max_elements >= 2**31:
            raise CodecError(f"max_elements must be below 2**31, got {self.max_elements}")


DEFAULT_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class FrameInfo:
    """What a frame's header says: its kind, format version and number of payload bytes."""

    kind: Kind
    version: int
    payload_bytes: int


def peek(data: bytes) -> FrameInfo:
    """Read a frame's header alone; `data` may end anywhere after it, and no checksum is made.

    Raises:
        CodecError: the bytes do not start with the header of a frame of this version.

    >>> peek(bytes.fromhex("534d0104809601")).payload_bytes
    19200
    """
    return _read_header(Reader(memoryview(data)))


def seal_frame(parts: Sequence[Part], *, kind: Kind) -> bytes:
    """Wrap a payload, given in parts, in the envelope; each part is copied once."""
    header = MAGIC + bytes((VERSION, kind)) + encode_varint(sum(len(part) for part in parts))
    checksum = zlib.crc32(header)
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join((header, *parts, struct.pack("<I", checksum)))


def open_frame(data: bytes, *, kind: Kind, limits: Limits) -> Reader:
    """Check the envelope of a frame and return a reader of its payload.

    Raises:
        CodecError: not a frame, damaged, of another version or kind, or above the limits.
    """
    if len(data) > limits.max_frame_bytes:
        raise CodecError(
            f"a frame of {len(data)} bytes; the limit max_frame_bytes is {limits.max_frame_bytes}"
        )
    view = memoryview(data)
    reader = Reader(view)
    info = _read_header(reader)
    end = reader.position + info.payload_bytes
    if len(data) != end + CRC_BYTES:
        raise CodecError(
            f"the header announces a frame of {end + CRC_BYTES} bytes but there are {len(data)}"
        )
    if struct.unpack_from("<I", data, end)[0] != zlib.crc32(view[:end]):
        raise CodecError("the checksum does not match: the frame was damaged; send it again")
    if info.kind != kind:
        raise CodecError(f"expected a {kind.name} frame, got a {info.kind.name} frame")
    return Reader(view[reader.position : end])


def _read_header(reader: Reader) -> FrameInfo:
    if reader.take(len(MAGIC), what="the magic number") != MAGIC:
        raise CodecError(f"not a frame: it does not start with {MAGIC!r}")
    version = reader.byte(what="the version")
    if version != VERSION:
        raise CodecError(f"a frame of version {version}; this release reads version {VERSION}")
    kind = reader.byte(what="the kind")
    if kind not in _KINDS:
        raise CodecError(f"a frame of unknown kind {kind}; known are {sorted(_KINDS)}")
    return FrameInfo(_KINDS[kind], version, reader.varint(what="the payload length"))
