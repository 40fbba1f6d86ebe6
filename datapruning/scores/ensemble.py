"""Scores of an ensemble: independently trained models that judge the same samples."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from datapruning.errors import ScoreError


def ddd(correct: Tensor) -> Tensor:
    """Share of independently trained models that get a sample wrong, in [0, 1]; high is hard.

    Source: Meding et al., Trivial or Impossible: Dichotomous Data Difficulty Masks Model
    Differences (ICLR 2022), as used by Sorscher et al. (NeurIPS 2022).

    Args:
        correct: bool [M, N], M models by N samples.

    Returns:
        float64 [N].

    Raises:
        ScoreError: no model, or another dtype.

    >>> ddd(torch.tensor([[True, False], [True, False], [False, False], [True, True]]))
    tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    if correct.dtype != torch.bool or correct.dim() != 2 or not len(correct):
        raise ScoreError(
            f"correct must be bool [models, samples] of one model or more, got {correct.dtype} "
            f"{tuple(correct.shape)}"
        )
    return (~correct).double().mean(0).cpu()


def disagreement(probabilities: Tensor | Iterable[Tensor]) -> Tensor:
    """Mutual information of prediction and model: H(mean_m p_m) − mean_m H(p_m), in nats.

    High where each model is sure but they contradict each other; 0 where all say the same,
    however unsure. At most log(min(M, C)).
    Source: Houlsby et al., Bayesian Active Learning for Classification and Preference Learning
    (2011), equation 2, over a deep ensemble as in Chitta et al., Training Data Subset Search
    with Ensemble Active Learning (2021).

    Args:
        probabilities: [M, N, C], or M tensors [N, C] one after the other, so that only one model's
            predictions need exist; after softmax, M >= 2.

    Returns:
        float64 [N].

    Raises:
        ScoreError: fewer than two models, shapes that differ, or rows that do not sum to 1.

    >>> sure = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> disagreement(sure)  # log 2
    tensor([0.6931], dtype=torch.float64)
    """
    mean: Tensor | None = None
    entropies, num_models = torch.zeros(()), 0
    for model in probabilities:
        p = model.detach().double()
        if p.dim() != 2 or (mean is not None and p.shape != mean.shape):
            raise ScoreError(f"expected probabilities [N, C] of each model, got {tuple(p.shape)}")
        if not torch.allclose(p.sum(1), torch.ones_like(p[:, 0]), atol=1e-3):
            raise ScoreError("probabilities of a sample must sum to 1; apply softmax to logits")
        mean = p if mean is None else mean + p
        entropies = entropies.to(p.device) + torch.special.entr(p).sum(1)
        num_models += 1
    if mean is None or num_models < 2:
        raise ScoreError(f"disagreement needs two models or more, got {num_models}")
    total = torch.special.entr(mean / num_models).sum(1)
    information: Tensor = total - entropies / num_models
    return information.clamp(min=0).cpu()
