"""The overall score, and the selection with the published budgets."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from datapruning.errors import ScoreError, SelectionError
from datapruning.recommend.overall import minmax, overall, overall_table, select_covering
from datapruning.selection.table import ScoreTable


def table(scores: torch.Tensor, method: str = "dealrec-influence") -> ScoreTable:
    ids = torch.arange(10, 10 + len(scores))
    return ScoreTable(ids, scores.double(), method, "made", "f" * 16, seed=0)


def test_overall_by_hand() -> None:
    """minmax: (0, 1, .25) and (1, 0, .5); with λ = .3: .3, 1, .4."""
    found = overall(torch.tensor([-2.0, 2.0, -1.0]), torch.tensor([9.0, 5.0, 7.0]), weight=0.3)
    torch.testing.assert_close(found, torch.tensor([0.3, 1.0, 0.4], dtype=torch.float64))


def test_equal_scores_rank_nothing_and_are_named() -> None:
    equal, other = table(torch.full((4,), 3.0)), table(torch.arange(4.0), "dealrec-effort")
    found = overall_table(equal, other)
    assert found.scores.isfinite().all()
    torch.testing.assert_close(found.scores, 0.3 * minmax(other.scores))
    assert found.provenance["equal"] == ["dealrec-influence"]


def test_scores_that_are_not_finite_or_of_other_samples_are_refused() -> None:
    with pytest.raises(ScoreError, match="1 of 2 scores are NaN"):
        minmax(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ScoreError, match=r"from -1e\+308 to 1e\+308, and float64 has no such"):
        minmax(torch.tensor([-1e308, 0.0, 1e308], dtype=torch.float64))
    with pytest.raises(ScoreError, match="3 scores of influence, 2 of effort"):
        overall(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ScoreError, match="at least 0"):
        overall(torch.zeros(2), torch.zeros(2), weight=-1.0)
    other = dataclasses.replace(table(torch.arange(4.0)), fingerprint="0" * 16)
    with pytest.raises(ScoreError, match="score the same samples"):
        overall_table(table(torch.arange(4.0)), other)


def test_budgets_by_hand() -> None:
    """25 of groups of 9, 0, 5, 1, 8 and 2 samples, 14 to keep: 4, 0, 3, 1, 4, 2 of them.

    A tenth of 28, the two highest, is dropped first and would have widened the range.
    """
    groups = [9, 0, 5, 1, 8, 2]
    scores = [group + (place + 0.5) / 20 for group, n in enumerate(groups) for place in range(n)]
    scores[0], scores[-1] = 0.0, 6.0  # the range
    scores += [50.0, 60.0]
    found = select_covering(table(torch.tensor(scores)), keep=14, num_groups=6, cut=0.08)
    kept = torch.tensor(scores)[found.ids - 10]
    counts = torch.histc(kept.clamp(max=5.99), bins=6, min=0, max=6)
    assert counts.tolist() == [4, 0, 3, 1, 4, 2]
    assert len(found) == 14
    assert float(kept.max()) == 6.0


def test_published_budgets_are_the_defaults() -> None:
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    subset = select_covering(table(scores), seed=1)
    assert len(subset) == 1024
    assert subset.provenance["options"] == {"num_groups": 50, "cut": 0.1}
    dropped = set((scores.argsort(descending=True)[:500] + 10).tolist())
    assert not dropped & set(subset.ids.tolist())
    with pytest.raises(SelectionError, match="expected 1 to 900"):
        select_covering(table(torch.rand(900)))
