"""Entry frames: round trips, what is refused, and their size."""

from __future__ import annotations

import math

import pytest
import torch
from codec_reference import frame, masks, payload_of, random_mask, varint
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemodel.codec import Limits, decode_entries, encode_entries
from sparsemodel.errors import CodecError, MaskMismatch
from sparsemodel.masks.mask import Mask

# Weights 1, 2, 3, 5, 6, 7 of "b" are pruned, none of "a".
MASK = Mask({"a": torch.ones(3) > 0, "b": torch.arange(8) % 4 == 0})


@given(masks(), st.data())
@settings(max_examples=100, deadline=None)
def test_round_trip(mask: Mask, data: st.DataObject) -> None:
    entries = {}
    for name in data.draw(st.lists(st.sampled_from(list(mask)), unique=True)):
        pruned = mask.pruned(name)
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        keep = torch.rand(len(pruned), generator=generator) < data.draw(st.floats(0, 1))
        entries[name] = (pruned[keep], torch.randn(int(keep.sum()), generator=generator))
    decoded = decode_entries(encode_entries(entries, mask=mask), mask=mask)
    assert list(decoded) == [name for name in mask if name in entries]
    for name, (indices, values) in entries.items():
        assert torch.equal(decoded[name][0], indices)
        assert torch.equal(decoded[name][1], values)


def test_by_hand() -> None:
    """Weights 2 and 6 are ranks 1 and 4 of 6, gaps 1 and 2; k = 1 as 25·2·2 >= 12·6 - 6·2.

    Remainders 1, 0; quotients 0, 1 in unary 1, 01: the bits 10101000.
    """
    entries = {"b": (torch.tensor([2, 6]), torch.tensor([1.0, -2.0]))}
    body = bytes([1, 2, 0b10101000]) + bytes.fromhex("0000803f 000000c0")
    assert payload_of(encode_entries(entries, mask=MASK)) == bytes.fromhex(MASK.digest())[:8] + body


def test_size_of_a_top_k_upload() -> None:
    """300 of 560,000 pruned weights: 4 bytes a value, 30 for the rest, near log2 C(n, 300)."""
    mask = random_mask({"conv.weight": (256, 256, 3, 3)}, density=0.05)
    pruned = mask.pruned("conv.weight")
    order = torch.randperm(len(pruned), generator=torch.Generator().manual_seed(0))
    indices = pruned[order[:300].sort().values]
    data = encode_entries({"conv.weight": (indices, torch.ones(300))}, mask=mask)
    nats = sum(math.log((len(pruned) - i) / (i + 1)) for i in range(300))
    assert len(data) <= 4 * 300 + 30 + 1.05 * nats / math.log(2) / 8


@pytest.mark.parametrize(
    ("name", "indices", "values", "message"),
    [
        ("c", torch.tensor([1]), torch.ones(1), "which the mask lacks"),
        ("b", torch.tensor([1, 4]), torch.ones(2), "index 4 is not a pruned weight"),
        ("b", torch.tensor([1, 8]), torch.ones(2), "index 8 is not a pruned weight"),
        ("b", torch.tensor([-1, 1]), torch.ones(2), "index -1 is not a pruned weight"),
        ("a", torch.tensor([0]), torch.ones(1), "index 0 is not a pruned weight"),
        ("b", torch.tensor([2, 1]), torch.ones(2), "not strictly ascending"),
        ("b", torch.tensor([1, 1]), torch.ones(2), "not strictly ascending"),
        ("b", torch.tensor([1]), torch.ones(2), "two vectors of equal length"),
        ("b", torch.tensor([[1]]), torch.ones(1, 1), "two vectors of equal length"),
        ("b", torch.tensor([1], dtype=torch.int32), torch.ones(1), "expected int64"),
        ("b", torch.tensor([1]), torch.ones(1, dtype=torch.float64), "expected int64"),
    ],
)
def test_what_cannot_be_encoded(
    name: str, indices: torch.Tensor, values: torch.Tensor, message: str
) -> None:
    with pytest.raises(CodecError, match=message):
        encode_entries({name: (indices, values)}, mask=MASK)


def test_another_mask_is_a_mismatch() -> None:
    data = encode_entries({}, mask=MASK)
    with pytest.raises(MaskMismatch):
        decode_entries(data, mask=MASK.replace({"a": torch.zeros(3) > 0}))


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
        decode_entries(frame(4, digest + body), mask=MASK)


def test_the_limit_on_entries_is_inclusive() -> None:
    data = encode_entries({"b": (MASK.pruned("b"), torch.ones(6))}, mask=MASK)
    assert len(decode_entries(data, mask=MASK, limits=Limits(max_elements=6))["b"][0]) == 6
    with pytest.raises(CodecError, match="max_elements"):
        decode_entries(data, mask=MASK, limits=Limits(max_elements=5))
