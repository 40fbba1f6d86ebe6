"""Ranking metrics over all items, ties counted against the recommender."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datapruning.errors import ScoreError
from datapruning.recommend.ragged import Ragged

CUTOFFS = (5, 10, 20)


def target_ranks(scores: Tensor, targets: Ragged) -> Tensor:
    """The place of each target among all items, counted from 1.

    Items with the same score as a target come before it, unless they are targets themselves;
    what is not a number ranks as if it were above everything. Equal scores (and items that text
    cannot tell apart) therefore never look better than chance.

    Args:
        scores: [Q, num_items], high for recommended; item i is column i − 1.
        targets: [Q] rows of item numbers, no item twice in a row.

    Returns:
        int64, one rank for each of targets.values, on the device of scores.

    Raises:
        ScoreError: another number of rows, or an item that has no column.
    """
    if len(scores) != len(targets):
        raise ScoreError(f"{len(scores)} rows of scores for {len(targets)} rows of targets")
    values, owners = targets.values.to(scores.device), targets.owners.to(scores.device)
    if len(values) and not 1 <= int(values.min()) <= int(values.max()) <= scores.shape[1]:
        raise ScoreError(f"targets outside 1 to {scores.shape[1]}, the items that have a score")
    own = scores[owners, values - 1]
    if own.isnan().any():  # such a target is below everything, other items above
        own = own.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        scores = scores.index_put((owners, values - 1), own)
    not_below = torch.cat(
        [
            (~(scores[part_owners] < part[:, None])).sum(1)
            for part_owners, part in zip(owners.split(1024), own.split(1024), strict=True)
        ]
        or [owners]
    )
    # Targets of one row, best first: each has its predecessors and itself before the others.
    order = torch.argsort(own, descending=True, stable=True)
    order = order[torch.argsort(owners[order], stable=True)]
    starts = targets.starts[:-1].to(scores.device)
    place = torch.empty_like(owners)
    place[order] = torch.arange(len(owners), device=scores.device) - starts[owners[order]] + 1
    return not_below - _own_not_below(own, owners, order, place) + place


def ranking_metrics(
    ranks: Tensor, targets: Ragged, *, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, Tensor]:
    """Recall@K, NDCG@K and MRR of each user; their means are what papers report.

    Recall@K is the share of a user's targets among the first K; NDCG@K = Σ 1/log₂(rank + 1)
    over those, divided by what min(K, number of targets) targets at the top would give; MRR is
    1 / rank of the first target.

    Args:
        ranks: int64, one for each of targets.values, from 1.

    Returns:
        name, such as "recall@10" -> float64 [Q], in [0, 1].

    >>> found = ranking_metrics(torch.tensor([1, 11, 3]), Ragged.of([[7, 8], [9]]), cutoffs=[10])
    >>> found["recall@10"], found["mrr"]
    (tensor([0.5000, 1.0000], dtype=torch.float64), tensor([1.0000, 0.3333], dtype=torch.float64))
    """
    owners, lengths = targets.owners.to(ranks.device), targets.lengths.to(ranks.device)
    position = ranks.double()
    longest = max(1, int(lengths.max())) if len(lengths) else 1
    places = torch.arange(1, longest + 1, device=ranks.device, dtype=torch.float64)
    ideal = torch.cat([places.new_zeros(1), (1 / torch.log2(places + 1)).cumsum(0)])
    metrics = {}
    for k in cutoffs:
        hit = (position <= k).double()
        metrics[f"recall@{k}"] = _sums(hit, owners, len(targets)) / lengths
        gain = _sums(hit / torch.log2(position + 1), owners, len(targets))
        metrics[f"ndcg@{k}"] = gain / ideal[lengths.clamp(max=k)]
    best = position.new_zeros(len(targets))
    metrics["mrr"] = best.scatter_reduce(0, owners, 1 / position, "amax")
    return metrics


def _own_not_below(own: Tensor, owners: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """For each target: how many targets of its row, itself among them, are not below it."""
    keys = torch.stack([owners[order].double(), own[order].double()], dim=1)
    _, run, sizes = keys.unique_consecutive(dim=0, return_inverse=True, return_counts=True)
    count = torch.empty_like(place)
    count[order] = place[order][(sizes.cumsum(0) - 1)[run]]  # of equal ones the last one's place
    return count


def _sums(values: Tensor, owners: Tensor, num_rows: int) -> Tensor:
    return values.new_zeros(num_rows).index_add_(0, owners, values)
