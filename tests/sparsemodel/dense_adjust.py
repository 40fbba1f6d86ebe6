"""Prune-and-grow as plain loops over masked dense tensors, to compare with."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sparsemodel.masks.mask import Mask


def prune_and_grow(
    mask: Mask,
    weights: Mapping[str, torch.Tensor],
    candidates: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    counts: Mapping[str, int],
) -> Mask:
    """Of each layer the largest candidates grow, as many of the smallest active weights go."""
    patterns = {}
    for name, (indices, values) in candidates.items():
        weight, active = weights[name].flatten().tolist(), mask.active(name).tolist()
        pairs = zip(indices.tolist(), values.tolist(), strict=True)
        offers = sorted((-abs(value), index) for index, value in pairs if value != 0)
        num = min(counts[name], len(offers), len(active))
        pattern = mask[name].flatten().clone()
        for _, index in sorted((abs(weight[i]), i) for i in active)[:num]:
            pattern[index] = False
        for _, index in offers[:num]:
            pattern[index] = True
        patterns[name] = pattern.reshape(mask[name].shape)
    return mask.replace(patterns)


def carry_weights(
    weights: Mapping[str, torch.Tensor], *, old: Mask, new: Mask
) -> dict[str, torch.Tensor]:
    """Weights active before and after stay, others are zero."""
    return {n: torch.where(old[n] & new[n], w, torch.zeros(())) for n, w in weights.items()}
