"""DEALRec's overall score, and the samples it keeps.

Source: Lin et al., Data-efficient Fine-tuning for LLM-based Recommendation (SIGIR 2024),
section 3.3 and algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datapruning.errors import ScoreError
from datapruning.selection.select import select
from datapruning.selection.table import ScoreTable, Subset

WEIGHT = 0.3
"""λ for Games; the paper has 1.0 for Book and MicroLens."""

KEEP, NUM_GROUPS, CUT = 1024, 50, 0.1


def minmax(scores: Tensor) -> Tensor:
    """Scores on [0, 1], float64; all 0 where they are equal, since they then rank nothing.

    Raises:
        ScoreError: a score that is not finite.

    >>> minmax(torch.tensor([2.0, 4.0, 3.0]))
    tensor([0.0000, 1.0000, 0.5000], dtype=torch.float64)
    >>> minmax(torch.tensor([7.0, 7.0]))
    tensor([0., 0.], dtype=torch.float64)
    """
    scores = scores.double()
    wrong = int((~scores.isfinite()).sum())
    if wrong:
        raise ScoreError(f"{wrong} of {len(scores)} scores are NaN or infinite; score them again")
    low, high = scores.min(), scores.max()
    if not (high - low).isfinite():
        raise ScoreError(
            f"scores run from {float(low):g} to {float(high):g}, and float64 has no such "
            "difference; score them again"
        )
    return torch.zeros_like(scores) if low == high else (scores - low) / (high - low)


def overall(influence: Tensor, effort: Tensor, *, weight: float = WEIGHT) -> Tensor:
    """minmax(influence) + λ · minmax(effort), float64 [N].

    Raises:
        ScoreError: other lengths, a score that is not finite, or a weight below 0.
    """
    if influence.shape != effort.shape:
        raise ScoreError(f"{len(influence)} scores of influence, {len(effort)} of effort")
    if not weight >= 0:
        raise ScoreError(f"the weight of effort must be at least 0, got {weight}")
    return minmax(influence) + weight * minmax(effort)


def overall_table(
    influence: ScoreTable, effort: ScoreTable, *, weight: float = WEIGHT
) -> ScoreTable:
    """The overall scores of two tables over the same samples.

    Raises:
        ScoreError: tables of other samples, or as `overall`.
    """
    if influence.fingerprint != effort.fingerprint or not torch.equal(influence.ids, effort.ids):
        raise ScoreError(
            f"influence is of {influence.dataset} (fingerprint {influence.fingerprint}), effort of "
            f"{effort.dataset} ({effort.fingerprint}); score the same samples"
        )
    provenance = {
        "weight": weight,
        "influence": influence.provenance,
        "effort": effort.provenance,
        "equal": [
            table.method
            for table in (influence, effort)
            if bool((table.scores == table.scores[0]).all())
        ],
    }
    return ScoreTable(
        ids=influence.ids,
        scores=overall(influence.scores, effort.scores, weight=weight),
        method="dealrec",
        dataset=influence.dataset,
        fingerprint=influence.fingerprint,
        seed=influence.seed,
        model=effort.model,
        provenance=provenance,
    )


def select_covering(
    table: ScoreTable,
    *,
    keep: float | int = KEEP,
    seed: int = 0,
    num_groups: int = NUM_GROUPS,
    cut: float = CUT,
) -> Subset:
    """Coverage-enhanced selection with the published budgets: `select(policy="coverage")`.

    The highest tenth is dropped, the range of the other scores is split into 50 groups of equal
    width, and small groups give first.

    Raises:
        SelectionError: as `select`.
    """
    return select(table, keep=keep, policy="coverage", seed=seed, num_groups=num_groups, cut=cut)
