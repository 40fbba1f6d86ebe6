"""Mask frames: round trips, the shortest mode, cost against entropy, an independent decoder."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from codec_reference import (
    digest_of,
    flags_of,
    mask_of,
    masks,
    payload_of,
    random_mask,
    slow_decode_mask,
    varint,
)
from hypothesis import example, given, settings

import sparsemodel.codec
from sparsemodel.codec import (
    Kind,
    Limits,
    decode_mask,
    decode_mask_delta,
    encode_mask,
    encode_mask_delta,
    mask_entropy_bytes,
    peek,
)
from sparsemodel.errors import CodecError
from sparsemodel.runtime.pattern import Pattern, Patterns

EXAMPLE = "534d01011301096663 2e776569676874 020410 1d 04 188988 b3dd0af3"


def one_layer(active: list[int] | np.ndarray) -> Patterns:
    return mask_of({"w": active})


def layer_bytes(mask: Patterns) -> bytes:
    """What follows the signature of the only layer, which is called "w" and has one dimension."""
    num_weights = mask.num_weights
    num_varint = 1 + (num_weights >= 128) + (num_weights >= 16384)
    return payload_of(encode_mask(mask))[1 + 2 + 1 + num_varint :]


@given(masks())
@settings(max_examples=150, deadline=None)
@example(mask_of({"scalar": np.array(True), "one": [0]}))
def test_round_trip_keeps_names_shapes_order_and_patterns(mask: Patterns) -> None:
    decoded = decode_mask(encode_mask(mask))
    assert list(decoded.shapes().items()) == list(mask.shapes().items())
    assert all(decoded[name] == mask[name] for name in mask)


@given(masks())
@settings(max_examples=100, deadline=None)
def test_a_slow_decoder_after_the_specification_agrees(mask: Patterns) -> None:
    expected = {name: (pattern.shape, flags_of(pattern)) for name, pattern in mask.items()}
    assert slow_decode_mask(encode_mask(mask)) == expected
    assert digest_of(mask).hex()[:32] == mask.digest()


def test_the_worked_example_of_the_specification() -> None:
    """Weights 3, 20, 21, 50 of 64: gaps 3, 16, 0, 28, so k = 3 gives 12 + 4 + 5 bits."""
    mask = Patterns({"fc.weight": Pattern.from_positions((4, 16), np.array([3, 20, 21, 50]))})
    frame = bytes.fromhex(EXAMPLE)
    assert encode_mask(mask) == frame
    assert decode_mask(frame) == mask
    new = Patterns({"fc.weight": Pattern.from_positions((4, 16), np.array([3, 21, 40, 50]))})
    delta = bytes.fromhex("534d01020c 13f5a895 2ba71ee8 0002 c0 2a 384b4b98")
    assert encode_mask_delta(mask, new) == delta
    assert decode_mask_delta(delta, base=mask) == new
    text = (Path(sparsemodel.codec.__file__).parent / "FORMAT.md").read_text()
    assert frame.hex(" ") in text
    assert delta.hex(" ") in text


@pytest.mark.parametrize(("value", "mode"), [(False, 0), (True, 1)])
def test_empty_and_full_layers_take_one_byte(value: bool, mode: int) -> None:
    mask = mask_of({"w": np.full((1000, 9), value)})
    without_layer = 1 + 2 + 1 + 2 + 1  # number of layers, "w", two dimensions: 1000, 9
    assert payload_of(encode_mask(mask))[without_layer:] == bytes([mode])


def test_mode_bitmap() -> None:
    """Alternating weights: every gap is 1, which costs Rice 16 bits and a count; a bitmap 16."""
    assert layer_bytes(one_layer([0, 1] * 8)) == bytes([2, 0x55, 0x55])


def test_mode_gaps() -> None:
    """Weights 90,000 to 90,059 of 100,000: varint gaps take 3 + 59 bytes after the count.

    Rice needs at least 11 bits a gap (k = 10: 60 * 11 + 87 = 747 bits, 94 bytes).
    90,000 = 16 + 63 * 2**7 + 5 * 2**14.
    """
    pattern = np.zeros(100_000, dtype=bool)
    pattern[90_000:90_060] = True
    body = bytes([60, 16 | 0x80, 63 | 0x80, 5]) + bytes(59)
    assert layer_bytes(one_layer(pattern)) == bytes([3]) + body
    assert layer_bytes(one_layer(~pattern)) == bytes([4]) + body


def test_mode_rice() -> None:
    """Weights 3, 17, 33 of 40: gaps 3, 13, 15. k = 3 takes 9 + 3 + 2 bits.

    Remainders 011, 101, 111 in planes: 011, 101, 111; quotients 0, 1, 1: 1, 01, 01. Together
    0111 0111 1101 0100.
    """
    pattern = np.zeros(40, dtype=bool)
    pattern[[3, 17, 33]] = True
    body = bytes([3, 0x77, 0xD4])
    assert layer_bytes(one_layer(pattern)) == bytes([5 | 3 << 3]) + body
    assert layer_bytes(one_layer(~pattern)) == bytes([6 | 3 << 3]) + body


@given(masks())
@settings(max_examples=100, deadline=None)
def test_the_shortest_mode_is_chosen(mask: Patterns) -> None:
    """Against the sizes of every mode and every Rice parameter, worked out gap by gap."""
    for pattern in mask.values():
        flat = np.array(flags_of(pattern), dtype=bool)
        active = int(flat.sum())
        if active in (0, len(flat)):
            continue
        coded = np.flatnonzero(flat if 2 * active <= len(flat) else ~flat).tolist()
        gaps = [b - a - 1 for a, b in itertools.pairwise([-1, *coded])]
        num_count = len(varint(len(gaps)))
        rice = min(
            (len(gaps) * (k + 1) + sum(gap >> k for gap in gaps) + 7) // 8 for k in range(20)
        )
        sizes = [(len(flat) + 7) // 8, num_count + sum(len(varint(gap)) for gap in gaps)]
        sizes.append(num_count + rice)
        body = layer_bytes(one_layer(flat))
        assert len(body) == 1 + min(sizes)
        assert (body[0] % 8 - 1) // 2 == (0, 1, 2)[sizes.index(min(sizes))]


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.38, 0.5, 0.62, 0.95])
def test_cost_is_near_the_entropy(density: float) -> None:
    mask = random_mask({"conv.weight": (256, 256, 3, 3)}, density=density)
    frame = encode_mask(mask)
    assert len(frame) <= 1.05 * mask_entropy_bytes(mask)
    assert decode_mask(frame) == mask


def test_entropy_by_hand() -> None:
    """C(4, 2) = 6 and C(8, 1) = 8: (log2 6 + 3) / 8 bytes; empty and full layers add nothing."""
    mask = mask_of({"a": [1, 1, 0, 0], "b": np.arange(8) == 3, "c": np.ones(9), "d": np.zeros(9)})
    assert mask_entropy_bytes(mask) == pytest.approx((math.log2(6) + 3) / 8, rel=1e-12)


def test_an_uneven_mask_costs_no_more_than_a_bitmap_or_an_index_list() -> None:
    """Half of a layer dense, half empty; and one filter alone in a large layer."""
    pattern = np.zeros(8000, dtype=bool)
    pattern[:4000] = True
    assert len(layer_bytes(one_layer(pattern))) <= 1 + 1000
    pattern[:] = False
    pattern[4000:4009] = True
    assert len(layer_bytes(one_layer(pattern))) <= 2 + 9 * 13 / 8 + 1


def test_limits_are_inclusive() -> None:
    mask = mask_of({"ab": np.ones((2, 3, 4)), "c": np.ones(6)})
    frame = encode_mask(mask)
    exact = Limits(
        max_elements=30, max_layers=2, max_name_bytes=2, max_dims=3, max_frame_bytes=len(frame)
    )
    assert decode_mask(frame, limits=exact) == mask
    for field in dataclasses.fields(Limits):
        lower = dataclasses.replace(exact, **{field.name: getattr(exact, field.name) - 1})
        with pytest.raises(CodecError):
            decode_mask(frame, limits=lower)


@pytest.mark.parametrize("wrong", [{"max_layers": 0}, {"max_elements": 2**31}])
def test_impossible_limits_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(CodecError, match=next(iter(wrong))):
        Limits(**wrong)


def test_peek_reads_the_header_alone() -> None:
    info = peek(bytes.fromhex(EXAMPLE)[:5])
    assert (info.kind, info.version, info.payload_bytes) == (Kind.MASK, 1, 19)
