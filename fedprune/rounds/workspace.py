"""What server and clients both derive from the run's configuration: data, shares, model, method.

Everything here is a deterministic function of the configuration, so that a node needs no more
than that to know its part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from fedprune.config import RunConfig
from fedprune.exchange.messages import ClientInfo
from fedprune.local.data import ClientData, client_data
from fedprune.local.partition import partition, split_server_set
from fedprune.methods import build_method
from fedprune.methods.base import Method
from prunelab.data.batches import Integers
from prunelab.data.datasets import ImageSet, load_dataset
from prunelab.networks import batch_norm_pairs, float_state
from prunelab.runs.seeds import stream_seed

# The first part of a derived seed says what it is for, so that no two uses share a stream.
SEED_SERVER_SET, SEED_DEV_SPLIT, SEED_PRETRAIN, SEED_ROUND, SEED_GROWTH, SEED_SAMPLING = range(6)


@dataclass(frozen=True, eq=False)
class Workspace:
    """The parts of one run. `shares` holds each client's indices into the training set."""

    config: RunConfig
    dataset: ImageSet
    method: Method
    shapes: dict[str, tuple[int, ...]]
    batch_norms: list[tuple[str, str]]
    server_indices: torch.Tensor
    shares: list[Integers]

    def client(self, client: int) -> ClientData:
        """The client's own training and development samples."""
        return client_data(
            self.dataset.train_images.numpy(),
            self.dataset.train_labels.numpy(),
            self.shares[client],
            num_classes=self.dataset.num_classes,
            seed=stream_seed(SEED_DEV_SPLIT, self.config.seed, client),
        )

    def client_info(self, client: int) -> ClientInfo:
        """What the client tells the server about itself."""
        data = self.client(client)
        return ClientInfo(
            client=client,
            num_train=len(data.train_labels),
            num_dev=len(data.dev_labels),
            label_histogram=data.label_histogram(),
        )

    def model(self) -> nn.Module:
        """A fresh model, the same bits every time."""
        return self.method.build_model()


@lru_cache(maxsize=1)
def open_workspace(config: RunConfig) -> Workspace:
    """Load the data and work out every part; cached for the process.

    Raises:
        ConfigError, DataError, ModelError: a name is unknown, or the data do not allow it.
    """
    data = config.data
    dataset = load_dataset(
        data.dataset,
        num_train=data.num_train or None,
        num_test=data.num_test or None,
        seed=config.seed,
    )
    method = build_method(config, dataset)
    labels = dataset.train_labels.numpy()
    server, rest = split_server_set(
        labels,
        per_class=config.pruning.server_per_class,
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
    model = method.build_model()
    return Workspace(
        config=config,
        dataset=dataset,
        method=method,
        shapes={name: tuple(value.shape) for name, value in float_state(model).items()},
        batch_norms=batch_norm_pairs(model),
        server_indices=torch.from_numpy(server),
        shares=[rest[share] for share in shares],
    )
