"""The benchmark of a client's step on a GPU, run small on the CPU."""

from __future__ import annotations

import pytest

from benchmarks.gpu_step import PEER, rows, trainings


def test_every_way_has_a_row_beside_the_plain_loop() -> None:
    found = list(rows("resnet8", batch=8, samples=16, device="cpu", rounds=1))
    ways = [row.case.partition(", ")[2] for row in found]
    assert ways == ["captured float32", "captured bfloat16", "eager masked"]
    assert all(row.ours > 0 and row.peer > 0 and row.peer_name == PEER for row in found)


def test_all_ways_make_as_many_steps_and_learn() -> None:
    """The losses of a second training are below those of a first: each goes on from its own."""
    calls, steps = trainings("resnet8", batch=8, samples=16, device="cpu")
    assert steps == 4
    first = {name: float(call()) for name, call in calls.items()}  # type: ignore[arg-type]
    for name, call in calls.items():
        assert float(call()) < first[name]  # type: ignore[arg-type]
    assert first["captured float32"] / 16 == pytest.approx(first["eager masked"], rel=1e-3)
