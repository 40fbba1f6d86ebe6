"""Whether a network takes such samples."""

from __future__ import annotations

import torch
from torch import nn

from prunelab.errors import ModelError
from sparsemodel.masks.probe import probing


def fitted(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Images in the floating-point type of a network's weights."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return images.to(next(dtypes, images.dtype))


@torch.no_grad()
def check_fits(model: nn.Module, *, input_shape: tuple[int, ...], num_classes: int) -> None:
    """Raise ModelError unless a network takes such samples and tells so many classes apart.

    The network is left as it was.
    """
    size = (2, *input_shape)
    what = f"the network does not fit images {list(size)}"
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    with probing(model):
        model.eval()
        try:
            logits = model(fitted(model, torch.zeros(size, dtype=torch.float32, device=device)))
        except Exception as error:  # whatever the network's own code raises
            raise ModelError(f"{what}: {type(error).__name__}: {error}") from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != 2:
        raise ModelError(f"{what}: it gives {shape}, expected logits [2, classes]")
    if logits.shape[1] < num_classes:
        raise ModelError(
            f"the network gives {logits.shape[1]} logits, and the data have {num_classes} classes; "
            "a function that builds it may ask for num_classes"
        )
