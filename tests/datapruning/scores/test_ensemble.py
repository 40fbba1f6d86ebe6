"""Scores of ensembles: share of wrong models, mutual information of prediction and model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datapruning.errors import ScoreError
from datapruning.scores.ensemble import ddd, disagreement


def test_ddd_is_the_share_of_wrong_models() -> None:
    correct = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0]]).bool()
    assert ddd(correct).tolist() == pytest.approx([0, 0.4, 1])
    with pytest.raises(ScoreError, match=r"bool \[models, samples\]"):
        ddd(correct.float())


def test_disagreement_by_hand() -> None:
    """Two models, three samples: sure and opposed gives log 2; unsure alike gives 0; (1, 0) and
    (.5, .5) gives H(.75, .25) − log(2) / 2 = .5623 − .3466 = .2158."""
    first = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    second = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - math.log(2) / 2
    expected = torch.tensor([math.log(2), 0.0, mixed]).double()
    torch.testing.assert_close(disagreement(torch.stack([first, second])), expected)
    assert torch.equal(disagreement(iter([first, second])), disagreement([first, second]))


@given(st.integers(2, 6), st.integers(2, 5), st.integers(0, 100))
def test_disagreement_is_bounded_and_symmetric(models: int, classes: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    p = (5 * torch.randn(models, 7, classes, generator=random)).softmax(2)
    found = disagreement(p)
    assert bool((found >= 0).all())
    assert bool((found <= math.log(min(models, classes)) + 1e-6).all())
    torch.testing.assert_close(found, disagreement(p.flip(0)))
    torch.testing.assert_close(found, disagreement(p.flip(2)))
    mean = p.double().mean(0)
    divergence = (p.double() * (p.double() / mean).log()).nan_to_num(0).sum(2).mean(0)
    torch.testing.assert_close(found, divergence, atol=1e-6, rtol=1e-5)


def test_disagreement_refusals() -> None:
    p = torch.full((2, 3, 4), 0.25)
    with pytest.raises(ScoreError, match="two models or more, got 1"):
        disagreement(p[:1])
    with pytest.raises(ScoreError, match="apply softmax to logits"):
        disagreement(4 * p)
    with pytest.raises(ScoreError, match=r"expected probabilities \[N, C\] of each model"):
        disagreement([p[0], p[1, :2]])
