"""K-means where the points are: on a GPU, where scikit-learn's would leave it waiting.

Source: Lloyd, Least Squares Quantization in PCM (1982); starts by Arthur and Vassilvitskii,
k-means++ (SODA 2007), in its greedy form: of a few candidates the best one is taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunelab.runs.seeds import generator

MAX_STEPS = 300
TOLERANCE = 1e-4
"""Movement of all centroids, squared, at which a run ends, in the mean variance of a dimension."""

_ENTRIES = 2**22  # of the largest matrix of points by clusters held at a time


def kmeans(points: Tensor, *, num_clusters: int, seed: int, restarts: int) -> tuple[Tensor, Tensor]:
    """Centroids [K, D] and the cluster of each point, int64 [N], of the best of some restarts.

    The host waits once in a step. Steps, tolerance and starts are of scikit-learn's kind, its
    random numbers are not. Departs from it: a cluster that loses all its points stays where it is.

    Args:
        points: float64 [N, D], N >= num_clusters.
        seed: decides the starts; drawn on the CPU, so that all devices have the same.
        restarts: runs from other starts, of which that with the least `inertia` counts.
    """
    best: tuple[float, Tensor, Tensor] | None = None
    for restart in range(restarts):
        uniform = _drawn(num_clusters, seed, restart).to(points.device)
        centroids, labels, inertia = settled(points, greedy_starts(points, uniform))
        if best is None or inertia < best[0]:
            best = inertia, centroids, labels
    assert best is not None, "one restart or more"
    return best[1], best[2]


def settled(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, float]:
    """Lloyd's steps from some centroids until no point changes its cluster or little moves.

    Returns:
        Centroids [K, D], the nearest of each point, int64 [N], and the sum of squared distances.
    """
    goal = TOLERANCE * points.var(0, correction=0).mean()
    labels = torch.full((len(points),), -1, device=points.device)
    for _ in range(MAX_STEPS):
        before, (labels, _) = labels, _nearest(points, centroids)
        means = _means(points, labels, centroids)
        moved, centroids = (means - centroids).square().sum(), means
        if bool((labels == before).all() | (moved <= goal)):
            break
    labels, squared = _nearest(points, centroids)
    return centroids, labels, float(squared.sum())


def greedy_starts(points: Tensor, uniform: Tensor) -> Tensor:
    """Points far from each other, [K, D].

    Each next one is drawn with a probability by its squared distance to those before it, as often
    as there are candidates, and the draw that leaves the least sum of squared distances is kept.

    Args:
        uniform: [K, candidates] in [0, 1), what is drawn with; of the first row one counts.
    """
    first = (uniform[0, :1] * len(points)).long()
    chosen = [points.index_select(0, first)]
    nearest = _squared(points, chosen[0])[:, 0]
    for row in uniform[1:]:
        places = torch.searchsorted(nearest.cumsum(0), row * nearest.sum())
        candidates = points.index_select(0, places.clamp(max=len(points) - 1))
        left = torch.minimum(_squared(points, candidates), nearest[:, None])
        best = left.sum(0).argmin()[None]
        chosen.append(candidates.index_select(0, best))
        nearest = left.index_select(1, best)[:, 0]
    return torch.cat(chosen)


def _drawn(num_clusters: int, seed: int, restart: int) -> Tensor:
    candidates = 2 + int(math.log(num_clusters))
    random = generator(seed, restart)
    return torch.rand(num_clusters, candidates, dtype=torch.float64, generator=random)


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each point, of equally near ones the first, and its squared distance.

    A block of points at a time.
    """
    found = [
        _squared(part, centroids).min(1)
        for part in points.split(max(1, _ENTRIES // len(centroids)))
    ]
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


def _means(points: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Mean of each cluster, [K, D]; a product with one-hot rows, which adds in one order."""
    counts, sums = torch.zeros_like(centroids[:, :1]), torch.zeros_like(centroids)
    height = max(1, _ENTRIES // len(centroids))
    numbers = torch.arange(len(centroids), device=points.device)
    for part, own in zip(points.split(height), labels.split(height), strict=True):
        members = (own[:, None] == numbers).to(points.dtype)
        sums.addmm_(members.T, part)
        counts.add_(members.sum(0)[:, None])
    return torch.where(counts > 0, sums / counts.clamp(min=1), centroids)


def _squared(points: Tensor, others: Tensor) -> Tensor:
    """Squared distances, [N, K], at least 0; by products, as fits points of about norm 1."""
    lengths = torch.linalg.vector_norm(points, dim=1, keepdim=True).square()
    found = torch.addmm(lengths, points, others.T, alpha=-2)
    return found.add_(others.square().sum(1)).clamp_(min=0)
