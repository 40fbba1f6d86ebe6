"""Where a mask moves: one adjustment by hand, and a short run whose sums can be checked."""

from __future__ import annotations

import numpy as np
import pytest

from simulations.growth_places import Move, Watched, move, result_row, run_one
from sparsemodel.runtime.pattern import Pattern


def pattern(*positions: int) -> Pattern:
    return Pattern.from_positions((4, 3), np.array(positions))


def test_a_move_by_hand() -> None:
    """Outputs of 3 weights: 0 and 1 have some, 2 and 3 none. One grows at 2, one at 1; 0 dies."""
    found = move(pattern(0, 1, 3), pattern(3, 4, 8))
    assert found == Move(1, 4, 2, grown=2, grown_silent=1, mostly_silent=0, silenced=1)
    assert move(pattern(0, 3), pattern(0, 6)).mostly_silent == 1
    assert found + found == Move(2, 8, 4, 4, 2, 0, 2)


def test_a_row_has_shares_and_none_where_nothing_grew() -> None:
    grown = Move(layers=2, outputs=40, silent=10, grown=8, grown_silent=6, mostly_silent=1)
    assert result_row(0.01, "some", grown) == ["0.01", "some", "2", "25.0", "8", "75.0", "1", "0"]
    assert result_row(0.1, "none", Move(1, 4))[5] == ""


@pytest.mark.slow
def test_a_run_is_watched_whole() -> None:
    settings = {
        "data.dataset": "digits", "data.num_train": 200, "data.clients": 3,
        "model.name": "resnet8", "training.rounds": 4, "seed": 3,
    }  # fmt: skip
    method = Watched(density=0.01, pool_size=1, adjust_every=1, adjust_until=5)
    first, again = run_one(settings, method), run_one(settings, method)
    assert first == again
    some, none = Move(**first["some"]), Move(**first["none"])
    assert some.layers + none.layers > 4
    assert some.silent > 0
    assert none.silent == none.grown_silent == 0
    assert some.grown_silent > 0
