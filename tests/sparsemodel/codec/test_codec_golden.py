"""Frames keep their bytes: every kind, mode and dtype as a release before this one wrote them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import golden_cases as cases
import numpy as np
import pytest

from sparsemodel.codec import (
    decode_entries,
    decode_mask,
    decode_mask_delta,
    decode_state,
    encode_entries,
    encode_mask,
    encode_mask_delta,
    encode_state,
)
from sparsemodel.runtime.pattern import Patterns

# Name -> hexadecimal digits of the frame, or of its SHA-256 where it is long.
GOLDEN = json.loads((Path(__file__).parent / "golden_frames.json").read_text())
DTYPES = ("fp32", "fp16", "bf16", "int8")

MASKS: dict[str, Callable[[], Patterns]] = {
    "every mode": cases.every_mode,
    "large mask": cases.large,
    **{f"mask {d}": lambda d=d: cases.random_patterns(d, 5) for d in cases.DENSITIES},
}


def check(name: str, frame: bytes) -> None:
    assert GOLDEN[name] in (frame.hex(), f"sha256 {hashlib.sha256(frame).hexdigest()}")


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    patterns = MASKS[name]()
    check(name, encode_mask(patterns))
    assert decode_mask(encode_mask(patterns)) == patterns


@pytest.mark.parametrize("density", cases.DENSITIES)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.7])
def test_deltas(density: float, share: float) -> None:
    base = cases.random_patterns(density, 5)
    new = cases.moved(base, share, 50)
    frame = encode_mask_delta(base, new)
    check(f"delta {density} {share}", frame)
    assert decode_mask_delta(frame, base=base) == new


@pytest.mark.parametrize("share", [0.02, 0.6])
def test_deltas_of_every_mode(share: float) -> None:
    base = cases.every_mode()
    new = cases.moved(base, share, 60)
    frame = encode_mask_delta(base, new)
    check(f"delta every mode {share}", frame)
    assert decode_mask_delta(frame, base=base) == new


def test_a_large_delta() -> None:
    base = cases.large()
    new = cases.moved(base, 0.01, 70)
    frame = encode_mask_delta(base, new)
    check("large delta", frame)
    assert decode_mask_delta(frame, base=base) == new


@pytest.mark.parametrize("dtype", DTYPES)
def test_states(dtype: str) -> None:
    state = cases.state(cases.random_patterns(0.1, 5))
    check(f"state {dtype}", encode_state(state, dtype=dtype))


def test_a_state_without_patterns() -> None:
    frame = encode_state(cases.state(None), dtype="bf16")
    check("state whole", frame)
    assert decode_state(frame, shapes=cases.SHAPES, patterns=None).shapes() == cases.SHAPES


@pytest.mark.parametrize("density", [0.1, 0.95])
@pytest.mark.parametrize("share", [0.03, 0.8, 1.0])
def test_entries(density: float, share: float) -> None:
    patterns = cases.random_patterns(density, 5)
    entries = cases.entries(patterns, share)
    frame = encode_entries(entries, patterns=patterns)
    check(f"entries {density} {share}", frame)
    decoded = decode_entries(frame, patterns=patterns)
    assert list(decoded) == list(entries)
    for name, pair in entries.items():
        assert all(np.array_equal(a, b) for a, b in zip(decoded[name], pair, strict=True))


def test_every_golden_frame_is_tested() -> None:
    names = {*MASKS, "large delta", "state whole", *(f"state {d}" for d in DTYPES)}
    names |= {f"delta {d} {s}" for d in cases.DENSITIES for s in (0.01, 0.3, 0.7)}
    names |= {f"delta every mode {s}" for s in (0.02, 0.6)}
    names |= {f"entries {d} {s}" for d in (0.1, 0.95) for s in (0.03, 0.8, 1.0)}
    assert names == set(GOLDEN)
