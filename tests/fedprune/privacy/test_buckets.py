"""Entries that are added up in a table come out of it as exact sums."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.privacy.buckets import FIELDS, MAX_PLACES, ROWS, cells_for, entries_of, table_of
from fedprune.privacy.randomness import Words

CLIENT = st.dictionaries(
    st.integers(0, 300) | st.integers(0, MAX_PLACES - 1),
    st.tuples(st.integers(-(2**40), 2**40), st.integers(0, 2**36)),
    max_size=40,
)


def table(entries: dict[int, tuple[int, int]], cells: int, session: str) -> Words:
    places = np.array(sorted(entries), np.int64)
    high, low = (np.array([entries[p][k] for p in sorted(entries)], np.int64) for k in (0, 1))
    return table_of(
        places, high.view(np.uint64), low.view(np.uint64), cells=cells, session=session
    )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(CLIENT, min_size=1, max_size=6), st.integers(6, 8), st.text(max_size=5))
def test_sums_of_tables_are_sums_of_entries(
    clients: list[dict[int, tuple[int, int]]], width: int, session: str
) -> None:
    cells = cells_for(sum(map(len, clients))) or 1
    total = sum(
        (table(entries, cells, session) for entries in clients),
        np.zeros(FIELDS * ROWS * cells, np.uint64),
    )
    noise = np.arange(len(total), dtype=np.uint64) << np.uint64(8 * width) if width < 8 else 0
    (places, high, low), complete = entries_of(total + noise, session=session, width=width)
    expected: dict[int, tuple[int, int]] = {}
    for entries in clients:
        for place, (a, b) in entries.items():
            before = expected.get(place, (0, 0))
            expected[place] = (before[0] + a, before[1] + b)
    assert complete
    assert places.tolist() == sorted(expected)
    modulus = 2 ** (8 * width)
    assert high.tolist() == [expected[p][0] % modulus for p in sorted(expected)]
    assert low.tolist() == [expected[p][1] % modulus for p in sorted(expected)]


def test_a_table_that_is_too_full_says_so_and_invents_nothing() -> None:
    draw = np.random.default_rng(0)
    places = np.sort(draw.choice(10**6, 1000, replace=False)).astype(np.int64)
    ones = np.ones(1000, np.uint64)
    crowded = table_of(places, ones, ones, cells=150, session="s")
    (found, high, _), complete = entries_of(crowded, session="s", width=8)
    assert not complete
    assert set(found.tolist()) <= set(places.tolist())
    assert (high == 1).all()


def test_seldom_is_a_table_of_the_right_size_not_read() -> None:
    """600 tables, each as full as it may be: all are read."""
    draw = np.random.default_rng(1)
    for trial in range(600):
        size = int(draw.integers(1, 60))
        places = np.unique(draw.integers(0, 10**7, size))
        zeros = np.zeros(len(places), np.uint64)
        some = table_of(places, zeros, zeros, cells=cells_for(len(places)), session=str(trial))
        assert entries_of(some, session=str(trial), width=6)[1]
