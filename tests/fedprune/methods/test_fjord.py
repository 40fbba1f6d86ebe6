"""FjORD: ordered dropout against torch, steps of drawn widths on shared weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from federation import laid_out
from torch import nn
from torch.func import functional_call

from fedprune.device import budget
from fedprune.device.budget import fitting
from fedprune.device.home import parse_bytes
from fedprune.errors import ClientError
from fedprune.exchange.gate import is_statistic
from fedprune.exchange.messages import MODEL
from fedprune.local.model import Sgd
from fedprune.local.site import Local, open_data, other_network
from fedprune.methods.base import Start
from fedprune.methods.fjord import FjORD, OrderedDropout, train_ordered
from fedprune.rounds.setup import Setup
from fedprune.settings import TrainingConfig
from prunelab.data.batches import Preprocessing
from prunelab.networks import build_model, float_state
from sparsemodel.plans.module import ProgramModule
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.narrow import narrowed
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState

IMAGE = (1, 8, 8)
RATES = (1.0, 0.5, 0.25)


class Chosen:
    """Draws these widths."""

    def __init__(self, numbers: list[int]) -> None:
        self._numbers = iter(numbers)

    def integers(self, count: int) -> int:
        assert count == len(RATES)
        return next(self._numbers)


def start() -> tuple[list[Program], SparseState]:
    model = build_model("resnet8", num_classes=10, input_shape=IMAGE, seed=3, width=8)
    program = program_of(model, IMAGE)
    values = {name: value.numpy() for name, value in float_state(model).items()}
    return [narrowed(program, rate) for rate in RATES], SparseState(values)


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (12, *IMAGE), dtype=np.uint8), draw.integers(0, 10, 12)


def test_steps_are_those_of_torch_on_slices_of_the_weights() -> None:
    """Autograd through slices of float64 weights, torch's SGD over the whole ones."""
    programs, state = start()
    order = [1, 0, 2, 2, 0, 1]
    training = TrainingConfig(batch_size=12)
    model = OrderedDropout(state, programs, training, order=Chosen(order))  # type: ignore[arg-type]
    wide = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=not is_statistic(name))
        for name, value in state.values.items()
    }
    trained = [tensor for tensor in wide.values() if tensor.requires_grad]
    sgd = torch.optim.SGD(trained, 0.05, momentum=0.9, weight_decay=1e-3)
    modules = [ProgramModule(program).double().train() for program in programs]
    for step, number in enumerate(order):
        images, labels = batch(step)
        loss = model.step(images, labels, sgd=Sgd(0.05, 0.9, 1e-3))
        own = {
            name: wide[name][tuple(slice(size) for size in shape)]
            for name, shape in programs[number].shapes().items()
        }
        inputs = torch.from_numpy(Preprocessing().apply(images)).double()
        logits = functional_call(modules[number], own, (inputs,))
        expected = nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        sgd.zero_grad()
        expected.backward()  # a gradient of 0 outside the slices
        sgd.step()
        assert loss == pytest.approx(expected.item(), rel=1e-3)
    found = model.state().values
    assert list(found) == list(state.values)
    for name, tensor in wide.items():
        if not is_statistic(name):
            np.testing.assert_allclose(
                found[name], tensor.detach().numpy(), rtol=2e-3, atol=2e-4, err_msg=name
            )


def test_running_statistics_are_those_of_full_steps() -> None:
    programs, state = start()
    training = TrainingConfig(batch_size=12)
    model = OrderedDropout(state, programs, training, order=Chosen([1, 2, 0]))  # type: ignore[arg-type]
    images, labels = batch(0)
    for _ in range(2):
        model.step(images, labels, sgd=Sgd(0.0, 0.0, 0.0))
        assert np.array_equal(
            model.state().values["bn1.running_mean"], state.values["bn1.running_mean"]
        )
    model.step(images, labels, sgd=Sgd(0.0, 0.0, 0.0))
    module = ProgramModule(programs[0]).train()
    module.load_state_dict({n: torch.from_numpy(v) for n, v in state.values.items()}, strict=False)
    module(torch.from_numpy(Preprocessing().apply(images)))
    for name, value in model.state().values.items():
        np.testing.assert_allclose(value, module.state_dict()[name].numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return laid_out(tmp_path_factory.mktemp("setup"), method__name="fjord", training__batch_size=16)


def test_each_tier_trains_the_widths_up_to_its_own(setup: Setup) -> None:
    """And its operations are the mean of theirs; the narrowest trains its own alone."""
    method = setup.method
    assert isinstance(method, FjORD)
    server = Start(
        setup.start_state, setup.prunable, setup.blocks, lambda request: iter(()), 4, 7,
        num_clients=4, program=setup.program,
    )  # fmt: skip
    state = method.start(server)
    plan, base = method.plan(state), method.request(state)
    macs = [sum(tier.program.layer_macs().values()) for tier in plan.tiers]
    for number, tier in enumerate(plan.tiers):
        client = tier.clients[0]
        request = base.of_each([client])[client]
        assert len(request.fields.get("widths", [])) == 2 - number
        assert request.macs == (round(np.mean(macs[number:])) if number < 2 else 0)
        network = setup.network if request.program is None else other_network(request.program)
        data = open_data(setup.config, client, setup=str(setup.folder))
        local = Local(client, data, setup.config, network)
        reply, again = train_ordered(request, local), train_ordered(request, local)
        request.check(reply)
        for name, value in reply.states[MODEL].values.items():
            assert value.shape == tier.shapes[name]
            assert np.array_equal(value, again.states[MODEL].values[name])


def test_a_device_counts_all_widths_that_it_holds(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "rss_bytes", lambda: 0)  # figures have three digits
    method = setup.method
    server = Start(
        setup.start_state, {}, {}, lambda request: iter(()), 4, 7,
        num_clients=4, program=setup.program,
    )  # fmt: skip
    state = method.start(server)
    request = method.request(state)
    assert setup.program is not None
    data = open_data(setup.config, 0, setup=str(setup.folder))
    local = Local(0, data, setup.config, other_network(setup.program))
    figures = []
    for fields in ({}, request.fields):
        told = fitting(local, replace(request, fields=fields), budget=10**12)[1]
        figures.append(parse_bytes(told.rpartition("; ")[2].removesuffix(" at most")))
    assert figures[0] + 3 * 10**6 < figures[1]
    tiers = method.plan(state).tiers  # type: ignore[attr-defined]
    assert method.networks(request, setup.program) == [tier.program for tier in tiers]


@pytest.mark.parametrize("widths", [3, [3], [["a"]], [[1, 2]], [[99] * 10]])
def test_widths_that_are_none_are_refused(setup: Setup, widths: object) -> None:
    method = setup.method
    server = Start(
        setup.start_state, {}, {}, lambda request: iter(()), 4, 7,
        num_clients=4, program=setup.program,
    )  # fmt: skip
    request = method.request(method.start(server))
    local = Local(
        0, open_data(setup.config, 0, setup=str(setup.folder)), setup.config, setup.network
    )
    request.fields["widths"] = widths  # type: ignore[index]
    with pytest.raises(ClientError, match="field 'widths'"):
        train_ordered(request, local)
