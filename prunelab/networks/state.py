"""What clients and server exchange of a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import init

from sparsemodel.layers.from_state import carried_tensors, fixed_tensors


def float_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what clients and server exchange of a model, by name.

    Its trained parameters and its lasting floating-point buffers, a tensor of several names (tied
    weights) once, by the first of them. Frozen parameters are left out: every node builds them
    from the seed; where no parameter is trained, all are in it. Batch norm's integer batch
    counters are left out, too: a mean of them means nothing.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> list(float_state(model))
    ['1.weight', '1.bias']
    """
    return {name: tensor.clone() for name, tensor in carried_tensors(model).items()}


def is_wholly_exchanged(model: nn.Module) -> bool:
    """Whether `float_state` is all that a network knows, so that its own weights need no drawing.

    Frozen parameters, tables, and tensors that are no buffers are the network's own, and have to
    be built by the seed as they are everywhere.
    """
    own = (value for module in model.modules() for value in vars(module).values())
    return not fixed_tensors(model) and not any(isinstance(v, torch.Tensor) for v in own)


@contextmanager
def uninitialised() -> Iterator[None]:
    """Inside, layers draw no weights: for models whose state is overwritten.

    Parameters hold whatever is in memory; buffers and constant parameters are as always.
    """
    names = [name for name in vars(init) if name.endswith("_") and "uniform" in name]
    names += [name for name in vars(init) if name.endswith("_") and "normal" in name]
    kept = {name: getattr(init, name) for name in names}
    for name in names:
        setattr(init, name, _untouched)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(init, name, function)


def _untouched(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor
