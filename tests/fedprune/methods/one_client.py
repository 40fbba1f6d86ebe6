"""One client with a small network and samples of its own, for the client halves of methods."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from fedprune.config import RunConfig
from fedprune.local.data import ClientData, Split
from fedprune.local.model import Network
from fedprune.local.site import Local
from prunelab.networks import build_model, float_state
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.adjust import prune_to_largest
from sparsemodel.runtime.state import SparseState

SHAPE = (1, 8, 8)


def build() -> nn.Module:
    return build_model("resnet8", num_classes=3, input_shape=SHAPE, seed=0, width=4)


def dense() -> SparseState:
    return SparseState({name: value.numpy() for name, value in float_state(build()).items()})


def prunable() -> dict[str, tuple[int, ...]]:
    values = dense().values
    return {n: v.shape for n, v in values.items() if v.ndim > 1 and n != "conv1.weight"}


def pruned(density: float) -> SparseState:
    """The start at its largest weights."""
    counts = {name: round(density * np.prod(shape)) for name, shape in prunable().items()}
    return prune_to_largest(dense(), counts)


def place(method: str, count: int = 32, client: int = 0, **training: Any) -> Local:
    images = np.random.default_rng(client).integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    labels = np.arange(count) % 3
    held = Split(images[:2], labels[:2])
    data = ClientData(Split(images, labels), held, held, 3, "classification")
    values = {"training.batch_size": 8, "training.local_epochs": 2, "training.weight_decay": 0.01}
    values |= {f"training.{key}": value for key, value in training.items()}
    shapes = {name: tuple(value.shape) for name, value in float_state(build()).items()}
    network = Network(program_of(build(), SHAPE), build, shapes)
    return Local(client, data, RunConfig.parse({"method.name": method, **values}), network)
