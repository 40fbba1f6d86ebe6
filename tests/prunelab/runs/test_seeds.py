"""Seeds of independent streams."""

from __future__ import annotations

from prunelab.runs.seeds import stream_seed


def test_derived_seeds_do_not_collide() -> None:
    seeds = {stream_seed(a, b, c) for a in range(6) for b in range(20) for c in range(20)}
    assert len(seeds) == 6 * 20 * 20
    assert stream_seed(1, 2) != stream_seed(2, 1)
    assert stream_seed(1) != stream_seed(1, 0)
