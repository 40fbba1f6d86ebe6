"""Sparse proxies: score samples with a model that trains a few of its weights.

The proxy is pruned before training, on training samples alone, and trains and predicts on the
sparse kernels: its scores cost a part of a dense model's. How far they agree with those is a
matter of measurement: `agreement.agreement`, `python -m benchmarks.proxy_scores`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from prunelab.data.samples import Samples
from prunelab.errors import ModelError
from prunelab.runs.seeds import generator, seeded, stream_seed
from prunelab.training.loop import TrainingConfig, train
from prunelab.training.task import Task, to_device
from sparsemodel.layers.sparsify import sparsify
from sparsemodel.masks import criteria, distribution
from sparsemodel.masks.mask import mask_from_scores, prunable_parameters

CRITERIA = ("magnitude", "snip")
CALIBRATION_SAMPLES = 256


def sparse_proxy(
    model: nn.Module,
    samples: Samples,
    task: Task,
    *,
    density: float,
    criterion: str = "magnitude",
    seed: int = 0,
) -> nn.Module:
    """A sparse copy of `model` for `train` and for any score; `model` stays as it is.

    "magnitude" looks at no sample; its layer densities are Erdős–Rényi-kernel, since magnitudes
    of different layers of an untrained network tell their initialisation apart and nothing
    else. "snip" takes the gradient of the loss on 256 samples drawn by the seed (or all, where
    there are fewer), in train mode, and ranks the weights of all layers together. Magnitude is
    the default because its scores agreed better with a dense model's, for less time
    (docs/scores.md).

    Args:
        density: active over all prunable weights, in (0, 1]; stem, biases and normalisation
            stay dense.
        criterion: "magnitude" or "snip".
        seed: decides which samples SNIP looks at, and its dropout.

    Raises:
        ModelError: an unknown criterion, or a model without prunable layers.
        DensityError: a density out of range, or too low for one weight a layer.
    """
    if criterion not in CRITERIA:
        raise ModelError(f"criterion: expected {' or '.join(CRITERIA)}, got {criterion!r}")
    names = list(prunable_parameters(model))
    if criterion == "magnitude":
        scores = criteria.magnitude(model, names)
        shapes = {name: tuple(score.shape) for name, score in scores.items()}
        return sparsify(model, mask_from_scores(scores, distribution.erk(shapes, density)))
    scores = _snip(model, names, samples, task, seed=seed)
    return sparsify(model, mask_from_scores(scores, distribution.global_ranking(scores, density)))


def proxy_scores(
    model: nn.Module,
    samples: Samples,
    task: Task,
    *,
    score: Callable[[nn.Module], Tensor],
    density: float,
    config: TrainingConfig,
    criterion: str = "magnitude",
    seed: int = 0,
) -> Tensor:
    """Prune, train and score: `score` of a sparse proxy of `model` after training.

    Args:
        model: as initialised; stays as it is.
        score: a trained model -> float64 [N].
        config: of the proxy's training; most scores of errors want an early epoch.

    Raises:
        ModelError, DensityError: as `sparse_proxy`.
        RunError: as `train`.
    """
    device = next(model.parameters()).device
    proxy = sparse_proxy(model, samples, task, density=density, criterion=criterion, seed=seed)
    train(proxy, samples, task, config=config, seed=seed, device=device)
    return score(proxy)


def _snip(
    model: nn.Module, names: list[str], samples: Samples, task: Task, *, seed: int
) -> dict[str, Tensor]:
    order = torch.randperm(len(samples), generator=generator(seed, 0))
    device = next(model.parameters()).device
    batch = to_device(samples.batch(order[:CALIBRATION_SAMPLES]), device)
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with seeded(stream_seed(seed, 1), device):  # dropout
            return criteria.snip(model, names, lambda probed: task.loss(probed, batch).mean())
    finally:
        for module, mode in modes:
            module.training = mode
