"""How many clients fit on a GPU; the measuring itself is in tests/gpu."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fedprune.local.cohort import Member
from fedprune.local.cohort_memory import clients_that_fit, fitting_cohort
from sparsemodel.runtime.state import SparseState


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


def fitting(monkeypatch: pytest.MonkeyPatch, *, peak: int, at_most: int = 20) -> list[int]:
    """Sizes of cohorts tried, then the answer, on a GPU with 10,000 bytes of which 1,000 are used.

    A GPU is not at hand here, so its figures are given; the real one is in tests/gpu.
    """
    seen: list[int] = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9_000, 10_000))

    def train(cohort: Sequence[Member]) -> None:
        for member in cohort:
            assert member.growth is None
            assert len(member.images) == len(member.labels) == 9  # the largest batch of eight
        seen.append(len(cohort))
        if peak > 10_000:
            raise torch.OutOfMemoryError("no room")

    members = [
        Member(SparseState({}), np.zeros((n, 1, 2, 2)), np.zeros(n), 0, ({}, np.arange(2)))
        for n in (3, 40, 8)
    ]
    device = torch.device("cuda")
    size = fitting_cohort(train, members, batch_size=8, at_most=at_most, device=device)
    return [*seen, size]


def test_two_of_the_largest_member_tell_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take 2,400 bytes more than before, so six go into 7,200."""
    assert fitting(monkeypatch, peak=3_400) == [2, 6]
    assert fitting(monkeypatch, peak=3_400, at_most=4) == [2, 4]
    assert fitting(monkeypatch, peak=20_000) == [2, 1]
    assert fitting(monkeypatch, peak=3_400, at_most=1) == [1]
