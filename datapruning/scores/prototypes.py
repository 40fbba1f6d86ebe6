"""Distance to a prototype: the samples far from the centre of what resembles them are kept.

Source: Sorscher et al., Beyond neural scaling laws (NeurIPS 2022), section 5: k-means in a
self-supervised embedding (theirs is SwAV's), score = cosine distance to the nearest centroid.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional

from datapruning.errors import ScoreError
from datapruning.scores.kmeans import kmeans
from prunelab.runs.seeds import stream_seed

MINIBATCH_ABOVE = 100_000
"""Samples from which k-means looks at random batches instead of all samples in each step."""

_RESTARTS = 4
_ENTRIES = 2**22  # of the largest matrix of distances held at a time: 32 MB


def self_supervised(embeddings: Tensor, *, num_clusters: int, seed: int) -> Tensor:
    """1 − cosine similarity to the nearest of `num_clusters` centroids, float64 [N] in [0, 2].

    K-means (scikit-learn's, k-means++ starts, the best of four; mini-batches above
    MINIBATCH_ABOVE samples; of embeddings on a GPU `kmeans`, there) runs on embeddings scaled to
    norm 1. An embedding of zeros has
    distance 1. The paper finds the number of clusters to matter little, from a tenth of the
    number of classes to ten times it.

    Args:
        embeddings: [N, D], any floating dtype and device.
        num_clusters: by habit the number of classes.
        seed: decides the starts.

    Raises:
        ScoreError: embeddings that are not finite, or fewer samples than clusters.

    >>> x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    >>> self_supervised(x, num_clusters=2, seed=0)
    tensor([0., 0., 0., 0.], dtype=torch.float64)
    """
    unit = unit_embeddings(embeddings)
    centroids, _ = clusters(unit, num_clusters=num_clusters, seed=seed)
    return _distance_to_nearest(unit, centroids)


def supervised(embeddings: Tensor, labels: Tensor) -> Tensor:
    """1 − cosine similarity to the mean of the sample's own class, float64 [N] in [0, 2].

    The means are of embeddings scaled to norm 1; an embedding of zeros has distance 1.
    Departs from the paper, which does not name the distance for class means: cosine, as for
    centroids.

    Args:
        embeddings: [N, D], of a model that was trained on the labels.
        labels: int64 [N].

    Raises:
        ScoreError: embeddings that are not finite, or another number of labels.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    >>> supervised(x, torch.tensor([0, 0, 1]))
    tensor([0.2929, 0.2929, 0.0000], dtype=torch.float64)
    """
    unit = unit_embeddings(embeddings)
    if labels.shape != unit.shape[:1]:
        raise ScoreError(f"{len(unit)} embeddings but labels of shape {tuple(labels.shape)}")
    classes, own = labels.to(unit.device).unique(return_inverse=True)
    means = unit.new_zeros(len(classes), unit.shape[1]).index_add_(0, own, unit)
    return _distance((unit * functional.normalize(means, dim=1)[own]).sum(1)).cpu()


def clusters(unit: Tensor, *, num_clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centroids of k-means, scaled to norm 1, [K, D], and the cluster of each sample, int64 [N].

    Both on the device of `unit`.

    Raises:
        ScoreError: fewer samples than clusters.
    """
    if not 1 <= num_clusters <= len(unit):
        raise ScoreError(
            f"{num_clusters} clusters of {len(unit)} samples; expected 1 to {len(unit)}"
        )
    if unit.device.type == "cpu":
        centroids, labels = _of_scikit_learn(unit, num_clusters, seed)
    else:
        centroids, labels = kmeans(unit, num_clusters=num_clusters, seed=seed, restarts=_RESTARTS)
    return functional.normalize(centroids, dim=1), labels


def _of_scikit_learn(unit: Tensor, num_clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.cluster import KMeans, MiniBatchKMeans  # noqa: PLC0415
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415

    kind = MiniBatchKMeans if len(unit) > MINIBATCH_ABOVE else KMeans
    means = kind(num_clusters, n_init=_RESTARTS, random_state=stream_seed(seed) % 2**32)
    with warnings.catch_warnings():
        # Fewer different samples than clusters: some clusters stay empty, and no score changes.
        warnings.simplefilter("ignore", ConvergenceWarning)
        means.fit(unit.numpy())
    return torch.from_numpy(means.cluster_centers_).to(unit), torch.from_numpy(means.labels_).long()


def unit_embeddings(embeddings: Tensor) -> Tensor:
    """Embeddings scaled to norm 1, float64 [N, D]; zeros stay zeros.

    Raises:
        ScoreError: not two dimensions, no sample, or values that are not finite.
    """
    return functional.normalize(checked_embeddings(embeddings), dim=1)


def checked_embeddings(embeddings: Tensor) -> Tensor:
    """Embeddings as float64 [N, D], detached.

    Raises:
        ScoreError: not two dimensions, no sample, or values that are not finite.
    """
    if embeddings.dim() != 2 or len(embeddings) == 0:
        raise ScoreError(f"expected embeddings [N, D], got shape {tuple(embeddings.shape)}")
    wrong = ~torch.isfinite(embeddings).all(1)
    if wrong.any():
        raise ScoreError(
            f"{int(wrong.sum())} of {len(embeddings)} embeddings hold NaN or infinite values, the "
            f"first in row {int(wrong.nonzero()[0])}; has the embedding model diverged?"
        )
    return embeddings.detach().double()


def rows_at_a_time(num_columns: int) -> int:
    """Rows of a block of distances to `num_columns` samples: never a matrix of all to all."""
    return max(1, _ENTRIES // max(1, num_columns))


def _distance_to_nearest(unit: Tensor, centroids: Tensor) -> Tensor:
    parts = [
        _distance((part @ centroids.T).max(1).values)
        for part in unit.split(rows_at_a_time(len(centroids)))
    ]
    return torch.cat(parts).cpu()


def _distance(cosine: Tensor) -> Tensor:
    """Rounding may carry a cosine past 1; and 1e-16 is no distance."""
    distance = 1 - cosine.clamp(-1, 1)
    return torch.where(distance < 1e-15, 0.0, distance)
