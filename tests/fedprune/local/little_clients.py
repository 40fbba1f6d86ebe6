"""A small network, its masks and a few images, for the tests of local training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from fedprune.config import RunConfig
from fedprune.local.data import ClientData, Split
from fedprune.local.model import Array, Network
from fedprune.local.site import Local
from fedprune.settings import TrainingConfig
from prunelab.networks import build_model, float_state
from sparsemodel.errors import PlanError
from sparsemodel.masks.mask import Mask, prunable_parameters
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.adjust import carry
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import SparseState

SHAPE = (1, 8, 8)


def narrow(seed: int = 0) -> nn.Module:
    """A resnet8 of width 4 for three classes."""
    return build_model("resnet8", num_classes=3, input_shape=SHAPE, seed=seed, width=4)


def network_from(build: Callable[[], nn.Module]) -> Network:
    """The network as clients take it, with a program if it has one."""
    model = build()
    shapes = {name: tuple(value.shape) for name, value in float_state(model).items()}
    try:
        return Network(program_of(model, SHAPE), build, shapes)
    except PlanError:
        return Network(None, build, shapes)


def random_mask(density: float, model: nn.Module | None = None, *, seed: int = 5) -> Mask:
    """A mask of so many weights, drawn by a seed."""
    generator = torch.Generator().manual_seed(seed)
    return Mask(
        {
            name: torch.rand(weight.shape, generator=generator) < density
            for name, weight in prunable_parameters(model or narrow()).items()
        }
    )


def state_of(model: nn.Module, patterns: Patterns | Mask | None = None) -> SparseState:
    """A model's state, dense or under patterns."""
    dense = SparseState({name: value.numpy() for name, value in float_state(model).items()})
    if isinstance(patterns, Mask):
        patterns = patterns.csr()
    return dense if patterns is None else carry(dense, patterns)


def samples(count: int, *, classes: int = 3) -> tuple[Array, Array]:
    """Images of bytes, always the same, and their labels."""
    images = np.random.default_rng(0).integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    return images, np.arange(count) % classes


def local(
    images: Array, labels: Array, *, training: TrainingConfig, network: Network, **parts: Any
) -> Local:
    """A client's place with these samples for training, and the first of them for development."""
    held = Split(images[:9], labels[:9])
    data = ClientData(Split(images, labels), held, held, 3, "classification")
    return Local(0, data, RunConfig(training=training, **parts), network)
