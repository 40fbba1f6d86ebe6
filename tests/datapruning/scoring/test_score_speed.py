"""The benchmark of scores runs its own check of every side before it times them."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from benchmarks import score_speed


def test_rows_of_a_small_batch() -> None:
    with torch.random.fork_rng():
        found = list(
            score_speed.rows(["resnet8"], 4, rounds=1, clock=time.process_time, quick=False)
        )
    peers = {(row.case, row.peer_name) for row in found}
    assert peers == {
        ("EL2N, resnet8 b4", "forward pass"),
        ("GraNd, resnet8 b4", "vmap, chunks of 4"),
        ("GraNd, resnet8 b4", "batches of one"),
        ("GraNd, resnet8 b4", "one training step"),
        ("products, resnet8 b4", "batches of one"),
    }
    assert all(row.ours > 0 and row.peer > 0 for row in found)


def test_a_side_that_computes_something_else_is_refused() -> None:
    with torch.random.fork_rng():
        of = score_speed.subject("resnet8", 2)
    ours = score_speed.looped(of).double()
    score_speed.compare("a case", ours.float(), ours)
    with pytest.raises(RuntimeError, match=r"a case: off by 1\.0e-0"):
        score_speed.compare("a case", ours * 1.1, ours)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_a_batch() -> None:
    """16 images of 32×32 through resnet8: more than the logits, less than a gigabyte."""
    assert 1 < score_speed._peak("ours", "resnet8", 16) < 1024
