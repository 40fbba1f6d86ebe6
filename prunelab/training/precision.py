"""In what numbers forward and backward passes are computed; weights and losses are float32."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prunelab.errors import RunError
from sparsemodel.layers.sparsify import sparse_layers

FLOAT32, BFLOAT16 = "float32", "bfloat16"
PRECISIONS = (FLOAT32, BFLOAT16)


def check_precision(precision: str, model: nn.Module) -> None:
    """Raise RunError unless a network can be trained in these numbers."""
    if precision != FLOAT32 and sparse_layers(model):
        raise RunError(
            f"training.precision {precision} is for dense networks, and this {type(model).__name__}"
            f" is sparsified: its kernels take {FLOAT32}; leave the precision at {FLOAT32}"
        )


@contextmanager
def computing_in(precision: str, model: nn.Module) -> Iterator[None]:
    """Inside, calls of `model` compute in these numbers.

    In bfloat16 that is torch's autocast: products in bfloat16, of weights that stay float32, and
    outputs as float32. It ends with the call, so that losses and other networks, such as a
    teacher, are computed as ever. Images are laid out channels last, in which oneDNN and cuDNN are
    fastest; the layout of the weights made no difference.

    Raises:
        RunError: the network takes a view that only another layout has.
    """
    if precision == FLOAT32:
        yield
        return
    plain, of_its_own = model.forward, "forward" in vars(model)

    @functools.wraps(plain)
    def forward(*inputs: Any, **named: Any) -> Any:
        device = next(model.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16):
            outputs = plain(*map(_channels_last, inputs), **named)
        return pytree.tree_map(_as_float32, outputs)

    model.forward = forward
    try:
        yield
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        raise RunError(
            f"in {precision} feature maps are laid out channels last, and {type(model).__name__} "
            "calls view() on one; let it call reshape() or flatten() there, or train in "
            f"{FLOAT32}"
        ) from error
    finally:
        if of_its_own:
            model.forward = plain
        else:
            del model.forward


def _channels_last(value: Any) -> Any:
    """Images in that layout; a copy, since one of a single channel counts as both as it is."""
    is_images = isinstance(value, Tensor) and value.dim() == 4
    return value.clone(memory_format=torch.channels_last) if is_images else value


def _as_float32(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype == torch.bfloat16
    return value.float() if is_half else value
