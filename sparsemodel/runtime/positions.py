"""Ascending positions below a total: which are members, which are absent, and their ranks.

Members are the active weights of a layer, absent positions its pruned ones, of which there may be
many: nothing here is as long as those unless they are what is asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.integer[Any]]


def complement(members: Positions, *, num_total: int) -> NDArray[np.int64]:
    """The positions below `num_total` that are not members: int64, ascending.

    >>> complement(np.array([1, 2, 4]), num_total=7)
    array([0, 3, 5, 6])
    """
    gaps = np.diff(members, prepend=-1, append=num_total)
    gaps -= 1
    before = np.flatnonzero(gaps)
    # An absent position is its rank and the number of members before it.
    absent = np.arange(num_total - len(members))
    absent += np.repeat(before, gaps[before])
    return absent


def find(members: Positions, wanted: Positions) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where positions stand among the members.

    Args:
        members: ascending, shape [n].
        wanted: positions in any order, shape [k].

    Returns:
        How many members are below each wanted position, int64 [k], and whether it is a member,
        bool [k]: where it is, the number is its rank among the members.

    >>> find(np.array([1, 4]), np.array([4, 2]))
    (array([1, 1]), array([ True, False]))
    """
    below = np.searchsorted(members, wanted)
    found = below < len(members)
    found[found] = members[below[found]] == wanted[found]
    return below, found


def absent_at(members: Positions, ranks: Positions) -> NDArray[np.int64]:
    """The absent positions of some ranks among all absent ones: int64, shape of `ranks`.

    >>> absent_at(np.array([1, 2, 4]), np.array([0, 1, 3]))
    array([0, 3, 6])
    """
    num_absent_below = np.arange(len(members))
    np.subtract(members, num_absent_below, out=num_absent_below)
    absent: NDArray[np.int64] = ranks + np.searchsorted(num_absent_below, ranks, side="right")
    return absent
