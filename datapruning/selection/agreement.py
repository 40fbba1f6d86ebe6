"""How far two tables of scores agree: in rank, and in what they would keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datapruning.errors import ScoreError
from datapruning.selection.table import ScoreTable
from prunelab.runs.seeds import generator

KEEPS = (0.1, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Agreement:
    """Two scores of the same samples, compared.

    Attributes:
        num_samples: with a score in both tables.
        num_missing: with NaN in one of them; left out.
        spearman: rank correlation in [−1, 1]; NaN where a score is constant.
        overlap: kept fraction -> share of the kept samples that both keep, hardest first. Two
            unrelated scores share as much as the kept fraction.
    """

    num_samples: int
    num_missing: int
    spearman: float
    overlap: dict[float, float]


def agreement(
    a: ScoreTable, b: ScoreTable, *, keeps: Sequence[float] = KEEPS, seed: int = 0
) -> Agreement:
    """Compare two tables by sample id, whatever their order.

    Equal scores have their mean rank. What is kept of equal ones is drawn by the seed, alike
    for both tables, as a selection with that seed would.

    Raises:
        ScoreError: tables of different data or samples, without a single score in common, or a
            kept fraction outside (0, 1].
    """
    x, y = common_scores(a, b)
    if not len(x):
        raise ScoreError(f"none of {len(a)} samples has a score in both tables")
    draw = torch.randperm(len(x), generator=generator(seed))
    return Agreement(
        num_samples=len(x),
        num_missing=len(a) - len(x),
        spearman=spearman(x, y),
        overlap={keep: _overlap(x[draw], y[draw], keep) for keep in keeps},
    )


def common_scores(a: ScoreTable, b: ScoreTable) -> tuple[Tensor, Tensor]:
    """The scores of the samples that have one in both tables, float64 [K] each, by rising id.

    Raises:
        ScoreError: tables of different data or samples.
    """
    x, y = _aligned(a, b)
    known = ~(x.isnan() | y.isnan())
    return x[known], y[known]


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of two vectors, mean ranks for ties; NaN where one is constant or holds NaN.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0]))
    0.5
    """
    from scipy.stats import spearmanr  # noqa: PLC0415

    if any(len(values) < 2 or bool((values == values[0]).all()) for values in (x, y)):
        return math.nan
    return float(spearmanr(x.numpy(), y.numpy()).statistic)


def _aligned(a: ScoreTable, b: ScoreTable) -> tuple[Tensor, Tensor]:
    if a.fingerprint != b.fingerprint:
        raise ScoreError(
            f"the tables are of different data: {a.dataset} ({a.fingerprint}) and {b.dataset} "
            f"({b.fingerprint}); score the same data twice"
        )
    order_a, order_b = a.ids.argsort(), b.ids.argsort()
    if not torch.equal(a.ids[order_a], b.ids[order_b]):
        raise ScoreError(
            f"the tables hold different samples ({len(a)} and {len(b)}); score all of them in both"
        )
    return a.scores[order_a].double(), b.scores[order_b].double()


def _overlap(x: Tensor, y: Tensor, keep: float) -> float:
    if not 0 < keep <= 1:
        raise ScoreError(f"a kept fraction must be in (0, 1], got {keep}")
    count = max(1, round(keep * len(x)))
    kept = [torch.argsort(v, descending=True, stable=True)[:count] for v in (x, y)]
    return int(torch.isin(kept[0], kept[1]).sum()) / count
