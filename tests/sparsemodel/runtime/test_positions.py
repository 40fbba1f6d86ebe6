"""Members and absent positions against a plain array of flags."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemodel.runtime.positions import absent_at, complement, find

flags = st.lists(st.booleans(), max_size=60).map(lambda drawn: np.array(drawn, dtype=bool))


@given(flags)
def test_complement(active: np.ndarray) -> None:
    absent = complement(np.flatnonzero(active), num_total=len(active))
    assert absent.dtype == np.int64
    assert absent.tolist() == np.flatnonzero(~active).tolist()


@given(flags)
def test_positions_of_ranks(active: np.ndarray) -> None:
    absent = np.flatnonzero(~active)
    ranks = np.arange(len(absent))[::-2]
    assert absent_at(np.flatnonzero(active), ranks).tolist() == absent[ranks].tolist()


@given(flags, st.lists(st.integers(-5, 65), max_size=20))
def test_find(active: np.ndarray, wanted: list[int]) -> None:
    below, found = find(np.flatnonzero(active), np.array(wanted, dtype=np.int64))
    for position, num_below, is_member in zip(wanted, below, found, strict=True):
        inside = 0 <= position < len(active)
        assert num_below == active[: max(position, 0)].sum()
        assert is_member == (inside and active[position])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_positions_of_both_widths(dtype: type) -> None:
    members = np.array([1, 2, 4], dtype=dtype)
    assert complement(members, num_total=7).tolist() == [0, 3, 5, 6]
    assert absent_at(members, np.array([3])).tolist() == [6]
