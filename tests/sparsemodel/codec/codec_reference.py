"""A slow reader and writer after FORMAT.md, and masks for the tests."""

from __future__ import annotations

import hashlib
import struct
import zlib

import hypothesis.strategies as st
import numpy as np
import torch

from sparsemodel.masks.mask import Mask


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


def digest_of(mask: Mask) -> bytes:
    """The digest that FORMAT.md describes."""
    sha = hashlib.sha256()
    for name, pattern in mask.items():
        encoded = name.encode()
        bits = [int(bit) for bit in pattern.reshape(-1)]
        bits += [0] * (-len(bits) % 8)
        octets = [bits[i : i + 8] for i in range(0, len(bits), 8)]
        bitmap = bytes(int("".join(map(str, octet)), 2) for octet in octets)
        sha.update(str(len(encoded)).encode() + b":" + encoded)
        sha.update(b":" + str(tuple(pattern.shape)).encode() + b":" + bitmap)
    return sha.digest()


def random_mask(shapes: dict[str, tuple[int, ...]], *, density: float, seed: int = 0) -> Mask:
    """Every weight active with the same chance."""
    generator = torch.Generator().manual_seed(seed)
    return Mask({n: torch.rand(s, generator=generator) < density for n, s in shapes.items()})


def moved_masks(num_weights: int, num_active: int, num_moved: int, seed: int) -> tuple[Mask, Mask]:
    """A random mask of one layer, and the same with `num_moved` pruned and as many grown."""
    order = np.random.default_rng(seed).permutation(num_weights)
    old = np.zeros(num_weights, dtype=bool)
    old[order[:num_active]] = True
    new = old.copy()
    new[order[:num_moved]] = False
    new[order[num_active : num_active + num_moved]] = True
    base = Mask({"fc.weight": torch.from_numpy(old)})
    return base, base.replace({"fc.weight": torch.from_numpy(new)})


shapes = st.lists(st.integers(1, 7), max_size=4).map(tuple)
densities = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0))


@st.composite
def patterns(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """A pattern of some density, with its first part of another: some are uneven."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    noise = torch.rand(shape, generator=generator).reshape(-1)
    pattern = noise < draw(densities)
    cut = draw(st.integers(0, len(noise)))
    pattern[:cut] = noise[:cut] < draw(densities)
    return pattern.reshape(shape)


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """Masks of one to four layers with any names, scalars and empty and full layers included."""
    names = draw(
        st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=4, unique=True)
    )
    layers = {}
    for name in names:
        shape = draw(st.one_of(shapes, st.tuples(st.integers(1, 3000))))
        layers[name] = draw(patterns(shape))
    return Mask(layers)


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[Mask, Mask]:
    """Two masks of the same layers; some layers are equal."""
    base = draw(masks())
    changed = {n: draw(patterns(tuple(base[n].shape))) for n in base if draw(st.booleans())}
    return base, base.replace(changed)
