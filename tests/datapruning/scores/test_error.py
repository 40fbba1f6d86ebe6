"""EL2N, loss, margin and entropy by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datapruning.errors import ScoreError
from datapruning.scores.error import el2n, entropy, loss, margin

# Softmax of these is (1/2, 1/4, 1/4) and (1/10, 8/10, 1/10).
LOGITS = torch.tensor([[2.0, 1.0, 1.0], [1.0, 8.0, 1.0]]).log()
LABELS = torch.tensor([0, 2])


def test_el2n_by_hand() -> None:
    """(−1/2, 1/4, 1/4) has length √(3/8); (1/10, 8/10, −9/10) has √(146/100). Not squared."""
    assert el2n(LOGITS, LABELS).tolist() == pytest.approx([math.sqrt(3 / 8), math.sqrt(1.46)])


def test_loss_margin_and_entropy_by_hand() -> None:
    assert loss(LOGITS, LABELS).tolist() == pytest.approx([math.log(2), math.log(10)])
    assert margin(LOGITS, LABELS).tolist() == pytest.approx([1 / 4 - 1 / 2, 0.8 - 0.1])
    expected = [1.5 * math.log(2), 0.2 * math.log(10) - 0.8 * math.log(0.8)]
    assert entropy(LOGITS).tolist() == pytest.approx(expected)


def test_high_is_hard_for_every_score() -> None:
    """A wrong, an unsure and a sure prediction, in this order."""
    logits, labels = torch.tensor([[5.0, 0.0], [0.1, 0.0], [0.0, 5.0]]), torch.tensor([1, 1, 1])
    for score in (el2n, loss, margin):
        wrong, unsure, sure = score(logits, labels).tolist()
        assert wrong > unsure > sure


@given(st.lists(st.floats(-800, 800), min_size=2, max_size=6), st.integers(0, 5))
def test_bounds_at_any_logits(row: list[float], label: int) -> None:
    """Also where probabilities underflow: no NaN, and in range."""
    logits, labels = torch.tensor([row]), torch.tensor([label % len(row)])
    assert 0 <= float(el2n(logits, labels)) <= math.sqrt(2) + 1e-12
    assert -1 <= float(margin(logits, labels)) <= 1
    assert -1e-12 <= float(entropy(logits)) <= math.log(len(row)) + 1e-12
    assert float(loss(logits, labels)) >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_float64_on_the_cpu_without_touching_the_input(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype).requires_grad_()
    before = logits.detach().clone()
    for scores in (el2n(logits, LABELS), margin(logits, LABELS), entropy(logits)):
        assert scores.dtype == torch.float64
        assert not scores.requires_grad
    assert torch.equal(logits, before)


def test_refusals() -> None:
    with pytest.raises(ScoreError, match=r"labels lie in 0 \.\.\. 3, but the model has 3 classes"):
        el2n(LOGITS, torch.tensor([0, 3]))
    with pytest.raises(ScoreError, match="one whole-number label for each of 2 rows"):
        loss(LOGITS, torch.tensor([0]))
    with pytest.raises(ScoreError, match="one whole-number label"):
        loss(LOGITS, torch.tensor([0.0, 1.0]))
    with pytest.raises(ScoreError, match=r"of 1 of 2 samples are not finite \(first: row 1"):
        entropy(torch.tensor([[0.0, 1.0], [math.nan, 0.0]]))
    with pytest.raises(ScoreError, match=r"expected logits \[B, classes\]"):
        entropy(torch.zeros(3))
    with pytest.raises(ScoreError, match="two classes or more"):
        margin(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
