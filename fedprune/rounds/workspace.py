"""What is derived of a run's configuration with torch: data, shares, network, its first weights.

Everything here is a deterministic function of the configuration; `Workspace.lay_out` leaves it
where server and clients find it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedprune.config import RunConfig
from fedprune.errors import ConfigError
from fedprune.given import given_dataset, given_model
from fedprune.local.network import TorchNetwork
from fedprune.local.optimizer import Optimizer
from fedprune.local.partition import partition, split_server_set
from fedprune.local.shares import write_shares
from fedprune.local.torch_models import DenseModel
from fedprune.local.training import train_epochs
from fedprune.methods.base import Method
from fedprune.rounds.setup import TEST, TRAIN, write_facts, write_start
from fedprune.settings import DataConfig
from prunelab.data.arrays import note
from prunelab.data.batches import Integers
from prunelab.data.given import load_sample_set
from prunelab.data.samples import check_targets, stored
from prunelab.data.sides import SampleSet
from prunelab.data.store import write_store
from prunelab.errors import DataError, RunError
from prunelab.networks import (
    GRANULARITIES,
    check_model,
    float_state,
    parameter_blocks,
    uninitialised,
)
from prunelab.runs.seeds import stream_seed
from prunelab.runs.stamps import stamp_of
from prunelab.training.steps import is_classification
from prunelab.training.task import check_fits, forward, task_of
from sparsemodel.errors import PlanError
from sparsemodel.masks.mask import prunable_parameters
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.fixed_sum import MAX_ABSOLUTE_VALUE
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.cost import FLOAT_BYTES, layer_macs

# The first part of a derived seed says what it is for, so that no two uses share a stream.
SEED_SERVER_SET, SEED_PRETRAIN = 0, 2


@dataclass(frozen=True, eq=False)
class Workspace:
    """The parts of one run. `shares` holds each client's indices into the training set."""

    config: RunConfig
    dataset: SampleSet
    server_indices: Integers
    shares: list[Integers]

    @property
    def method(self) -> Method:
        """The run's method."""
        return self.config.method

    @cached_property
    def torch(self) -> TorchNetwork:
        """Builds the run's network."""
        data = self.dataset
        shape = tuple(stored(data.train)[0].shape[1:])
        return TorchNetwork(self.config, data.num_classes, shape, task_of(data.train))

    def model(self) -> nn.Module:
        """A fresh model, dense, the same bits every time."""
        return self.torch.model()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the float state, in the order in which states hold it."""
        return self.torch.shapes

    def lay_out(self, folder: Path, *, with_start: bool) -> None:
        """Leave a Setup in `folder`, which is made; its last file is there when all is.

        Raises:
            ModelError: the network does not fit the data.
            RunError: the folder cannot be written, for want of space perhaps.
        """
        try:
            self._lay_out(folder, with_start=with_start)
        except OSError as error:
            raise RunError(
                f"cannot write {error.filename or folder} ({error.strerror}); set TMPDIR to a "
                "folder with more room"
            ) from None

    def _lay_out(self, folder: Path, *, with_start: bool) -> None:
        dataset, skeleton, task = self.dataset, self.torch.skeleton, self.torch.task
        check_targets(dataset.train)
        check_fits(task, skeleton, dataset.train, num_classes=dataset.num_classes)
        if self.config.data.augment and len(self.torch.input_shape) != 3:
            raise ConfigError(
                "data.augment is for images, and these inputs are "
                f"{list(self.torch.input_shape)}; turn it off"
            )
        folder.mkdir(parents=True, exist_ok=True)
        described: dict[str, Any] = {
            "num_classes": dataset.num_classes,
            "name": dataset.name,
            "task": self.torch.kind,
            "class_names": dataset.class_names,
            "feature_names": dataset.feature_names,
            "made_for": self.config.digest,
        }
        write_shares(folder / TRAIN, *stored(dataset.train), self.shares, **described)
        if not self.config.federation.clients_test:
            assert dataset.test is not None, "looked at when the data were opened"
            write_store(folder / TEST, *stored(dataset.test), **described)
        if with_start:
            write_start(folder, self.config, self.start_state())
        program, reason = self._traced()
        hint = [name.strip() for name in self.config.model.blocks.split(",") if name.strip()]
        with uninitialised():
            reference = self.torch.reference()
        exchanged = float_state(reference)

        def run(model: nn.Module) -> None:
            forward(model, dataset.train.batch(torch.zeros(1, dtype=torch.int64)))

        facts = {
            "shapes": self.shapes,
            "prunable": list(prunable_parameters(skeleton)),
            "blocks": {
                granularity: parameter_blocks(skeleton, granularity=granularity, hint=hint)
                for granularity in GRANULARITIES
            },
            "program": program,
            "no_program": reason,
            "layer_macs": layer_macs(skeleton, run),
            "reference": {
                "num_parameters": sum(p.numel() for p in reference.parameters()),
                "model_bytes": FLOAT_BYTES * sum(v.numel() for v in exchanged.values()),
                "layer_macs": layer_macs(reference, run),
            },
            "metric": task.metric_name,
            "width": str(getattr(skeleton, "width", "")),
            "server_samples": self.server_indices.tolist(),
        }
        write_facts(folder, self.config, facts)

    def start_state(self) -> SparseState:
        """The dense model after brief training on the server's few labelled samples.

        Every method starts from it.

        Raises:
            RunError: the training diverged.
        """
        config, dataset = self.config, self.dataset
        compute_device(config.training.device)
        values = float_state(self.model())
        state = SparseState({name: values[name].numpy() for name in self.shapes})
        if not config.server.pretrain_epochs:
            return state
        model = DenseModel(self.torch.empty_model, state, config.training, self.torch.task)
        optimizer = Optimizer(config.training, 0)
        inputs, targets = stored(dataset.train)
        loss = train_epochs(
            model,
            inputs[self.server_indices],
            targets[self.server_indices],
            sgd=optimizer.sgd,
            correction=optimizer.correction,
            epochs=config.server.pretrain_epochs,
            batch_size=config.training.batch_size,
            seed=stream_seed(SEED_PRETRAIN, config.seed),
            augmented=config.data.augment,
        )
        trained = model.state()
        largest = max(float(np.abs(values).max(initial=0)) for values in trained.values.values())
        if not (math.isfinite(loss) and largest < MAX_ABSOLUTE_VALUE):
            raise RunError(
                f"training on the server's samples has diverged (loss {loss:.3g}, largest weight "
                f"{largest:.3g}) before the first round: training.lr={config.training.lr:g} is too "
                "high; lower it"
            )
        return trained

    def _traced(self) -> tuple[str, str]:
        """The network's program, or why it has none."""
        network = self.torch
        if not is_classification(network.task) or len(network.input_shape) != 3:
            what = f"{network.task_name} of {list(network.input_shape)}"
            return "", f"programs are for classes of images [C, H, W], not for {what}"
        try:
            return program_of(network.skeleton, network.input_shape).text(), ""
        except PlanError as error:
            return "", str(error)


