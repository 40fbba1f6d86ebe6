"""How many clients fit on a GPU; the measuring itself is in tests/gpu."""

from __future__ import annotations

import pytest

from fedprune.cohort_memory import clients_that_fit


@pytest.mark.parametrize(
    ("free", "each", "at_most", "expected"),
    [
        (1000, 100, 20, 8),  # 0.8 of 1000 bytes
        (1000, 101, 20, 7),
        (1000, 100, 5, 5),  # no more than there are
        (1000, 900, 5, 1),  # one is always tried
        (0, 100, 5, 1),
        (1000, 0, 5, 5),
        (80 * 2**30, 1 << 30, 100, 64),
    ],
)
def test_clients_that_fit(free: int, each: int, at_most: int, expected: int) -> None:
    assert clients_that_fit(free, bytes_each=each, at_most=at_most) == expected
