"""Tensor frames: bit-exact values, error bounds of the small dtypes, size, mismatches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from codec_reference import frame, masks, payload_of, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemodel.codec import decode_tensors, decode_values, encode_tensors
from sparsemodel.errors import CodecError, MaskMismatch
from sparsemodel.masks.mask import Mask

SHAPES = {"conv.weight": (8, 4, 3, 3), "fc.weight": (10, 6), "bias": (10,), "scale": ()}
MASK = random_mask({"conv.weight": (8, 4, 3, 3), "fc.weight": (10, 6)}, density=0.2)
FLOAT32_MAX = float(np.finfo(np.float32).max)


def make_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def travel(values: list[float], dtype: str) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float32)
    data = encode_tensors({"w": tensor}, mask=None, dtype=dtype)
    return decode_tensors(data, shapes={"w": tuple(tensor.shape)}, mask=None)["w"].tolist()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.int32)


@given(masks(), st.integers(0, 2**32), st.booleans())
@settings(max_examples=100, deadline=None)
def test_fp32_keeps_every_bit(mask: Mask, seed: int, whole: bool) -> None:
    """Any 32 bits at all: NaN payloads, infinities, zeros of both signs and subnormals too."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
        for name, shape in mask.shapes().items()
    }
    held = None if whole else mask
    data = encode_tensors(tensors, mask=held)
    values = decode_values(data, shapes=mask.shapes(), mask=held)
    dense = decode_tensors(data, shapes=mask.shapes(), mask=held)
    for name, pattern in mask.items():
        flat = bits(tensors[name])
        if whole:
            assert torch.equal(bits(dense[name]), flat)
            assert values[name].shape == pattern.shape
        else:
            assert torch.equal(bits(values[name]), flat[mask.active(name)])
            expected = torch.where(pattern.reshape(-1), flat, 0)
            assert torch.equal(bits(dense[name]), expected)
            assert dense[name].shape == pattern.shape


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
def test_only_active_values_count_and_the_rest_takes_at_most_48_bytes(dtype: str) -> None:
    """What lies at the pruned positions changes nothing."""
    tensors = make_tensors()
    junk = {name: t.clone() for name, t in tensors.items()}
    for name in MASK:
        junk[name].reshape(-1)[MASK.pruned(name)] = math.nan
    data = encode_tensors(tensors, mask=MASK, dtype=dtype)
    assert encode_tensors(junk, mask=MASK, dtype=dtype) == data
    num_values = MASK.num_active + 10 + 1
    num_bytes = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}[dtype] * num_values
    scales = 4 * len(tensors) if dtype == "int8" else 0
    assert len(data) - num_bytes - scales <= 48
    decoded = decode_tensors(data, shapes=SHAPES, mask=MASK)
    assert list(decoded) == list(SHAPES)
    assert all(decoded[name].shape == torch.Size(SHAPES[name]) for name in SHAPES)
    assert all(t.dtype == torch.float32 for t in decoded.values())


def test_no_tensors_and_tensors_without_elements() -> None:
    assert decode_tensors(encode_tensors({}, mask=MASK), shapes={}, mask=MASK) == {}
    for dtype in ("fp32", "int8"):
        data = encode_tensors({"w": torch.zeros(0, 3)}, mask=None, dtype=dtype)
        assert decode_tensors(data, shapes={"w": (0, 3)}, mask=None)["w"].shape == (0, 3)


def test_decoded_tensors_own_their_memory() -> None:
    data = encode_tensors({"w": torch.ones(3)}, mask=None)
    decode_tensors(data, shapes={"w": (3,)}, mask=None)["w"].zero_()
    assert decode_tensors(data, shapes={"w": (3,)}, mask=None)["w"].tolist() == [1, 1, 1]


