"""HeteroFL: masked training against torch in float64, statistics of the union of clients' data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from federation import tiny
from torch import nn

from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.local.site import Local, open_data, other_network
from fedprune.local.training import SEED_ROUND, epoch_batches
from fedprune.methods.base import RunState, Start
from fedprune.methods.heterofl import HeteroFL, last_tensors, train_masked
from fedprune.methods.widths import STATISTICS, measure
from fedprune.rounds.setup import Setup
from fedprune.rounds.workspace import open_workspace
from prunelab.data.batches import Preprocessing
from sparsemodel.layers.from_state import load_state_
from sparsemodel.plans.module import ProgramModule


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A federation whose clients lack classes."""
    config = tiny(
        method__name="heterofl", data__alpha=0.1, training__batch_size=16, model__width=8,
        training__lr=0.05, data__num_train=200,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("setup")
    open_workspace(config).lay_out(folder, with_start=True)
    return Setup(config, folder)


def begun(setup: Setup) -> tuple[HeteroFL, RunState]:
    method = setup.method
    assert isinstance(method, HeteroFL)

    def nobody(_: Any) -> Any:
        raise AssertionError("nobody is asked")

    start = Start(
        setup.start_state, setup.prunable, setup.blocks, nobody, 4, setup.config.seed,
        num_clients=4, program=setup.program,
    )  # fmt: skip
    return method, method.start(start)


def place(setup: Setup, client: int, request: Request) -> Local:
    data = open_data(setup.config, client, setup=str(setup.folder))
    network = setup.network if request.program is None else other_network(request.program)
    return Local(client, data, setup.config, network)


@pytest.mark.parametrize("client", [0, 1, 2, 3])
def test_masked_training_is_that_of_logits_set_to_zero(setup: Setup, client: int) -> None:
    """An epoch of SGD with momentum by autograd, the logits of lacking classes filled with 0."""
    method, state = begun(setup)
    request = method.request(state).of_each([client])[client]
    local = place(setup, client, request)
    reply = train_masked(request, local)
    request.check(reply)
    data, training = local.data.train, setup.config.training
    own = sorted(set(data.targets.tolist()))
    assert reply.fields["classes"] == own
    assert len(own) < 10
    assert local.network.program is not None
    model = ProgramModule(local.network.program)
    load_state_(model, request.state(MODEL))
    model.double().train()
    lacking = torch.ones(10, dtype=torch.bool)
    lacking[own] = False
    sgd = torch.optim.SGD(
        model.parameters(), training.lr, momentum=training.momentum,
        weight_decay=training.weight_decay,
    )  # fmt: skip
    for _, images, labels in epoch_batches(
        data.inputs, data.targets, epochs=training.local_epochs, batch_size=training.batch_size,
        seed=local.seed(SEED_ROUND, 0), augmented=False,
    ):  # fmt: skip
        logits = model(torch.from_numpy(Preprocessing().apply(images)).double())
        sgd.zero_grad()
        logits = logits.masked_fill(lacking, 0)
        nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        sgd.step()
    found, received = reply.states[MODEL].values, request.state(MODEL).values
    last = last_tensors(local.network.program)
    assert last == ["fc.weight", "fc.bias"]
    for name, value in found.items():
        expected = model.state_dict()[name].numpy()
        if name in last:  # what the client has no class for goes back as it came
            assert np.array_equal(value[lacking], received[name][lacking])
        kept = own if name in last else slice(None)
        np.testing.assert_allclose(value[kept], expected[kept], rtol=2e-3, atol=2e-4)


def test_static_statistics_are_those_of_the_union_of_data(setup: Setup) -> None:
    """Of full-width clients' training samples, in whatever order they answer."""
    method, state = begun(setup)
    members = method.plan(state).tiers[0].clients
    assert len(members) == 2
    asked: list[Request] = []

    def ask(request: Request, *, among: Any) -> Iterator[tuple[int, Reply]]:
        asked.append(request)
        assert among == set(members)
        for client in reversed(members):
            yield client, measure(request, place(setup, client, request))

    after = method.settle(replace(state, round_index=1), ask)
    assert len(asked) == 1
    assert asked[0].program is None
    answers = [
        (len(place(setup, c, asked[0]).data.train), measure(asked[0], place(setup, c, asked[0])))
        for c in members
    ]
    total = sum(count for count, _ in answers)
    for name, value in after.model.values.items():
        if name.endswith("running_mean"):
            variance = f"{name.removesuffix('mean')}var"
            parts = [(n, r.tensors[STATISTICS]) for n, r in answers]
            mean = sum(n * np.float64(s[name]) for n, s in parts) / total
            square = sum(n * (np.float64(s[variance]) + np.float64(s[name]) ** 2) for n, s in parts)
            np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                after.model.values[variance], square / total - mean**2, rtol=1e-4, atol=1e-6
            )
        elif not name.endswith("running_var"):
            assert np.array_equal(value, state.model.values[name])


def test_nobody_to_measure_leaves_the_statistics(setup: Setup) -> None:
    method, state = begun(setup)
    after = method.settle(state, lambda request, *, among: iter(()))
    for name, value in state.model.values.items():
        assert np.array_equal(after.model.values[name], value)


def test_after_the_last_round_every_tier_is_measured(setup: Setup) -> None:
    method, state = begun(setup)
    rates = []

    def ask(request: Request, *, among: Any) -> Iterator[tuple[int, Reply]]:
        rates.append(len(request.states[MODEL].values["conv1.weight"]) / 8)
        for client in sorted(among):
            yield client, measure(request, place(setup, client, request))

    after = method.settle(replace(state, round_index=4), ask)
    assert rates == [1, 0.5, 0.25]
    assert set(after.memory[STATISTICS]) == {"0.5", "0.25"}
    assert len(after.memory[STATISTICS]["0.25"]["bn1.running_var"]) == 2


@pytest.mark.parametrize("classes", [None, [], [0, 0], [10], [True], ["1"]])
def test_classes_that_are_none_are_refused(setup: Setup, classes: object) -> None:
    method, state = begun(setup)
    request = method.request(state)
    with pytest.raises(ClientError, match="field 'classes'"):
        request.check(Reply(1, {"loss": 1.0, "classes": classes}))


def test_scaled_networks_are_what_narrow_clients_train(setup: Setup) -> None:
    method, state = begun(setup)
    client = method.plan(state).tiers[2].clients[0]
    for scaler, eps in ((True, 1e-5 / 16), (False, 1e-5)):
        own = replace(method, scaler=scaler)
        program = own.request(state).of_each([client])[client].program
        assert program is not None
        norms = [node.eps for node in program.nodes if node.kind == "norm"]
        assert norms == pytest.approx([eps] * len(norms))
