"""Random numbers that nobody can guess, or that a seed repeats: a ChaCha20 key stream of a key."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

KEY_BYTES = 32
WORD_BYTES = 8
_CHUNK = 1 << 16  # numbers at a time, so that a long vector needs little memory besides

Words = NDArray[np.uint64]


class Stream:
    """The key stream of a key of 32 bytes, which must serve one use alone."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def take(self, size: int) -> bytes:
        """The next bytes."""
        return self._encryptor.update(bytes(size))

    def words(self, size: int, width: int) -> Words:
        """Numbers that are uniform below 2^(8 · width): uint64 [size]."""
        return unpacked(self.take(size * width), width)

    def uniforms(self, size: int) -> NDArray[np.float64]:
        """Numbers that are uniform in [0, 1), of 53 bits: float64 [size]."""
        return (self.words(size, WORD_BYTES) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def new_key() -> bytes:
    """A key from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def seeded_key(use: str, *parts: int) -> bytes:
    """A key that a seed repeats: for simulations, whose noise protects nobody."""
    return hashlib.sha256(":".join([use, *map(str, parts)]).encode()).digest()


def gaussian(stream: Stream, size: int) -> NDArray[np.float64]:
    """Draws of the standard normal distribution, by Box and Muller: float64 [size].

    They are doubles: what the last bits of noisy doubles can tell (Mironov, CCS 2012) is not
    guarded against.
    """
    half = (size + 1) // 2
    radius = np.sqrt(-2 * np.log1p(-stream.uniforms(half)))
    angle = 2 * np.pi * stream.uniforms(half)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


def add_masks(words: Words, key: bytes, width: int, *, sign: int) -> None:
    """Add or take away, in place and modulo 2^64, the mask of a key."""
    stream = Stream(key)
    for part in _chunks(len(words)):
        mask = stream.words(part.stop - part.start, width)
        if sign > 0:
            words[part] += mask
        else:
            words[part] -= mask


def packed(words: Words, width: int) -> bytes:
    """The lowest `width` bytes of each word, the lowest first."""
    little = words.astype("<u8", copy=False).view(np.uint8).reshape(-1, WORD_BYTES)
    return little[:, :width].tobytes()


def unpacked(data: bytes, width: int) -> Words:
    """The words that `packed` made bytes of, modulo 2^(8 · width)."""
    words = np.zeros((len(data) // width, WORD_BYTES), np.uint8)
    words[:, :width] = np.frombuffer(data, np.uint8).reshape(-1, width)
    return words.view("<u8").reshape(-1).astype(np.uint64, copy=False)


def _chunks(size: int) -> Iterator[slice]:
    for start in range(0, size, _CHUNK):
        yield slice(start, min(start + _CHUNK, size))
