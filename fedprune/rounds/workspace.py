"""What the server derives of a run's configuration: data, shares, network, its start.

Everything here is a deterministic function of the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import nn

from fedprune.config import RunConfig
from fedprune.errors import ConfigError
from fedprune.given import given_dataset
from fedprune.local.model import Network
from fedprune.local.network import TorchNetwork
from fedprune.local.partition import partition, split_server_set
from fedprune.local.shares import write_shares
from fedprune.methods.base import Method
from prunelab.data.batches import Integers
from prunelab.data.datasets import ImageSet, load_dataset
from prunelab.networks import uninitialised
from prunelab.runs.seeds import stream_seed
from sparsemodel.errors import PlanError
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.program import Program
from sparsemodel.storage.cost import layer_macs, model_bytes

# The first part of a derived seed says what it is for, so that no two uses share a stream.
SEED_SERVER_SET, SEED_PRETRAIN, SEED_SAMPLING = 0, 2, 5


@dataclass(frozen=True, eq=False)
class Reference:
    """What savings are measured against: the full dense network, counted."""

    num_parameters: int
    model_bytes: int
    layer_macs: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Workspace:
    """The parts of one run. `shares` holds each client's indices into the training set."""

    config: RunConfig
    dataset: ImageSet
    server_indices: Integers
    shares: list[Integers]

    @property
    def method(self) -> Method:
        """The run's method."""
        return self.config.method

    @cached_property
    def torch(self) -> TorchNetwork:
        """Builds the run's network."""
        return TorchNetwork(self.config, self.dataset.num_classes, self.dataset.input_shape)

    def model(self) -> nn.Module:
        """A fresh model, dense, the same bits every time."""
        return self.torch.model()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the float state, in the order in which states hold it."""
        return self.torch.shapes

    @cached_property
    def program(self) -> Program | None:
        """The network as the runtime runs it; None where it has no program."""
        return self._traced[0]

    @property
    def no_program(self) -> str:
        """Why the network has no program; empty where it has one."""
        return self._traced[1]

    @cached_property
    def layer_macs(self) -> Mapping[str, int]:
        """Multiply-accumulates of each layer of the run's network for one sample, when dense."""
        return layer_macs(self.torch.skeleton, self.dataset.input_shape)

    @cached_property
    def width(self) -> int | None:
        """Channels of the first stage, where the network says so."""
        return getattr(self.torch.skeleton, "width", None)

    @cached_property
    def reference(self) -> Reference:
        """The full dense network's figures."""
        with uninitialised():
            model = self.torch.reference()
        return Reference(
            num_parameters=sum(p.numel() for p in model.parameters()),
            model_bytes=model_bytes(model),
            layer_macs=layer_macs(model, self.dataset.input_shape),
        )

    @cached_property
    def network(self) -> Network:
        """The network as a client of this process takes it."""
        return Network(self.program, self.torch.empty_model, self.shapes)

    def write_shares(self, folder: Path) -> None:
        """Leave the training samples and every client's share where clients without torch look."""
        dataset = self.dataset
        write_shares(
            folder,
            dataset.train_images.numpy(),
            dataset.train_labels.numpy(),
            self.shares,
            num_classes=dataset.num_classes,
            name=dataset.name,
        )

    @cached_property
    def _traced(self) -> tuple[Program | None, str]:
        try:
            return program_of(self.torch.skeleton, self.dataset.input_shape), ""
        except PlanError as error:
            return None, str(error)


@lru_cache(maxsize=1)
def open_workspace(config: RunConfig) -> Workspace:
    """Load the data and work out every part; cached for the process.

    Raises:
        ConfigError, DataError, ModelError: a name is unknown, or the data do not allow it.
    """
    data = config.data
    dataset = given_dataset(data.dataset) or load_dataset(
        data.dataset,
        num_train=data.num_train or None,
        num_test=data.num_test or None,
        seed=config.seed,
    )
    labels = dataset.train_labels.numpy()
    server, rest = split_server_set(
        labels,
        per_class=config.server.per_class,
        seed=stream_seed(SEED_SERVER_SET, config.seed),
    )
    groups = dataset.train_groups
    shares = partition(
        labels[rest],
        num_clients=data.clients,
        scheme=data.partition,
        alpha=data.alpha,
        classes_per_client=data.classes_per_client,
        groups=None if groups is None else groups.numpy()[rest],
        seed=config.seed,
    )
    return Workspace(
        config=config,
        dataset=dataset,
        server_indices=server,
        shares=[rest[share] for share in shares],
    )


def compute_device(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        ConfigError: "cuda" was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device is 'cuda' but torch finds no CUDA device; use 'cpu'")
    return torch.device(name)
