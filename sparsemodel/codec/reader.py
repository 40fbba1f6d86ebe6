"""Reading the payload of a frame: a cursor that never runs past the end."""

from __future__ import annotations

import numpy as np

from sparsemodel.errors import CodecError

MAX_VARINT_BYTES = 9  # 63 bits, so that every number fits a signed 64-bit integer


def encode_varint(number: int) -> bytes:
    """A non-negative number below 2**63 as LEB128: 7 bits a byte, lowest first, shortest form.

    >>> encode_varint(300).hex()
    'ac02'
    """
    assert 0 <= number < 1 << 63
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def encode_signature(name: str, shape: tuple[int, ...]) -> bytes:
    """A name and a shape as bytes: length, UTF-8 name, number of dimensions, dimensions.

    Raises:
        CodecError: the name cannot be written as UTF-8.
    """
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise CodecError(f"the name {name!r} cannot be written as UTF-8") from error
    numbers = b"".join(encode_varint(size) for size in (len(shape), *shape))
    return encode_varint(len(encoded)) + encoded + numbers


class Reader:
    """A cursor over bytes; each method raises CodecError instead of reading past the end."""

    __slots__ = ("_data", "_position")

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    @property
    def position(self) -> int:
        """Number of bytes read so far."""
        return self._position

    @property
    def remaining(self) -> int:
        """Number of bytes not yet read."""
        return len(self._data) - self._position

    def take(self, num_bytes: int, *, what: str) -> memoryview:
        """The next `num_bytes` bytes, without a copy."""
        if num_bytes > self.remaining:
            raise CodecError(
                f"{what} needs {num_bytes} bytes but only {self.remaining} are left in the frame"
            )
        start = self._position
        self._position += num_bytes
        return self._data[start : self._position]

    def window(self, num_bytes: int) -> np.ndarray:
        """At most the next `num_bytes` bytes as uint8, without a copy and without moving."""
        stop = self._position + min(num_bytes, self.remaining)
        return np.frombuffer(self._data[self._position : stop], dtype=np.uint8)

    def byte(self, *, what: str) -> int:
        """The next byte."""
        return self.take(1, what=what)[0]

    def varint(self, *, what: str) -> int:
        """The next LEB128 number, refused unless it is in its shortest form and below 2**63."""
        number = 0
        for index in range(MAX_VARINT_BYTES):
            byte = self.byte(what=what)
            number |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if byte == 0 and index > 0:
                    raise CodecError(f"{what} is a number that is not in its shortest form")
                return number
        raise CodecError(f"{what} is a number of more than {MAX_VARINT_BYTES} bytes")

    def finish(self) -> None:
        """Refuse bytes that nothing has read."""
        if self.remaining:
            raise CodecError(f"{self.remaining} bytes are left over at the end of the payload")
