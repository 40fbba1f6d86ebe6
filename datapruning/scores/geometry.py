"""Scores of where a sample lies among the others: near-duplicates, neighbourhoods, coverage.

Distances are computed block by block: no matrix of all samples by all samples is ever held.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from datapruning.errors import ScoreError
from datapruning.scores.prototypes import (
    checked_embeddings,
    clusters,
    rows_at_a_time,
    unit_embeddings,
)
from prunelab.runs.seeds import generator


def semdedup(embeddings: Tensor, *, num_clusters: int, seed: int) -> Tensor:
    """1 − the largest cosine similarity to a sample of the same cluster that goes before.

    The samples of a k-means cluster are put in order by falling distance to its centroid, as
    the paper keeps the outermost of a set of duplicates. Keeping the scores above ε is its
    method with threshold ε; an exact duplicate has 0, the first of each cluster 2.

    Source: Abbas et al., SemDeDup (2023), algorithm 1.
    Departs from it: no threshold; of equally distant samples the one in the lower row goes
    first.

    Args:
        embeddings: [N, D]; scaled to norm 1 here.
        num_clusters: duplicates are looked for inside a cluster only; time falls as 1 / clusters.
        seed: of k-means.

    Returns:
        float64 [N] in [0, 2], on the CPU.

    Raises:
        ScoreError: embeddings that are not finite, or fewer samples than clusters.
    """
    unit = unit_embeddings(embeddings)
    centroids, cluster = clusters(unit, num_clusters=num_clusters, seed=seed)
    cluster = cluster.to(unit.device)
    nearness = (unit * centroids[cluster]).sum(1)
    scores = torch.empty(len(unit), dtype=torch.float64, device=unit.device)
    for number in range(num_clusters):
        members = torch.nonzero(cluster == number).flatten()
        members = members[torch.argsort(nearness[members], stable=True)]
        scores[members] = 1 - _largest_similarity_before(unit[members])
    # Rounding may leave a duplicate's similarity a hair off 1.
    return torch.where(scores < 1e-15, 0.0, scores).cpu()


def _largest_similarity_before(unit: Tensor) -> Tensor:
    """Of each row the largest cosine similarity to a row above it; −1 for the first."""
    largest = []
    rows = torch.arange(len(unit), device=unit.device)
    for part in rows.split(rows_at_a_time(len(unit))):
        similarity = (unit[part] @ unit.T).clamp(-1, 1)
        similarity.masked_fill_(rows >= part[:, None], -1.0)
        largest.append(similarity.max(1).values)
    return torch.cat(largest) if largest else unit.new_zeros(0)


def d2(
    embeddings: Tensor,
    scores: Tensor,
    *,
    num_neighbors: int = 10,
    forward: float = 1.0,
    reverse: float = 1.0,
) -> Tensor:
    """N − place in the order in which D² pruning chooses: N for the first, 1 for the last.

    On the graph that joins each sample to its nearest ones (an edge where either is among the
    other's), a sample first gains its neighbours' scores, s_i + Σ_j exp(−γ_f d_ij²) s_j. Then
    repeatedly the highest is chosen and its neighbours lose exp(−γ_r d_ij²) times its score.
    Taking the K highest of the result is the method with budget K, for every K.

    Source: Maharana et al., D2 Pruning (ICLR 2024), sections 3.1 to 3.3.
    Departs from it: squared distances are divided by their mean over the graph's edges, so that
    γ has no unit; equal scores go by row.

    Args:
        embeddings: [N, D], used as they are.
        scores: [N], of difficulty, at least 0.
        num_neighbors: k of the graph, 1 to N − 1.
        forward, reverse: γ_f and γ_r; a larger γ is a weaker message.

    Returns:
        float64 [N], on the CPU.

    Raises:
        ScoreError: values that are not finite, negative scores, or arguments out of range.
    """
    points = checked_embeddings(embeddings)
    _check_d2(points, scores, num_neighbors, forward, reverse)
    first, second, squared = _neighbor_graph(points, num_neighbors)
    mean = squared.mean()
    squared = squared / mean if mean > 0 else squared
    start = scores.detach().double().to(points.device)
    gained = start.index_add(0, first, torch.exp(-forward * squared) * start[second])
    # Edges come sorted by their first end: those of a sample stand in one piece.
    ends = torch.bincount(first, minlength=len(points)).cumsum(0).tolist()
    edges = list(zip(second.tolist(), torch.exp(-reverse * squared).tolist(), strict=True))
    result = torch.empty(len(points), dtype=torch.float64)
    for place, row in enumerate(_chosen_in_order(gained.tolist(), ends, edges)):
        result[row] = len(points) - place
    return result


def _check_d2(
    points: Tensor, scores: Tensor, num_neighbors: int, forward: float, reverse: float
) -> None:
    if scores.shape != points.shape[:1]:
        raise ScoreError(f"{len(points)} embeddings but scores of shape {tuple(scores.shape)}")
    if not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise ScoreError("d2 passes scores on as messages: they must be finite and at least 0")
    if not 1 <= num_neighbors < len(points):
        raise ScoreError(f"num_neighbors = {num_neighbors}: expected 1 to {len(points) - 1}")
    if forward < 0 or reverse < 0:
        raise ScoreError(f"forward and reverse must be at least 0, got {forward} and {reverse}")


def _neighbor_graph(points: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both directions of every edge, (from, to, squared distance), sorted by `from`."""
    n = len(points)
    codes, squares = [], []
    for part in torch.arange(n, device=points.device).split(rows_at_a_time(n)):
        distance = torch.cdist(points[part], points)
        distance[torch.arange(len(part)), part] = torch.inf
        near = distance.topk(num_neighbors, largest=False)
        own = part[:, None].expand_as(near.indices)
        codes += [(own * n + near.indices).flatten(), (near.indices * n + own).flatten()]
        squares += [near.values.flatten().square()] * 2
    code, order = torch.cat(codes).sort(stable=True)
    keep = torch.ones_like(code, dtype=torch.bool)
    keep[1:] = code[1:] != code[:-1]
    return code[keep] // n, code[keep] % n, torch.cat(squares)[order][keep]


def _chosen_in_order(
    scores: list[float], ends: list[int], edges: list[tuple[int, float]]
) -> list[int]:
    """Rows in the order of their choice; `scores` is used up."""
    heap = [(-score, row) for row, score in enumerate(scores)]
    heapq.heapify(heap)
    chosen, done = [], [False] * len(scores)
    while heap:
        negative, row = heapq.heappop(heap)
        if done[row] or -negative != scores[row]:
            continue  # an entry from before the score changed
        done[row] = True
        chosen.append(row)
        for neighbor, weight in edges[ends[row - 1] if row else 0 : ends[row]]:
            if not done[neighbor]:
                scores[neighbor] -= weight * scores[row]
                heapq.heappush(heap, (-scores[neighbor], neighbor))
    return chosen


def k_center(embeddings: Tensor, *, seed: int, count: int | None = None) -> Tensor:
    """Farthest first: N for a random sample, N − 1 for the one farthest from it, and so on.

    Each next sample is the farthest from all before it, which covers the data with a radius at
    most twice the best possible one. Memory beside the embeddings is O(N); time O(count · N D).

    Source: Gonzalez, Clustering to minimize the maximum intercluster distance (1985); Sener and
    Savarese, Active Learning for Convolutional Neural Networks (ICLR 2018), algorithm 1.

    Args:
        embeddings: [N, D]; distances are Euclidean.
        seed: decides the first sample.
        count: after so many the rest are ranked by their distance to those; None: all go on.

    Returns:
        float64 [N], a permutation of 1 ... N, on the CPU; of equal distances the lower row first.

    Raises:
        ScoreError: embeddings that are not finite, or a count out of range.
    """
    points = checked_embeddings(embeddings)
    n = len(points)
    count = n if count is None else count
    if not 1 <= count <= n:
        raise ScoreError(f"count = {count}: expected 1 to {n}")
    row = int(torch.randint(n, (1,), generator=generator(seed)))
    nearest = torch.full((n,), torch.inf, dtype=torch.float64, device=points.device)
    result = torch.empty(n, dtype=torch.float64)
    for place in range(count):
        result[row] = n - place
        nearest = torch.minimum(nearest, _distances_to(points, points[row]))
        nearest[row] = -1.0  # chosen, and so farther from nothing
        row = int(nearest.argmax())
    rest = torch.argsort(nearest, descending=True, stable=True)[: n - count].cpu()
    result[rest] = torch.arange(n - count, 0, -1, dtype=torch.float64)
    return result


def _distances_to(points: Tensor, point: Tensor) -> Tensor:
    """[N]; without the product form of cdist, in which near samples lose their digits."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(points, point[None], compute_mode=mode).squeeze(1)
