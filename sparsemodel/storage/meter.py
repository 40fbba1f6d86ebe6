"""Measured, not counted, cost of a process and of a training state."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # reading the memory of a process needs no torch
    import torch
    from torch import nn


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    # Linux's own account of this program; getrusage's holds what ran before exec, too.
    if found := _status("VmHWM:"):
        return found
    import resource  # noqa: PLC0415 - not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """Resident memory of this process now, in bytes; its peak where only that is told."""
    return _status("VmRSS:") or peak_rss_bytes()


def _status(field: str) -> int:
    """A figure of Linux's account of this process; 0 elsewhere."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(field):
                return 1024 * int(line.split()[1])
    return 0


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Bytes of tensor storage that a model in training holds now, by kind.

    Args:
        model: sparsified or not.
        optimizer: whose state to count.

    Returns:
        "weights", "gradients", "optimizer" (momentum, moments), "indices" (patterns of sparse
        layers, with what serves their gradients) and "buffers" (all others).
    """
    from sparsemodel.layers.linear_and_conv import SparseLayer  # noqa: PLC0415 - layers need torch, this file not

    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    indices = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    known = {id(buffer) for buffer in indices}
    parameters = list(model.parameters())
    states = [] if optimizer is None else list(optimizer.state.values())
    return {
        "weights": storage_bytes(parameters),
        "gradients": storage_bytes(parameter.grad for parameter in parameters),
        "optimizer": storage_bytes(
            value for state in states for value in state.values() if hasattr(value, "data_ptr")
        ),
        "indices": storage_bytes(indices),
        "buffers": storage_bytes(b for b in model.buffers() if id(b) not in known),
    }


def storage_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the distinct storages under these tensors, whole even where a view uses a part."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
