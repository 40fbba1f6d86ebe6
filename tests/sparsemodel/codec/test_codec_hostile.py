"""Damaged and hostile frames of every kind: a value or a CodecError, and no large allocation."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from codec_reference import frame, payload_of, pruned_of, random_mask, varint
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemodel.codec import (
    decode_entries,
    decode_mask,
    decode_mask_delta,
    decode_state,
    encode_entries,
    encode_mask,
    encode_mask_delta,
    encode_state,
    peek,
)
from sparsemodel.errors import CodecError
from sparsemodel.runtime.state import SparseState

SHAPES = {"a": (5, 9), "b": (20,)}
BASE = random_mask(SHAPES, density=0.3)
NEW = random_mask(SHAPES, density=0.3, seed=1)
CHOSEN = {name: pruned_of(BASE[name])[::5] for name in BASE}
ENTRIES = {name: (indices, indices.astype(np.float32)) for name, indices in CHOSEN.items()}
STATE = SparseState({n: BASE[n].positions().astype(np.float32) for n in BASE}, BASE)

# Kind -> a small valid frame and its decoder.
CASES: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "mask": (encode_mask(BASE), decode_mask),
    "mask_delta": (encode_mask_delta(BASE, NEW), lambda d: decode_mask_delta(d, base=BASE)),
    "tensors": (
        encode_state(STATE, dtype="int8"),
        lambda d: decode_state(d, shapes=SHAPES, patterns=BASE),
    ),
    "entries": (encode_entries(ENTRIES, patterns=BASE), lambda d: decode_entries(d, patterns=BASE)),
}


def layer(*numbers: int, name: bytes = b"w") -> bytes:
    """A mask of one layer: each number a varint, dimensions first."""
    return b"\x01" + varint(len(name)) + name + b"".join(map(varint, numbers))


# What the payload of a mask claims, beside the words of its refusal. Every frame has a right
# length and checksum and fewer than 100 bytes.
HOSTILE_MASKS = [
    (b"", "the number of layers needs 1 bytes"),
    (varint(0), "a mask of 0 layers"),
    (varint(4097), "a mask of 4097 layers"),
    (varint(2**62), "layers; expected 1 to 4096"),
    (varint(4096), "the length of a name needs 1 bytes"),
    (b"\x81\x00", "shortest form"),
    (b"\xff" * 9 + b"\x01", "more than 9 bytes"),
    (b"\x01" + varint(1024) + b"w", "a name needs 1024 bytes"),
    (b"\x01" + varint(2**62), "a name of 4611686018427387904 bytes"),
    (layer(1, 1, 0, name=b"\xff"), "not valid UTF-8"),
    (layer(9, *[1] * 9, 0), "9 dimensions"),
    (layer(2**40), "dimensions; the limit is 8"),
    (layer(2, 3, 0, 0), r"shape \(3, 0\), which holds no weights"),
    (layer(1, 2**28 + 1, 0), "max_elements"),
    (layer(8, *[2**62] * 8, 1), "max_elements"),
    (layer(1, 8), "the mode of a layer needs"),
    (layer(1, 8, 7), "unknown mode 7"),
    (layer(1, 8, 2 + 8, 0), "unknown mode 10"),
    (layer(1, 2**28, 2), "a bitmap needs 33554432 bytes"),
    (layer(1, 5, 2) + b"\x01", "padding"),
    (layer(1, 8, 3, 0), "0 coded weights of 8"),
    (layer(1, 8, 5, 5), "5 coded weights of 8"),
    (layer(1, 2**28, 3, 2**27), "134217728 gaps need"),
    (layer(1, 2**28, 5, 2**27), "134217728 positions need at least"),
    (layer(1, 2**28, 5 + 8 * 15, 200) + b"\x00" * 64, "200 positions need at least 3200 bits"),
    (layer(1, 2**28, 6 + 8 * 28, 1) + b"\xff" * 64, "padding"),
    (layer(1, 2**28, 6 + 8 * 29, 1) + b"\xff" * 64, "a Rice parameter of 29"),
    (layer(1, 9, 5 + 8 * 3, 1) + b"\x28", "past the end"),
    (layer(1, 9, 5, 2) + b"\x40\x00", "found 1 of 2"),
    (layer(1, 9, 5, 1) + b"\xc0", "padding"),
    (layer(1, 9, 3, 1) + b"\x09", "past the end"),
    (layer(1, 9, 3, 2) + b"\x05\x04", "past the end"),
    (layer(1, 9, 3, 1) + b"\x80\x00", "shortest form"),
    (layer(1, 9, 3, 1) + b"\xff\xff\xff\xff\xff\x00", "a gap of more than 5 bytes"),
    (layer(1, 9, 3, 1) + b"\xff", "fewer than 1 gaps"),
    (layer(1, 2**28, 3, 2) + b"\xff\xff\xff\xff\x7f" * 2, "past the end"),
    (layer(1, 9, 1, 0), "1 bytes are left over"),
    (b"\x02" + layer(1, 9, 1)[1:] * 2, "'w' comes twice"),
    (b"\x02" + layer(1, 1, 0)[1:] + layer(1, 2**28, 0, name=b"v")[1:], "max_elements"),
]


@pytest.mark.parametrize(("payload", "message"), HOSTILE_MASKS)
def test_hostile_masks_are_refused_without_allocating(payload: bytes, message: str) -> None:
    data = frame(1, payload)
    assert len(data) < 120
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match=message):
            decode_mask(data)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the magic number needs 2 bytes"),
        (b"SM\x01", "the kind needs 1 bytes"),
        (b"\x80\x04K\x01.", "not a frame"),  # the start of a pickle
        (b"SM\x02\x01\x00", "a frame of version 2; this release reads version 1"),
        (b"SM\x01\x05\x00", "unknown kind 5"),
        (b"SM\x01\x01" + varint(2**62), "announces a frame of"),
        (b"SM\x01\x01\x80\x00", "shortest form"),
        (frame(1, b"") + b"\x00", "announces a frame of 9 bytes but there are 10"),
        (frame(1, b"")[:-1] + b"\x00", "checksum"),
        (CASES["tensors"][0], "expected a MASK frame, got a TENSORS frame"),
    ],
)
def test_hostile_envelopes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decode_mask(data)


@pytest.mark.parametrize("case", CASES)
def test_every_flipped_bit_is_refused(case: str) -> None:
    data, decode = CASES[case]
    decode(data)
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(CodecError):
            decode(bytes(flipped))


@pytest.mark.parametrize("case", CASES)
def test_every_flipped_bit_behind_a_right_checksum_is_a_value_or_an_error(case: str) -> None:
    data, decode = CASES[case]
    payload = payload_of(data)
    num_refused = 0
    for position in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[position // 8] ^= 1 << position % 8
        try:
            decode(frame(data[3], bytes(flipped)))
        except CodecError:
            num_refused += 1
    assert num_refused > 0


@pytest.mark.parametrize("case", CASES)
def test_every_truncation_is_refused(case: str) -> None:
    data, decode = CASES[case]
    payload = payload_of(data)
    for length in range(len(data)):
        with pytest.raises(CodecError):
            decode(data[:length])
    prefixes_that_end_between_layers = 0
    for length in range(len(payload)):
        try:
            decode(frame(data[3], payload[:length]))
            prefixes_that_end_between_layers += 1
        except CodecError:
            pass
    # Entries run to the end of the payload, so a frame with fewer layers is another right frame.
    assert prefixes_that_end_between_layers == (2 if case == "entries" else 0)


@given(st.sampled_from([1, 2, 3, 4]), st.binary(max_size=80), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_value_or_an_error(kind: int, noise: bytes, enveloped: bool) -> None:
    data = frame(kind, noise) if enveloped else noise
    for _, decode in CASES.values():
        for attempt in (decode, peek):
            try:
                attempt(data)
            except CodecError:
                continue
