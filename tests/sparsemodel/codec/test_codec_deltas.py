"""Mask deltas: round trips, the wrong base, cost against entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from codec_reference import (
    frame,
    mask_of,
    mask_pairs,
    moved_masks,
    payload_of,
    random_mask,
    varint,
)
from hypothesis import given, settings

from sparsemodel.codec import (
    decode_mask_delta,
    encode_mask_delta,
    mask_delta_entropy_bytes,
)
from sparsemodel.errors import CodecError, MaskMismatch
from sparsemodel.runtime.pattern import Patterns

SHAPES = {"a": (30, 20), "b": (5,), "c": (400,)}


@given(mask_pairs())
@settings(max_examples=100, deadline=None)
def test_round_trip(pair: tuple[Patterns, Patterns]) -> None:
    base, new = pair
    assert decode_mask_delta(encode_mask_delta(base, new), base=base) == new


def test_no_change_takes_the_digests_alone() -> None:
    mask = random_mask(SHAPES, density=0.2)
    data = encode_mask_delta(mask, mask)
    digest = bytes.fromhex(mask.digest())[:4]
    assert payload_of(data) == digest + digest
    assert decode_mask_delta(data, base=mask) == mask


def test_only_changed_layers_travel_and_equal_counts_take_one_number() -> None:
    """Layers 0 and 1 unchanged; layer 2 prunes 1 of 2 active (k = 0) and grows 1 of 2 pruned.

    After the digests: index 2; head 1 << 1; rank 1 of 2 as gap 1, 01; rank 0 of 2 as gap 0, 1.
    """
    base = mask_of({"a": np.ones(3), "b": np.ones(3), "c": [1, 1, 0, 0]})
    new = mask_of({"a": np.ones(3), "b": np.ones(3), "c": [1, 0, 1, 0]})
    assert payload_of(encode_mask_delta(base, new))[8:] == bytes([2, 2, 0b01000000, 0b10000000])


def test_a_wrong_base_is_refused() -> None:
    base, other = (random_mask(SHAPES, density=0.2, seed=seed) for seed in (0, 1))
    new = random_mask(SHAPES, density=0.2, seed=2)
    with pytest.raises(MaskMismatch, match=r"starts from mask .*, but the base given is"):
        decode_mask_delta(encode_mask_delta(base, new), base=other)


def test_a_wrong_result_is_refused() -> None:
    base, new = (random_mask(SHAPES, density=0.2, seed=seed) for seed in (0, 1))
    payload = bytearray(payload_of(encode_mask_delta(base, new)))
    payload[4] ^= 1
    with pytest.raises(CodecError, match="leads to mask"):
        decode_mask_delta(frame(2, bytes(payload)), base=base)


def test_masks_of_different_layers_have_no_delta() -> None:
    base = random_mask({"a": (2, 3), "b": (4,)}, density=0.5)
    for shapes in ({"a": (3, 2), "b": (4,)}, {"b": (4,), "a": (2, 3)}, {"a": (2, 3)}):
        other = random_mask(shapes, density=0.5)
        with pytest.raises(CodecError, match="names, order or shapes"):
            encode_mask_delta(base, other)
        with pytest.raises(CodecError, match="names, order or shapes"):
            mask_delta_entropy_bytes(base, other)


def test_entropy_by_hand() -> None:
    """2 of 4 active weights pruned, 1 of 6 pruned weights grown: (log2 6 + log2 6) / 8 bytes."""
    base = mask_of({"w": np.arange(10) < 4})
    new = mask_of({"w": [1, 0, 0, 1, 0, 1, 0, 0, 0, 0]})
    assert mask_delta_entropy_bytes(base, new) == pytest.approx(2 * math.log2(6) / 8, rel=1e-12)


@pytest.mark.parametrize(
    ("num_weights", "num_active", "num_moved"),
    [
        (589_824, 300, 90),
        (2_000, 1_000, 300),
        (10_000, 1_000, 300),
        (589_824, 5_898, 300),
        (589_824, 29_491, 400),
        (589_824, 58_982, 17_694),
    ],
)
def test_cost_is_near_the_entropy(num_weights: int, num_active: int, num_moved: int) -> None:
    for seed in range(5):
        base, new = moved_masks(num_weights, num_active, num_moved, seed)
        data = encode_mask_delta(base, new)
        assert len(data) <= 1.15 * mask_delta_entropy_bytes(base, new)
        assert decode_mask_delta(data, base=base) == new


@pytest.mark.parametrize(("num_weights", "num_moved"), [(3_000, 20), (10_000, 90)])
def test_small_frames_cost_a_fixed_number_of_bytes_more(num_weights: int, num_moved: int) -> None:
    """Envelope 10, digests 8, layer 3, padding 2; and the code's 4 % with its rounding."""
    for seed in range(5):
        base, new = moved_masks(num_weights, 300, num_moved, seed)
        entropy = mask_delta_entropy_bytes(base, new)
        assert len(encode_mask_delta(base, new)) <= 23 + 1.05 * entropy + 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (bytes([0, 0]), "shortest form"),  # nothing changes
        (bytes([0, 1, 0]), "shortest form"),  # nothing changes, counts apart
        (bytes([0, 3, 1, 0x40, 0x40]), "shortest form"),  # equal counts, written apart
        (bytes([0, 5 << 1, 0x40, 0x40]), "5 weights pruned of 4"),
        (bytes([0, 3, 5, 0x40]), "5 grown of 4"),
        (bytes([0]) + varint(2**62), "pruned of 4"),
        (bytes([1, 2, 0x40, 0x40]), "layer 1 of a mask of 1"),
        (varint(2**62) + bytes([2, 0x40, 0x40]), "of a mask of 1"),
        (bytes([0, 2, 0x40, 0x40]) * 2, "layer 1 of a mask of 1"),
        (bytes([0, 2, 0x10, 0x40]), "past the end"),  # rank 4 of 4
        (bytes([0, 2, 0x41, 0x40]), "padding"),
        (bytes([0, 2, 0x40]), "0 bytes are left"),
        (bytes([0, 2, 0x40, 0x40, 0]), "layer 1 of a mask of 1"),
    ],
)
def test_hostile_deltas_are_refused(body: bytes, message: str) -> None:
    """Each is 00 02 40 40 with one thing wrong: rank 0 pruned, rank 0 grown, of 4 each, k = 1."""
    base = mask_of({"w": [1, 1, 1, 1, 0, 0, 0, 0]})
    new = mask_of({"w": [0, 1, 1, 1, 1, 0, 0, 0]})
    digests = bytes.fromhex(base.digest())[:4] + bytes.fromhex(new.digest())[:4]
    with pytest.raises(CodecError, match=message):
        decode_mask_delta(frame(2, digests + body), base=base)
    assert decode_mask_delta(frame(2, digests + bytes([0, 2, 0x40, 0x40])), base=base) == new
