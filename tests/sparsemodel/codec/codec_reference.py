"""A slow reader and writer after FORMAT.md, and masks for the tests."""

from __future__ import annotations

import hashlib
import struct
import zlib

import hypothesis.strategies as st
import numpy as np

from sparsemodel.runtime.pattern import Pattern, Patterns


def varint(number: int) -> bytes:
    """LEB128."""
    out = []
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def frame(kind: int, payload: bytes) -> bytes:
    """An envelope with the right length and checksum around any payload."""
    body = b"SM\x01" + bytes([kind]) + varint(len(payload)) + payload
    return body + struct.pack("<I", zlib.crc32(body))


def payload_of(data: bytes) -> bytes:
    """The payload of a valid frame."""
    start = 5
    while data[start - 1] >= 0x80:
        start += 1
    return data[start:-4]


class SlowReader:
    """Reads the payload of a mask frame one bit and one byte at a time."""

    def __init__(self, payload: bytes) -> None:
        self.rest = list(payload)

    def varint(self) -> int:
        number, shift = 0, 0
        while True:
            byte = self.rest.pop(0)
            number += (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    def rice(self, count: int, parameter: int) -> list[int]:
        bits = iter([byte >> (7 - i) & 1 for byte in self.rest for i in range(8)])
        remainders = [0] * count
        num_bits = parameter * count
        for _ in range(parameter):
            for i in range(count):
                remainders[i] = 2 * remainders[i] + next(bits)
        positions, position = [], -1
        for i in range(count):
            quotient = 0
            num_bits += 1
            while next(bits) == 0:
                quotient += 1
                num_bits += 1
            position += quotient * 2**parameter + remainders[i] + 1
            positions.append(position)
        del self.rest[: (num_bits + 7) // 8]
        return positions

    def layer(self) -> tuple[str, tuple[int, ...], list[bool]]:
        length = self.varint()
        name = bytes(self.rest[:length]).decode()
        del self.rest[:length]
        shape = tuple(self.varint() for _ in range(self.varint()))
        num_weights = 1
        for size in shape:
            num_weights *= size
        head = self.rest.pop(0)
        mode, parameter = head % 8, head // 8
        if mode == 2:
            bits = [byte >> (7 - i) & 1 for byte in self.rest for i in range(8)]
            del self.rest[: (num_weights + 7) // 8]
            return name, shape, [bit == 1 for bit in bits[:num_weights]]
        coded: list[int] = []
        if mode in (3, 4):
            position = -1
            for _ in range(self.varint()):
                position += self.varint() + 1
                coded.append(position)
        elif mode in (5, 6):
            coded = self.rice(self.varint(), parameter)
        pattern = [mode in (1, 4, 6)] * num_weights
        for position in coded:
            pattern[position] = not pattern[position]
        return name, shape, pattern


def slow_decode_mask(data: bytes) -> dict[str, tuple[tuple[int, ...], list[bool]]]:
    """Name -> shape and pattern of a mask frame, after FORMAT.md and nothing else."""
    reader = SlowReader(payload_of(data))
    layers = [reader.layer() for _ in range(reader.varint())]
    assert not reader.rest
    return {name: (shape, pattern) for name, shape, pattern in layers}


def flags_of(pattern: Pattern) -> list[bool]:
    """Whether each weight is active, row by row of the CSR form."""
    flags = [False] * pattern.num_weights
    for row in range(len(pattern.row_ptr) - 1):
        for entry in range(pattern.row_ptr[row], pattern.row_ptr[row + 1]):
            flags[row * pattern.row_length + int(pattern.cols[entry])] = True
    return flags


def digest_of(patterns: Patterns) -> bytes:
    """The digest that FORMAT.md describes."""
    sha = hashlib.sha256()
    for name, pattern in patterns.items():
        encoded = name.encode()
        bits = [int(flag) for flag in flags_of(pattern)]
        bits += [0] * (-len(bits) % 8)
        octets = [bits[i : i + 8] for i in range(0, len(bits), 8)]
        bitmap = bytes(int("".join(map(str, octet)), 2) for octet in octets)
        sha.update(str(len(encoded)).encode() + b":" + encoded)
        sha.update(b":" + str(pattern.shape).encode() + b":" + bitmap)
    return sha.digest()


def layer_of(active: np.ndarray | list[int]) -> Pattern:
    """The pattern of flags in the shape of the weight."""
    flags = np.asarray(active, dtype=bool)
    return Pattern.from_positions(flags.shape, np.flatnonzero(flags))


def mask_of(layers: dict[str, np.ndarray | list[int]]) -> Patterns:
    """Patterns of flags by name."""
    return Patterns({name: layer_of(active) for name, active in layers.items()})


def pruned_of(pattern: Pattern) -> np.ndarray:
    """Flat indices of the pruned weights: int64, ascending."""
    return np.flatnonzero(~np.array(flags_of(pattern), dtype=bool))


def random_mask(shapes: dict[str, tuple[int, ...]], *, density: float, seed: int = 0) -> Patterns:
    """Every weight active with the same chance."""
    rng = np.random.default_rng(seed)
    return mask_of({name: rng.random(shape) < density for name, shape in shapes.items()})


def moved_masks(
    num_weights: int, num_active: int, num_moved: int, seed: int
) -> tuple[Patterns, Patterns]:
    """A random mask of one layer, and the same with `num_moved` pruned and as many grown."""
    order = np.random.default_rng(seed).permutation(num_weights)
    old = np.zeros(num_weights, dtype=bool)
    old[order[:num_active]] = True
    new = old.copy()
    new[order[:num_moved]] = False
    new[order[num_active : num_active + num_moved]] = True
    return mask_of({"fc.weight": old}), mask_of({"fc.weight": new})


shapes = st.lists(st.integers(1, 7), max_size=4).map(tuple)
densities = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0))


@st.composite
def layers(draw: st.DrawFn, shape: tuple[int, ...]) -> Pattern:
    """A pattern of some density, with its first part of another: some are uneven."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    noise = rng.random(int(np.prod(shape, dtype=int)))
    active = noise < draw(densities)
    cut = draw(st.integers(0, len(noise)))
    active[:cut] = noise[:cut] < draw(densities)
    return layer_of(active.reshape(shape))


@st.composite
def masks(draw: st.DrawFn) -> Patterns:
    """Masks of one to four layers with any names, scalars and empty and full layers included."""
    names = draw(
        st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=4, unique=True)
    )
    drawn = {}
    for name in names:
        shape = draw(st.one_of(shapes, st.tuples(st.integers(1, 3000))))
        drawn[name] = draw(layers(shape))
    return Patterns(drawn)


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[Patterns, Patterns]:
    """Two masks of the same layers; some layers are equal."""
    base = draw(masks())
    changed = {name: draw(layers(base[name].shape)) for name in base if draw(st.booleans())}
    return base, base.replace(changed)