@given(st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_fp16_and_bf16_error_bounds(values: list[float]) -> None:
    """Half a unit in the last place: 2^-11 and 2^-8 of |x|; below the normal range half of its.

    The least unit is 2^-24 in fp16 and 2^-133 in bf16.
    """
    for x, half, brain in zip(values, travel(values, "fp16"), travel(values, "bf16"), strict=True):
        assert abs(half - x) <= max(2**-11 * abs(x), 2**-25)
        assert abs(brain - x) <= max(2**-8 * abs(x), 2**-134)


def test_halves_round_to_even() -> None:
    """fp16 steps by 2^-10 above 1, bf16 by 2^-7: a value halfway goes to the even neighbour."""
    assert travel([1 + 2**-11, 1 + 3 * 2**-11, math.inf], "fp16") == [1, 1 + 2**-9, math.inf]
    assert travel([1 + 2**-8, 1 + 3 * 2**-8, -math.inf], "bf16") == [1, 1 + 2**-6, -math.inf]
    assert math.copysign(1, travel([-0.0], "fp16")[0]) == -1
    assert all(math.isnan(travel([math.nan], dtype)[0]) for dtype in ("fp16", "bf16"))


@pytest.mark.parametrize(("dtype", "value"), [("fp16", 65520.0), ("bf16", 3.4e38)])
def test_a_finite_value_that_would_overflow_is_refused(dtype: str, value: float) -> None:
    tensors = {"small": torch.ones(2), "large": torch.tensor([1.0, -value])}
    with pytest.raises(CodecError, match=f"'large' holds .*, too large for {dtype}"):
        encode_tensors(tensors, mask=None, dtype=dtype)


def test_int8_by_hand() -> None:
    """max 254 gives the scale 2; 1 and 3 lie halfway and go to 0 and 4, -254 is -127 steps."""
    assert travel([-254.0, 1.0, 3.0, 5.0, 0.5], "int8") == [-254, 0, 4, 4, 0]
    data = encode_tensors({"w": torch.tensor([-254.0, 3.0])}, mask=None, dtype="int8")
    assert payload_of(data)[17:] == bytes([0, 0, 0, 0x40, 0x81, 2])
    assert travel([0.0, -0.0], "int8") == [0, 0]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@settings(max_examples=150, deadline=None)
def test_int8_error_is_half_a_step(values: list[float]) -> None:
    """Half a step, and the rounding of scale, quotient and product: 2^-24 each of 127 steps."""
    largest = max(abs(x) for x in values)
    step = max(largest / 127, 2**-126) * (1 + 2**-23)
    for x, got in zip(values, travel(values, "int8"), strict=True):
        assert abs(got - x) <= (0.5 + 2**-16) * step
        assert math.isfinite(got)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_int8_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(CodecError, match="'bad'"):
        encode_tensors({"bad": torch.tensor([1.0, value])}, mask=None, dtype="int8")


def test_extreme_int8_values_stay_finite() -> None:
    """127 * float32(max / 127) may round past the largest float; the format clamps it."""
    assert travel([FLOAT32_MAX, -FLOAT32_MAX], "int8") == pytest.approx(
        [FLOAT32_MAX, -FLOAT32_MAX], rel=1e-6
    )


def test_another_mask_is_a_mismatch() -> None:
    other = random_mask(MASK.shapes(), density=0.2, seed=1)
    tensors = make_tensors()
    for sent, held in ((MASK, other), (MASK, None), (None, MASK)):
        with pytest.raises(MaskMismatch, match="the frame was made with mask"):
            decode_values(encode_tensors(tensors, mask=sent), shapes=SHAPES, mask=held)


@pytest.mark.parametrize(
    "shapes",
    [
        {"b": (2, 3), "c": (6,)},
        {"a": (3, 2), "c": (6,)},
        {"c": (6,), "a": (2, 3)},
        {"a": (2, 3)},
        {"a": (2, 3), "c": (6,), "d": ()},
    ],
)
def test_other_names_shapes_or_order_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    data = encode_tensors({"a": torch.ones(2, 3), "c": torch.ones(6)}, mask=None)
    with pytest.raises(CodecError, match="other names, shapes or order"):
        decode_values(data, shapes=shapes, mask=None)


def test_what_cannot_be_encoded() -> None:
    with pytest.raises(CodecError, match=r"'w': expected float32, got torch.float64"):
        encode_tensors({"w": torch.ones(2, dtype=torch.float64)}, mask=None)
    with pytest.raises(CodecError, match="unknown dtype 'fp8'"):
        encode_tensors({"w": torch.ones(2)}, mask=None, dtype="fp8")
    with pytest.raises(
        CodecError, match=r"'fc.weight' has shape \(6, 10\), but the mask \(10, 6\)"
    ):
        encode_tensors({"fc.weight": torch.ones(6, 10)}, mask=MASK)
    with pytest.raises(CodecError, match="UTF-8"):
        encode_tensors({"\ud800": torch.ones(2)}, mask=None)


@pytest.mark.parametrize(
    ("dtype", "values", "message"),
    [
        (4, "", "unknown dtype 4"),
        (0, "00" * 7, "expected 8 bytes of values, got 7"),
        (0, "00" * 9, "expected 8 bytes of values, got 9"),
        (3, "0000803f 80 01", "no encoder writes"),  # -128
        (3, "00000000 01 00", "no encoder writes"),  # a step under scale zero
        (3, "000080bf 01 00", "an int8 scale of -1.0"),
        (3, "0000807f 01 00", "an int8 scale of inf"),
        (3, "0000c07f 01 00", "an int8 scale of nan"),
        (3, "01000000 01 00", "an int8 scale of 1.4"),
    ],
)
def test_hostile_values_are_refused(dtype: int, values: str, message: str) -> None:
    digests = payload_of(encode_tensors({"w": torch.zeros(2)}, mask=None))[1:17]
    data = frame(3, bytes([dtype]) + digests + bytes.fromhex(values))
    with pytest.raises(CodecError, match=message):
        decode_values(data, shapes={"w": (2,)}, mask=None)
