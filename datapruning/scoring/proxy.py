"""Sparse proxies: score samples with a model that trains a few of its weights.

The proxy is pruned before training, on training samples alone, and trains and predicts on the
sparse kernels: its scores cost a part of a dense model's. How far they agree with those is a
matter of measurement: `agreement.agreement`, `python -m benchmarks.proxy_scores`.
"""

from __future__ import annotations

import torch
from torch import nn

from prunelab.data.samples import Samples
from prunelab.runs.seeds import generator, seeded, stream_seed
from prunelab.training.task import Task
from sparsemodel.layers.sparsify import sparsify
from sparsemodel.masks.criteria import Criterion
from sparsemodel.masks.prune import prune

CALIBRATION_SAMPLES = 256


def sparse_proxy(
    model: nn.Module,
    samples: Samples,
    task: Task,
    *,
    density: float,
    criterion: str | Criterion = "magnitude",
    seed: int = 0,
) -> nn.Module:
    """A sparse copy of `model` for `train` and for any score; `model` stays as it is.

    "magnitude" looks at no sample; its layer densities are Erdős–Rényi-kernel, since magnitudes
    of different layers of an untrained network tell their initialisation apart and nothing
    else. Other criteria see 256 samples drawn by the seed (or all, where there are fewer), in
    train mode, and rank the weights of all layers together. Magnitude is the default because its
    scores agreed better with a dense model's, for less time, than SNIP's (docs/scores.md).

    Args:
        density: active over all prunable weights, in (0, 1]; stem, biases and normalisation
            stay dense.
        criterion: as of `sparsemodel.prune`.
        seed: decides which samples a criterion looks at, and its dropout.

    Raises:
        MaskError: an unknown criterion, or a model without prunable layers.
        DensityError: a density out of range, or too low for one weight a layer.
    """
    order = torch.randperm(len(samples), generator=generator(seed, 0))
    batch = samples.batch(order[:CALIBRATION_SAMPLES])
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with seeded(stream_seed(seed, 1), device):  # dropout
            mask = prune(
                model,
                density,
                criterion=criterion,
                distribution="erk" if criterion == "magnitude" else "global",
                data=[batch],
                loss=lambda probed, part: task.loss(probed, part).mean(),
                seed=seed,
            )
    finally:
        for module, mode in modes:
            module.training = mode
    return sparsify(model, mask)