def open_workspace(config: RunConfig) -> Workspace:
    """Load the data and work out every part; cached for the process.

    Raises:
        ConfigError, DataError, ModelError: a name is unknown, or the data do not allow it.
    """
    # What was given is part of the key: a function that was defined again keeps its name, and a
    # folder whose files have changed.
    name = config.data.dataset
    return _opened(config, given_model(config.model_name), given_dataset(name), stamp_of(name))


@lru_cache(maxsize=1)
def _opened(config: RunConfig, model: Any, given: SampleSet | None, stamp: str) -> Workspace:
    if isinstance(model, str):
        check_model(model)
    data = config.data
    dataset = given or load_sample_set(
        data.dataset,
        how=config.reading,
        num_train=data.num_train or None,
        num_test=data.num_test or None,
        seed=config.seed,
    )
    if config.federation.clients_test and dataset.test is not None:
        note(
            f"{len(dataset.test)} test samples are left aside: clients test the model "
            "(federation.evaluate)"
        )
    if dataset.test is None and not config.federation.clients_test:
        raise DataError(
            f"{dataset.name} has no samples to test with; set federation.evaluate to 'clients', or "
            "set some aside"
        )
    labels = None if dataset.train.labels is None else dataset.train.labels.numpy()
    server, rest = split_server_set(
        labels,
        count=len(dataset.train),
        per_class=config.server.per_class,
        seed=stream_seed(SEED_SERVER_SET, config.seed),
    )
    groups = dataset.train_groups
    if groups is not None:
        note_groups(len(groups.unique()), data)
    scheme = data.partition
    if labels is None and scheme == "dirichlet":
        scheme = "iid"
        note("the samples have no classes, so data.partition = 'dirichlet' deals them out evenly")
    elif labels is None and scheme == "pathological":
        raise DataError(
            "the samples have no classes: data.partition = 'pathological' cannot go by them; set "
            "it to 'iid'"
        )
    shares = partition(
        np.zeros(len(rest), np.int64) if labels is None else labels[rest],
        num_clients=data.clients,
        scheme=scheme,
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


def note_groups(num_groups: int, data: DataConfig) -> None:
    """Say where the data's own clients are not the run's."""
    if data.partition != "natural":
        note(
            f"the data say whose each sample is ({num_groups} natural clients), but are divided "
            f"among {data.clients} by data.partition = {data.partition!r}; set it to 'natural' to "
            "go by them"
        )
    elif data.clients < num_groups:
        note(
            f"{num_groups} natural clients are dealt to data.clients = {data.clients}, several to "
            f"each; set it to {num_groups} to keep them apart"
        )


def compute_device(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        ConfigError: "cuda" was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device is 'cuda' but torch finds no CUDA device; use 'cpu'")
    return torch.device(name)
