"""Entry frames: round trips, what is refused, and their size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from codec_reference import frame, mask_of, masks, payload_of, pruned_of, random_mask, varint
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemodel.codec import Limits, decode_entries, encode_entries
from sparsemodel.errors import CodecError, MaskMismatch
from sparsemodel.runtime.pattern import Patterns

# Weights 1, 2, 3, 5, 6, 7 of "b" are pruned, none of "a".
MASK = mask_of({"a": np.ones(3), "b": np.arange(8) % 4 == 0})


def ones(shape: int | tuple[int, ...]) -> np.ndarray:
    return np.ones(shape, dtype=np.float32)


@given(masks(), st.data())
@settings(max_examples=100, deadline=None)
def test_round_trip(mask: Patterns, data: st.DataObject) -> None:
    entries = {}
    for name in data.draw(st.lists(st.sampled_from(list(mask)), unique=True)):
        pruned = pruned_of(mask[name])
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        keep = rng.random(len(pruned)) < data.draw(st.floats(0, 1))
        entries[name] = (pruned[keep], rng.standard_normal(int(keep.sum()), np.float32))
    decoded = decode_entries(encode_entries(entries, patterns=mask), patterns=mask)
    assert list(decoded) == [name for name in mask if name in entries]
    for name, (indices, values) in entries.items():
        assert [part.dtype for part in decoded[name]] == [np.int64, np.float32]
        assert np.array_equal(decoded[name][0], indices)
        assert np.array_equal(decoded[name][1], values)


def test_by_hand() -> None:
    """Weights 2 and 6 are ranks 1 and 4 of 6, gaps 1 and 2; k = 1 as 25·2·2 >= 12·6 - 6·2.

    Remainders 1, 0; quotients 0, 1 in unary 1, 01: the bits 10101000.
    """
    entries = {"b": (np.array([2, 6]), np.float32([1.0, -2.0]))}
    body = bytes([1, 2, 0b10101000]) + bytes.fromhex("0000803f 000000c0")
    assert (
        payload_of(encode_entries(entries, patterns=MASK))
        == bytes.fromhex(MASK.digest())[:8] + body
    )


def test_size_of_a_top_k_upload() -> None:
    """300 of 560,000 pruned weights: 4 bytes a value, 30 for the rest, near log2 C(n, 300)."""
    mask = random_mask({"conv.weight": (256, 256, 3, 3)}, density=0.05)
    pruned = pruned_of(mask["conv.weight"])
    indices = np.sort(np.random.default_rng(0).permutation(pruned)[:300])
    data = encode_entries({"conv.weight": (indices, ones(300))}, patterns=mask)
    nats = sum(math.log((len(pruned) - i) / (i + 1)) for i in range(300))
    assert len(data) <= 4 * 300 + 30 + 1.05 * nats / math.log(2) / 8


@pytest.mark.parametrize(
    ("name", "indices", "values", "message"),
    [
        ("c", np.array([1]), ones(1), "which the mask lacks"),
        ("b", np.array([1, 4]), ones(2), "index 4 is not a pruned weight"),
        ("b", np.array([1, 8]), ones(2), "index 8 is not a pruned weight"),
        ("b", np.array([-1, 1]), ones(2), "index -1 is not a pruned weight"),
        ("a", np.array([0]), ones(1), "index 0 is not a pruned weight"),
        ("b", np.array([2, 1]), ones(2), "not strictly ascending"),
        ("b", np.array([1, 1]), ones(2), "not strictly ascending"),
        ("b", np.array([1]), ones(2), "two vectors of equal length"),
        ("b", np.array([[1]]), ones((1, 1)), "two vectors of equal length"),
        ("b", np.array([1], dtype=np.int32), ones(1), "expected int64"),
        ("b", np.array([1]), np.ones(1), "expected int64"),
    ],
)
def test_what_cannot_be_encoded(
    name: str, indices: np.ndarray, values: np.ndarray, message: str
) -> None:
    with pytest.raises(CodecError, match=message):
        encode_entries({name: (indices, values)}, patterns=MASK)


def test_another_mask_is_a_mismatch() -> None:
    data = encode_entries({}, patterns=MASK)
    with pytest.raises(MaskMismatch):
        decode_entries(data, patterns=mask_of({"a": np.zeros(3), "b": np.arange(8) % 4 == 0}))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (bytes([2, 0]), "layer 2 of a mask of 2"),
        (varint(2**62) + bytes([0]), "of a mask of 2"),
        (bytes([1, 0, 0, 0]), "layer 2 of a mask of 2"),
        (bytes([1]) + varint(2**62), "max_elements"),
        (bytes([1]) + varint(2**20), "bytes of values"),
        (bytes([1, 7]) + bytes(28), "7 entries at 6 pruned"),
        (bytes([1, 1, 0x21, 0, 0, 0, 0]), "padding"),
        (bytes([1, 1, 0x00, 0, 0, 0, 0]), "found 0 of 1"),
        (bytes([1, 1, 0x20, 0, 0, 0]), "needs 4 bytes"),
        (bytes([1, 2, 0xA8]) + bytes(7), "needs 8 bytes"),
        (bytes([1, 0x80, 0x00]), "shortest form"),
    ],
)
def test_hostile_entries_are_refused(body: bytes, message: str) -> None:
    digest = bytes.fromhex(MASK.digest())[:8]
    with pytest.raises(CodecError, match=message):
        decode_entries(frame(4, digest + body), patterns=MASK)


def test_the_limit_on_entries_is_inclusive() -> None:
    data = encode_entries({"b": (pruned_of(MASK["b"]), ones(6))}, patterns=MASK)
    assert len(decode_entries(data, patterns=MASK, limits=Limits(max_elements=6))["b"][0]) == 6
    with pytest.raises(CodecError, match="max_elements"):
        decode_entries(data, patterns=MASK, limits=Limits(max_elements=5))
