"""Masks from and to `torch.nn.utils.prune`, which keeps NAME_orig and NAME_mask on a module."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import prune

from sparsemodel.errors import MaskError
from sparsemodel.masks.mask import Mask, weights_under

_ORIGINAL, _MASK = "_orig", "_mask"


def mask_from_torch(model: nn.Module) -> Mask:
    """What `Mask.from_torch` gives."""
    patterns = {}
    for name, original, values in _pruned(model):
        if values.shape != original.shape or not bool(((values == 0) | (values == 1)).all()):
            raise MaskError(
                f"mask of {name!r}: expected zeros and ones of shape {tuple(original.shape)}, got "
                f"a {values.dtype} tensor of shape {tuple(values.shape)}"
            )
        patterns[name] = values.bool()
    if not patterns:
        raise MaskError(
            f"{type(model).__name__} has no layer that torch.nn.utils.prune has pruned; after "
            "prune.remove the zeros alone are left, as in Mask({name: weight != 0})"
        )
    return Mask(patterns)


def mask_to_torch(mask: Mask, model: nn.Module) -> None:
    """What `Mask.to_torch` does."""
    for name, _, _ in _pruned(model):
        if name in mask:
            raise MaskError(
                f"{name!r} is pruned by torch.nn.utils.prune already; call prune.remove first"
            )
    for name, weight in weights_under(mask, model).items():
        path, _, leaf = name.rpartition(".")
        pattern = mask[name].to(weight.device)
        prune.custom_from_mask(model.get_submodule(path), leaf, pattern)


def _pruned(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Name, values and mask of every parameter that is pruned."""
    for path, module in model.named_modules():
        for key, original in module._parameters.items():
            leaf = key.removesuffix(_ORIGINAL)
            values = module._buffers.get(leaf + _MASK)
            if leaf != key and original is not None and values is not None:
                yield (f"{path}.{leaf}" if path else leaf), original, values
