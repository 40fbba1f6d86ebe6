"""Networks with frozen parameters and fixed tables: every execution trains them as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from little_clients import network_from, random_mask, samples, state_of
from torch import nn
from torch.nn import functional

from fedprune.config import RunConfig
from fedprune.exchange.messages import MODEL
from fedprune.given import name_model
from fedprune.local.cohort import Member, train_cohort
from fedprune.local.model import Sgd, open_model
from fedprune.local.network import TorchNetwork
from fedprune.local.torch_models import skeleton
from fedprune.local.training import train_epochs
from fedprune.settings import TrainingConfig
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.runtime.state import SparseState

SGD = Sgd(0.05, 0.9, 1e-4)
FROZEN = ("stem.weight", "norm.weight", "fc.bias")


class Net(nn.Module):
    """Orders its channels by a table of integers; some parameters are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.middle, self.fc = nn.Conv2d(4, 8, 3), nn.Linear(8, 3)
        self.register_buffer("order", torch.tensor([1, 0, 3, 2, 5, 4, 7, 6]))
        for name in FROZEN:
            self.get_parameter(name).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.middle(functional.relu(self.norm(self.stem(x)))))
        y: torch.Tensor = self.fc(x.mean((2, 3))[:, self.order])
        return y


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def by_hand(start: SparseState) -> SparseState:
    """Plain torch: the loss of one batch, torch's SGD, pruned weights back to zero."""
    model, (images, labels) = build(), samples(12)
    mask = random_mask(0.5, model)
    mask.apply(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **SGD._asdict())
    inputs = (torch.from_numpy(images) / 255 - 0.5) / 0.25
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), torch.from_numpy(labels)).backward()
        optimizer.step()
        mask.apply(model)
    return state_of(model, mask)


@pytest.mark.parametrize("kind", ["sparse", "masked", "dense", "cohort"])
def test_frozen_parameters_and_tables_stay(kind: str) -> None:
    images, labels = samples(12)
    start = state_of(build(), random_mask(0.5, build()))
    expected = by_hand(start)
    execution = "masked" if kind == "cohort" else kind
    config = TrainingConfig(batch_size=12, local_epochs=3, execution=execution)
    if kind == "cohort":
        members = [Member(start, images, labels, seed=number) for number in range(2)]
        replies = train_cohort(build(), members, config=config, sgd=SGD)
        states = [reply.states[MODEL] for reply in replies]
    else:
        if kind == "sparse" and cpu.library() is None:
            pytest.skip("no native kernels here")
        network = network_from(build)
        assert network.program is None
        model = open_model(network, start, config)
        train_epochs(model, images, labels, sgd=SGD, epochs=3, batch_size=12, seed=0)
        states = [model.state()]
    for state in states:
        for name, values in state.values.items():
            if name in FROZEN:
                assert np.array_equal(values, start.values[name]), name
            np.testing.assert_allclose(values, expected.values[name], rtol=2e-3, atol=2e-5)


class Tables(nn.Module):
    """Weights that are shared, and a table that no state carries."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Parameter(torch.ones(64, 64))
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.first.weight, self.second.weight = shared, shared
        self.last = nn.Linear(64, 3)
        self.register_buffer("order", torch.arange(64).flip(0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x.flatten(1)[:, self.order])))  # type: ignore[no-any-return]


def test_a_skeleton_holds_tables_and_no_weight() -> None:
    empty = skeleton(Tables)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert empty.first.weight is empty.second.weight
    assert torch.equal(empty.order, torch.arange(64).flip(0))
    assert {p.device.type for p in Tables().parameters()} == {"cpu"}  # nothing stays changed


def test_shapes_are_learnt_without_a_dense_network(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []

    def build(num_classes: int) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, num_classes))
        devices.append(model[1].weight.device.type)
        return model

    name = name_model(build)
    network = TorchNetwork(RunConfig.parse({"model.name": name}), 3, (1, 8, 8), "classification")
    assert network.shapes["2.weight"] == (3, 32)
    network.empty_model()
    assert devices == ["meta", "cpu"]  # the second was asked for
