"""FedProx: the proximal term by hand, in every execution; without it, federated averaging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import run_inline, tiny
from torch import nn

from fedprune.config import RunConfig
from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.local.data import ClientData, Split
from fedprune.local.model import Network
from fedprune.local.site import Local
from fedprune.local.training import SEED_ROUND, epoch_batches, train
from fedprune.methods.base import RunState, train_request
from fedprune.methods.fedprox import FedProx, train_near
from fedprune.rounds.folder import MODEL as MODEL_FILE
from prunelab.data.batches import Preprocessing
from prunelab.networks import build_model, float_state
from sparsemodel.layers.from_state import load_state_
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.adjust import prune_to_largest
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state

SHAPE = (1, 8, 8)


def build() -> nn.Module:
    return build_model("resnet8", num_classes=3, input_shape=SHAPE, seed=0, width=4)


def start(density: float | None) -> SparseState:
    state = SparseState({name: value.numpy() for name, value in float_state(build()).items()})
    if density is None:
        return state
    weights = {n: v.size for n, v in state.values.items() if v.ndim > 1 and n != "conv1.weight"}
    return prune_to_largest(state, {n: round(density * size) for n, size in weights.items()})


def place(count: int = 32, **training: Any) -> Local:
    images = np.random.default_rng(0).integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    labels = np.arange(count) % 3
    held = Split(images[:2], labels[:2])
    data = ClientData(Split(images, labels), held, held, 3, "classification")
    values = {"training.batch_size": 8, "training.local_epochs": 2, "training.weight_decay": 0.01}
    values |= {f"training.{key}": value for key, value in training.items()}
    shapes = {name: tuple(value.shape) for name, value in float_state(build()).items()}
    network = Network(program_of(build(), SHAPE), build, shapes)
    return Local(0, data, RunConfig.parse({"method.name": "fedprox", **values}), network)


def question(state: SparseState, mu: float) -> Request:
    return FedProx(mu=mu).request(RunState(3, state))


def values_of(reply: Reply) -> dict[str, np.ndarray[Any, Any]]:
    return dict(reply.states[MODEL].values)


@pytest.mark.parametrize("density", [None, 0.3])
def test_without_the_term_it_is_plain_training_bit_for_bit(density: float | None) -> None:
    state, local = start(density), place()
    ours = train_near(question(state, 0.0), local)
    theirs = train(train_request(RunState(3, state)), local)
    assert ours.fields == theirs.fields
    assert all(np.array_equal(v, values_of(ours)[n]) for n, v in values_of(theirs).items())


@pytest.mark.parametrize(("density", "rival"), [(1.0, "fedavg"), (0.2, "magnitude")])
def test_a_run_without_the_term_is_its_rival(density: float, rival: str, tmp_path: Path) -> None:
    common = {"training__rounds": 2, "method__density": density}
    ours = run_inline(tiny(method__name="fedprox", method__mu=0.0, **common), tmp_path / "ours")
    theirs = run_inline(tiny(method__name=rival, **common), tmp_path / "theirs")
    found, expected = (load_state(out / MODEL_FILE)[0] for out in (ours, theirs))
    assert found.patterns == expected.patterns
    assert all(np.array_equal(v, found.values[name]) for name, v in expected.values.items())


@pytest.mark.parametrize("execution", ["sparse", "masked", "dense"])
@pytest.mark.parametrize("density", [None, 0.3])
def test_steps_by_hand(density: float | None, execution: str) -> None:
    """w ← w − η v with v ← β v + ∇L + μ (w − w_t) + λ w on active weights, in plain torch."""
    state, mu = start(density), 0.5
    local = place(execution=execution, lr=0.05)
    training = local.config.training
    reply = train_near(question(state, mu), local)
    rate = training.lr * 0.5 * (1 + np.cos(np.pi * 3 / training.rounds))
    model = build()
    load_state_(model, state)
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    speed = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    batches = epoch_batches(
        local.data.train.inputs, local.data.train.targets, epochs=2, batch_size=8,
        seed=local.seed(SEED_ROUND, 3), augmented=False,
    )  # fmt: skip
    for _, images, labels in batches:
        inputs = torch.from_numpy(Preprocessing().apply(images))
        loss = nn.functional.cross_entropy(model(inputs), torch.from_numpy(labels))
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()))
        with torch.no_grad():
            for (name, weight), gradient in zip(named.items(), gradients, strict=True):
                step = gradient + mu * (weight - anchor[name]) + training.weight_decay * weight
                if (pattern := state.pattern(name)) is not None:
                    mask = torch.zeros(pattern.num_weights)
                    mask[torch.from_numpy(pattern.positions())] = 1
                    step *= mask.view_as(step)
                speed[name].mul_(training.momentum).add_(step)
                weight.sub_(rate * speed[name])
    for name, value in float_state(model).items():
        found = reply.states[MODEL].dense_layer(name)
        np.testing.assert_allclose(found, value.numpy(), rtol=2e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("density", [None, 0.3])
def test_a_larger_term_keeps_clients_nearer(density: float | None) -> None:
    state, local = start(density), place()

    def distance(mu: float) -> float:
        after = values_of(train_near(question(state, mu), local))
        trained = [name for name in after if "running" not in name]
        return sum(float(((after[n] - state.values[n]) ** 2).sum()) for n in trained) ** 0.5

    distances = [distance(mu) for mu in (0.0, 1.0, 10.0)]
    assert distances[0] > distances[1] > distances[2] > 0


def test_a_question_without_its_number_is_refused() -> None:
    state, local = start(0.3), place()
    for mu in (None, "much", float("nan"), True):
        with pytest.raises(ClientError, match="mu"):
            train_near(train_request(RunState(0, state), fields={"mu": mu}), local)
    with pytest.raises(ClientError, match="'model'"):
        train_near(Request("train", fields={"mu": 0.1}), local)


@pytest.mark.parametrize("mu", [-0.1, float("inf"), float("nan")])
def test_a_term_that_cannot_be_is_refused(mu: float) -> None:
    with pytest.raises(ConfigError, match="mu"):
        FedProx(mu=mu)
