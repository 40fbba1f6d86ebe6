"""State frames: bit-exact values, error bounds of the small dtypes, size, mismatches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from codec_reference import flags_of, frame, masks, payload_of, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemodel.codec import decode_state, encode_state
from sparsemodel.codec.dtypes import round_to_bf16
from sparsemodel.errors import CodecError, MaskMismatch
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import SparseState

SHAPES = {"conv.weight": (8, 4, 3, 3), "fc.weight": (10, 6), "bias": (10,), "scale": ()}
MASK = random_mask({"conv.weight": (8, 4, 3, 3), "fc.weight": (10, 6)}, density=0.2)
FLOAT32_MAX = float(np.finfo(np.float32).max)


def f32(values: object) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def sparse(whole: dict[str, np.ndarray], mask: Patterns | None) -> SparseState:
    """The state of whole tensors under a mask."""
    values = dict(whole)
    for name, pattern in ({} if mask is None else mask).items():
        if name in whole:
            values[name] = whole[name].reshape(-1)[np.array(flags_of(pattern), dtype=bool)]
    return SparseState(values, mask)


def make_state(mask: Patterns | None = MASK) -> SparseState:
    rng = np.random.default_rng(0)
    whole = {n: f32(rng.standard_normal(shape, np.float32)) for n, shape in SHAPES.items()}
    return sparse(whole, mask)


def travel(values: list[float], dtype: str) -> list[float]:
    data = encode_state(SparseState({"w": f32(values)}), dtype=dtype)
    return decode_state(data, shapes={"w": (len(values),)}, patterns=None).values["w"].tolist()


def bits(values: np.ndarray) -> list[int]:
    return values.reshape(-1).view(np.uint32).tolist()


@given(masks(), st.integers(0, 2**32), st.booleans())
@settings(max_examples=100, deadline=None)
def test_fp32_keeps_every_bit(mask: Patterns, seed: int, whole: bool) -> None:
    """Any 32 bits at all: NaN payloads, infinities, zeros of both signs and subnormals too."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: np.frombuffer(rng.bytes(4 * math.prod(shape)), np.float32).reshape(shape)
        for name, shape in mask.shapes().items()
    }
    held = None if whole else mask
    data = encode_state(sparse(tensors, held))
    decoded = decode_state(data, shapes=mask.shapes(), patterns=held)
    assert decoded.patterns is held
    assert list(decoded.values) == list(mask)
    for name, pattern in mask.items():
        flags = [True] * pattern.num_weights if whole else flags_of(pattern)
        expected = [b for b, active in zip(bits(tensors[name]), flags, strict=True) if active]
        assert bits(decoded.values[name]) == expected
        assert decoded.values[name].shape == (pattern.shape if whole else (pattern.num_active,))
        assert decoded.dense_layer(name).shape == pattern.shape


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
def test_only_active_values_count_and_the_rest_takes_at_most_48_bytes(dtype: str) -> None:
    data = encode_state(make_state(), dtype=dtype)
    num_values = MASK.num_active + 10 + 1
    num_bytes = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}[dtype] * num_values
    scales = 4 * len(SHAPES) if dtype == "int8" else 0
    assert len(data) - num_bytes - scales <= 48
    decoded = decode_state(data, shapes=SHAPES, patterns=MASK)
    assert decoded.shapes() == SHAPES
    assert list(decoded.values) == list(SHAPES)
    assert all(values.dtype == np.float32 for values in decoded.values.values())


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
def test_the_layout_of_an_array_changes_nothing(dtype: str) -> None:
    whole = make_state(None).values["conv.weight"]
    other = np.asfortranarray(whole)
    frames = [encode_state(SparseState({"w": w}), dtype=dtype) for w in (whole, other)]
    assert frames[0] == frames[1]


def test_no_tensors_and_tensors_without_elements() -> None:
    empty = encode_state(SparseState({}, MASK))
    assert decode_state(empty, shapes={}, patterns=MASK).values == {}
    for dtype in ("fp32", "fp16", "bf16", "int8"):
        data = encode_state(SparseState({"w": f32(np.zeros((0, 3)))}), dtype=dtype)
        decoded = decode_state(data, shapes={"w": (0, 3)}, patterns=None)
        assert decoded.values["w"].shape == (0, 3)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
