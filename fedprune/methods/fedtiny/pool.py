"""FedTiny's candidate pool: coarse masks, each with its own layer densities."""

from __future__ import annotations

from torch import nn

from fedprune.config import PruningConfig
from prunelab.runs.seeds import generator
from sparsemodel.masks.criteria import magnitude
from sparsemodel.masks.distribution import noise_uniform
from sparsemodel.masks.mask import Mask, mask_from_scores, prunable_parameters


def pool_size(config: PruningConfig) -> int:
    """Number of candidates: max(1, round(0.1 / density)), capped, or as configured.

    The rule is the paper's optimal pool size as we remember it, not checked against its text.
    """
    if config.pool_size:
        return config.pool_size
    return min(config.pool_limit, max(1, round(0.1 / config.density)))


def candidate_pool(model: nn.Module, config: PruningConfig, *, seed: int) -> list[Mask]:
    """Magnitude masks of the pre-trained dense model under noisy layer densities.

    Layer densities are d_l = d (1 + U(-.5, .5)), redrawn until the whole is within 2 % of d.

    Returns:
        `pool_size(config)` masks; candidate c depends on `seed` and c alone, so that a larger
        pool contains every smaller one.
    """
    parameters = prunable_parameters(model)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    scores = magnitude(model, list(parameters))
    return [
        mask_from_scores(
            scores, noise_uniform(shapes, config.density, generator=generator(seed, candidate))
        )
        for candidate in range(pool_size(config))
    ]
