"""Seeds of independent streams."""

from __future__ import annotations

import torch

from prunelab.runs.seeds import generator, rng, stream_seed


def test_derived_seeds_do_not_collide() -> None:
    seeds = {stream_seed(a, b, c) for a in range(6) for b in range(20) for c in range(20)}
    assert len(seeds) == 6 * 20 * 20
    assert stream_seed(1, 2) != stream_seed(2, 1)
    assert stream_seed(1) != stream_seed(1, 0)


def test_streams_of_numpy_and_torch_follow_from_the_parts() -> None:
    assert rng(7, 1).random(5).tolist() == rng(7, 1).random(5).tolist()
    assert rng(7, 1).random(5).tolist() != rng(1, 7).random(5).tolist()
    drawn = [torch.rand(5, generator=generator(*parts)) for parts in ((7, 1), (7, 1), (1, 7))]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_order_of_samples_stays_what_it_was() -> None:
    """A model trained by an older release can be trained again to the same bits."""
    assert rng(0).permutation(8).tolist() == [2, 3, 1, 6, 5, 7, 4, 0]
    assert rng(7, 3).integers(0, 9, 8).tolist() == [4, 3, 5, 6, 3, 3, 3, 1]