def test_decoded_arrays_own_their_memory(dtype: str) -> None:
    data = encode_state(SparseState({"w": f32([1, 1, 1])}), dtype=dtype)
    decode_state(data, shapes={"w": (3,)}, patterns=None).values["w"][:] = 0
    again = decode_state(data, shapes={"w": (3,)}, patterns=None)
    assert again.values["w"].tolist() == [1, 1, 1]


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


def test_bf16_rounds_as_torch_does() -> None:
    """Every upper half of 16 bits with the lower halves at which the rounding may turn.

    NaN is a NaN on both sides; which one torch makes differs from machine to machine.
    """
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | np.uint32(lower)).view(np.float32)
        rounded = round_to_bf16(values)
        expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
        nan = np.isnan(values)
        assert np.array_equal(rounded[~nan], expected.view(np.uint16)[~nan])
        assert (rounded[nan] == 0x7FC0).all()


@pytest.mark.parametrize(("dtype", "value"), [("fp16", 65520.0), ("bf16", 3.4e38)])
def test_a_finite_value_that_would_overflow_is_refused(dtype: str, value: float) -> None:
    state = SparseState({"small": f32([1, 1]), "large": f32([1.0, -value])})
    with pytest.raises(CodecError, match=f"'large' holds .*, too large for {dtype}"):
        encode_state(state, dtype=dtype)


def test_int8_by_hand() -> None:
    """max 254 gives the scale 2; 1 and 3 lie halfway and go to 0 and 4, -254 is -127 steps."""
    assert travel([-254.0, 1.0, 3.0, 5.0, 0.5], "int8") == [-254, 0, 4, 4, 0]
    data = encode_state(SparseState({"w": f32([-254.0, 3.0])}), dtype="int8")
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
        encode_state(SparseState({"bad": f32([1.0, value])}), dtype="int8")


def test_extreme_int8_values_stay_finite() -> None:
    """127 * float32(max / 127) may round past the largest float; the format clamps it."""
    assert travel([FLOAT32_MAX, -FLOAT32_MAX], "int8") == pytest.approx(
        [FLOAT32_MAX, -FLOAT32_MAX], rel=1e-6
    )


def test_another_mask_is_a_mismatch() -> None:
    other = random_mask(MASK.shapes(), density=0.2, seed=1)
    for sent, held in ((MASK, other), (MASK, None), (None, MASK)):
        with pytest.raises(MaskMismatch, match="the frame was made with mask"):
            decode_state(encode_state(make_state(sent)), shapes=SHAPES, patterns=held)


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
    data = encode_state(SparseState({"a": f32(np.ones((2, 3))), "c": f32(np.ones(6))}))
    with pytest.raises(CodecError, match="other names, shapes or order"):
        decode_state(data, shapes=shapes, patterns=None)


def test_what_cannot_be_encoded() -> None:
    with pytest.raises(CodecError, match=r"'w': expected float32, got float64"):
        encode_state(SparseState({"w": np.ones(2)}))
    with pytest.raises(CodecError, match="unknown dtype 'fp8'"):
        encode_state(SparseState({"w": f32([1, 1])}), dtype="fp8")
    for wrong in (np.ones(5), np.ones((10, 6))):
        with pytest.raises(CodecError, match=r"'fc.weight' has values of shape .* but its pattern"):
            encode_state(SparseState({"fc.weight": f32(wrong)}, MASK))
    with pytest.raises(CodecError, match="UTF-8"):
        encode_state(SparseState({"\ud800": f32([1, 1])}))


def test_a_pattern_of_another_shape_is_refused() -> None:
    """The sender's tensor has the receiver's shape, but the patterns of both another one."""
    shapes = {"fc.weight": (6, 10)}
    payload = bytearray(payload_of(encode_state(SparseState({}, MASK))))
    whole = encode_state(SparseState({"fc.weight": f32(np.ones((6, 10)))}))
    payload[9:17] = payload_of(whole)[9:17]  # the digest of those shapes
    with pytest.raises(
        CodecError, match=r"'fc.weight' has shape \(6, 10\), but the mask \(10, 6\)"
    ):
        decode_state(frame(3, bytes(payload)), shapes=shapes, patterns=MASK)


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
    digests = payload_of(encode_state(SparseState({"w": f32([0, 0])})))[1:17]
    data = frame(3, bytes([dtype]) + digests + bytes.fromhex(values))
    with pytest.raises(CodecError, match=message):
        decode_state(data, shapes={"w": (2,)}, patterns=None)
