"""The fleet that fails: what its schedule says, and a small one to its end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from simulations.faults import BLOCK, FAULTS, schedule
from simulations.faulty_fleet import ROWS, SETTINGS
from simulations.faulty_grid import SERVER_KILLS, run_fleet

KINDS = list(FAULTS)


def test_a_schedule_deals_every_fault_as_often_to_everybody() -> None:
    plan = schedule(3, num_clients=10, rounds=200, share=0.3, kinds=KINDS)
    assert plan == schedule(3, num_clients=10, rounds=200, share=0.3, kinds=KINDS)
    assert plan != schedule(4, num_clients=10, rounds=200, share=0.3, kinds=KINDS)
    assert len(plan) == 201
    assert all(len(faults) == 3 for faults in plan)
    dealt = Counter(kind for faults in plan for kind in faults.values())
    assert set(dealt) == set(FAULTS)
    assert max(dealt.values()) - min(dealt.values()) <= 1
    assert {who for faults in plan for who in faults} == set(range(10))
    for begin in range(1, 200, BLOCK):
        assert len({tuple(faults) for faults in plan[begin : begin + BLOCK]}) == 1


@pytest.mark.slow
def test_a_small_fleet_ends() -> None:
    """Every fault once at least, and a server that is killed."""
    little: dict[str, Any] = {
        **SETTINGS,
        "data.num_train": 200,
        "data.num_test": 50,
        "model.width": 4,
        "training.rounds": 8,
        "federation.aggregation": "multi-krum",
        "method.pool_size": 2,
    }
    found = run_fleet(little, share=0.3)
    assert found["aborted"] == ""
    assert found["rounds"] == 8
    assert found["server_killed"] == SERVER_KILLS
    assert found["left_out"] > 8
    assert 50 < found["answers"] < 80


def test_a_row_each_for_no_faults_and_every_aggregation() -> None:
    assert [share > 0 for _, share in ROWS.values()] == [False, *[True] * 5]
    assert {kind for kind, share in ROWS.values() if share} == {
        "mean", "multi-krum", "trimmed-mean", "clipped", "median"
    }  # fmt: skip
