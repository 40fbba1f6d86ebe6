"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from prunelab.pages.units import format_bytes, format_seconds


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_940, "99.9 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (21_500_000, "21.5 MB"),
        (3.2e9, "3.20 GB"),
        (5e12, "5.00 TB"),
        (5e15, "5000 TB"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_format_bytes(num_bytes: float | None, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7_500, "2 h 05 min"),
        (86_399, "1 d 00 h"),
        (100_000, "1 d 04 h"),
        (None, "–"),
    ],
)
def test_format_seconds(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text
