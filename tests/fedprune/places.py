"""A client's place with a few samples, for tests of client halves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fedprune.config import RunConfig, own_settings
from fedprune.exchange.messages import MODEL, Reply
from fedprune.local.data import ClientData, Split
from fedprune.local.model import Network
from fedprune.local.site import Local
from fedprune.local.training import SEED_ROUND, epoch_batches
from prunelab.data.batches import Preprocessing
from prunelab.networks import build_model, float_state
from sparsemodel.masks.mask import prunable_parameters
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.adjust import prune_to_largest
from sparsemodel.runtime.state import SparseState

SHAPE = (1, 8, 8)


def build() -> nn.Module:
    return build_model("resnet8", num_classes=3, input_shape=SHAPE, seed=0, width=4)


def dense_state() -> SparseState:
    return SparseState({name: value.numpy() for name, value in float_state(build()).items()})


def prunable() -> dict[str, tuple[int, ...]]:
    """Shapes of the layers that may be pruned."""
    return {name: tuple(value.shape) for name, value in prunable_parameters(build()).items()}


def state_at(density: float | None) -> SparseState:
    """The network's largest weights; None: all, dense."""
    if density is None:
        return dense_state()
    sizes = {name: int(np.prod(shape)) for name, shape in prunable().items()}
    return prune_to_largest(dense_state(), {n: round(density * s) for n, s in sizes.items()})


def place(method: str, count: int = 32, client: int = 0, **training: Any) -> Local:
    """A client with so many samples of three classes, four of them for development."""
    images = np.random.default_rng(client).integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    labels = np.arange(count) % 3
    held = Split(images[:4], labels[:4])
    data = ClientData(Split(images, labels), held, held, 3, "classification")
    values = {"training.batch_size": 8, "training.local_epochs": 2, "training.weight_decay": 0.01}
    values |= {f"training.{key}": value for key, value in training.items()}
    shapes = {name: tuple(value.shape) for name, value in float_state(build()).items()}
    config = RunConfig.parse(own_settings({"method.name": method, **values}))
    return Local(client, data, config, Network(program_of(build(), SHAPE), build, shapes))


def mini_batches(local: Local, round_index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the client trains on in a round, as torch takes it."""
    training, own = local.config.training, local.data.train
    source = epoch_batches(
        own.inputs, own.targets, epochs=training.local_epochs, batch_size=training.batch_size,
        seed=local.seed(SEED_ROUND, round_index), augmented=False,
    )  # fmt: skip
    return [
        (torch.from_numpy(Preprocessing().apply(images)), torch.from_numpy(labels))
        for _, images, labels in source
    ]


def values_of(reply: Reply) -> dict[str, np.ndarray[Any, Any]]:
    return dict(reply.states[MODEL].values)
