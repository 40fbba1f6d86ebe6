"""Questions about another network than the run's: growth, uplink, what is held, lost and sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from federation import run_inline, tiny
from flwr.app import ConfigRecord, Context, Message

import fedprune
from fedprune.config import RunConfig
from fedprune.device.budget import fitting
from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.flower import client, wire
from fedprune.flower.batched import BatchedGrid
from fedprune.flower.inline import InlineGrid
from fedprune.local.model import RuntimeModel, Sgd, open_model, uses_runtime
from fedprune.local.site import Local, open_data, other_network
from fedprune.local.torch_models import DenseModel
from fedprune.methods import Collector, Pooled, RunState, Start, train, train_request
from fedprune.rounds.folder import read_metrics, read_summary
from fedprune.rounds.ledger import forward_flops
from fedprune.rounds.loop import _asking
from fedprune.rounds.setup import Setup
from fedprune.rounds.workspace import open_workspace
from prunelab.errors import RunError
from sparsemodel.runtime.narrow import leading, narrowed
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState

GROWN = {"layer2.0.conv1.weight": 5, "layer3.0.conv2.weight": 9}
GOT: dict[tuple[int, int], Reply] = {}
"""(round, client) -> the answer, of the run that was made last."""


class WideMean:
    """The mean of the first client's answers alone; all are kept in GOT."""

    def __init__(self, round_index: int) -> None:
        self._round, self._clients = round_index, list[int]()

    def add(self, client: int, reply: Reply) -> None:
        GOT[self._round, client] = reply
        self._clients.append(client)

    def result(self) -> Pooled:
        model = GOT[self._round, 0].states[MODEL]
        return Pooled(sorted(self._clients), 1, states={MODEL: model})


@dataclass(frozen=True)
class HalfWidth(fedprune.Magnitude):
    """Odd clients are asked about a network of half the width, pruned too; all send growth."""

    name: ClassVar[str] = "half-width"
    collects: ClassVar[bool] = True

    def start(self, server: Start) -> RunState:
        assert server.program is not None
        assert server.num_clients == 4
        return replace(super().start(server), memory={"program": server.program.text()})

    def request(self, state: RunState) -> Request:
        program = half(state.memory["program"])
        wide = train_request(state, growth=GROWN)
        own = train_request(replace(state, model=narrow(state.model, program)), growth=GROWN)
        own = replace(own, program=program)
        return replace(wide, personal=lambda client: own if client % 2 else wide)

    def collector(self, state: RunState) -> Collector:
        return WideMean(state.round_index)


@cache
def half(text: str) -> Program:
    return narrowed(Program.parse(text), 0.5)


def narrow(state: SparseState, program: Program) -> SparseState:
    """The leading slices of a pruned state, under what they have of its mask."""
    assert state.patterns is not None
    whole = leading(SparseState(state.dense()), program.shapes())
    patterns = {
        name: Pattern.from_positions(program.shapes()[name], np.flatnonzero(whole.values[name]))
        for name in state.patterns
    }
    values = {
        name: value.reshape(-1)[patterns[name].positions()] if name in patterns else value
        for name, value in whole.values.items()
    }
    return SparseState(values, Patterns(patterns))


Part = tuple[dict[str, Any], Mapping[str, bytes]]


class Nodes:
    """Clients that note what they are sent, and may lose what they hold before a round."""

    def __init__(self, lost: tuple[int, int] = (-1, -1)) -> None:
        self.sent: dict[int, list[Part]] = {}
        self._lost = lost

    def __call__(self, message: Message, context: Context) -> Message | None:
        number = int(str(context.node_config["partition-id"]))
        header, frames = wire.read_record(message.content)
        if (number, header["r"]) == self._lost and "p" not in frames:
            context.state["held"] = ConfigRecord()
        if header["a"] == "train":
            self.sent.setdefault(number, []).append((header, frames))
        return client.app(message, context)


def run(
    out: Path, nodes: Nodes | None = None, *, grid: type[InlineGrid] = InlineGrid, **changes: Any
) -> Path:
    GOT.clear()
    return run_inline(settings(**changes), out, clients=nodes, grid=grid)


def settings(**changes: Any) -> RunConfig:
    values = {"training__rounds": 2, "training__batch_size": 16, "model__width": 8, **changes}
    return replace(tiny(**values), method=HalfWidth(density=0.3))


@pytest.fixture(scope="module", name="setup")
def fixture_setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("setup")
    open_workspace(settings()).lay_out(folder, with_start=False)
    return Setup(settings(), folder)


@pytest.fixture(scope="module", name="program")
def fixture_program(setup: Setup) -> Program:
    """Of the narrow clients."""
    assert setup.program is not None
    return narrowed(setup.program, 0.5)


def test_narrow_clients_train_and_grow_their_own_network(
    setup: Setup, program: Program, tmp_path: Path
) -> None:
    """To the bits of the client half by itself; programs and masks travel once."""
    nodes = Nodes()
    out = run(tmp_path / "run", nodes)
    assert [line["skipped"] for line in read_metrics(out)[1:]] == [[], []]
    for number, parts in nodes.sent.items():
        brought = [("p" in frames, "m0" in frames) for _, frames in parts]
        assert brought == [(True, True), (False, False)]
        assert all(header.get("o", False) == bool(number % 2) for header, _ in parts)
    few, many = ([len(nodes.sent[n][0][1][key]) for key in ("m0", "w0")] for n in (1, 0))
    assert all(2 * small < large for small, large in zip(few, many, strict=True))
    after = GOT[0, 0].states[MODEL]
    asked = train_request(RunState(1, narrow(after, program)), growth=GROWN)
    for number in (1, 3):
        data = open_data(setup.config, number, setup=str(setup.folder))
        expected = train(asked, Local(number, data, setup.config, other_network(program)))
        found = GOT[1, number]
        assert found.states[MODEL].patterns == asked.states[MODEL].patterns
        for name, value in expected.states[MODEL].values.items():
            assert np.array_equal(found.states[MODEL].values[name], value)
        for name, (indices, values) in expected.entries[MODEL].items():
            assert len(indices) == GROWN[name]
            assert np.array_equal(found.entries[MODEL][name][0], indices)
            assert np.array_equal(found.entries[MODEL][name][1], values)


def test_the_account_takes_each_network_for_what_it_is(
    setup: Setup, program: Program, tmp_path: Path
) -> None:
    """Forward and twice backward under each client's own mask, and a mini-batch for growth."""
    total = 0
    out = run(tmp_path / "run")
    for (_, number), reply in GOT.items():
        macs = program.layer_macs() if number % 2 else setup.layer_macs
        forward = forward_flops(macs, reply.states[MODEL])
        once = 2 * forward + 2 * sum(macs[name] for name in GROWN)
        total += 3 * forward * reply.num_examples + once * min(16, reply.num_examples)
    dense = 6 * sum(setup.layer_macs.values()) * sum(r.num_examples for r in GOT.values())
    assert read_summary(out)["train_flops_ratio"] == pytest.approx(total / dense, rel=1e-12)


def test_a_narrow_client_that_lost_its_program_is_sent_it_again(tmp_path: Path) -> None:
    nodes = Nodes(lost=(3, 1))
    run(tmp_path / "whole")
    expected = dict(GOT)
    out = run(tmp_path / "lost", nodes)
    assert [line["skipped"] for line in read_metrics(out)[1:]] == [[], []]
    assert [("p" in frames) for _, frames in nodes.sent[3]] == [True, False, True]
    for key, reply in expected.items():
        for name, value in reply.states[MODEL].values.items():
            assert np.array_equal(GOT[key].states[MODEL].values[name], value)


@pytest.mark.parametrize(
    "changes",
    [
        {"federation__value_dtype": "bf16"},
        {"federation__uplink_dtype": "int8", "federation__uplink_topk": 0.3},
    ],
)
def test_narrow_models_travel_in_fewer_bytes(changes: dict[str, Any], tmp_path: Path) -> None:
    """Changes of the narrow network, with its own residual."""
    exact = read_summary(run(tmp_path / "exact"))
    models = {key: reply.states[MODEL] for key, reply in GOT.items()}
    out = run(tmp_path / "few", **changes)
    assert [line["skipped"] for line in read_metrics(out)[1:]] == [[], []]
    assert read_summary(out)["bytes_up"] < 0.8 * exact["bytes_up"]
    for number in (1, 3):
        found, expected = GOT[0, number].states[MODEL], models[0, number]
        assert found.shapes() == expected.shapes()
        for name, value in expected.values.items():
            np.testing.assert_allclose(found.values[name], value, atol=0.15)


class Two(BatchedGrid):
    """Two clients at a time."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, size=2, **named)


def test_clients_that_are_trained_together_are_asked_one_by_one(tmp_path: Path) -> None:
    """The batched engine stacks the run's network alone; narrow answers are the inline ones."""
    run(tmp_path / "inline")
    expected = dict(GOT)
    out = run(tmp_path / "batched", grid=Two)
    assert [line["skipped"] for line in read_metrics(out)[1:]] == [[], []]
    for name, value in expected[0, 1].states[MODEL].values.items():
        assert np.array_equal(GOT[0, 1].states[MODEL].values[name], value)


def test_what_computes_another_network(program: Program) -> None:
    """The runtime wherever it can, dense states too; else a module of the program's operations."""
    draw = np.random.default_rng(0)
    dense = SparseState(
        {
            name: np.float32(
                draw.uniform(0.5, 1.5, shape) if len(shape) == 1 else 0.3 * draw.normal(size=shape)
            )
            for name, shape in program.shapes().items()
        }
    )
    network, training = other_network(program), settings().training
    images = draw.integers(0, 256, (16, *program.input_shape), dtype=np.uint8)
    labels = draw.integers(0, 10, 16)
    ours, theirs = open_model(network, dense, training), DenseModel(network.build, dense, training)
    assert isinstance(ours, RuntimeModel)
    for _ in range(3):
        for model in (ours, theirs):
            model.step(images, labels, sgd=Sgd(0.05, 0.9, 0.0))
    for name, value in theirs.state().values.items():
        np.testing.assert_allclose(ours.state().values[name], value, rtol=1e-3, atol=1e-4)
    masked = replace(training, execution="masked")
    assert isinstance(open_model(network, dense, masked), RuntimeModel)
    on_gpu = replace(training, device="cuda")
    assert not uses_runtime(network, dense, on_gpu)
    own = replace(network, other=False)  # the run's own network: dense ones by name alone
    assert not uses_runtime(own, dense, training)
    assert uses_runtime(own, dense, replace(training, execution="sparse"))


def test_single_answers_after_a_round_are_not_to_be_had_under_secure_sums(setup: Setup) -> None:
    hidden = RunConfig.parse({"method.name": "magnitude", "privacy.secure_aggregation": True})
    ask = _asking(replace(setup, config=hidden), None, None, RunState(1, SparseState({})))  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"asks 'measure' of single clients, and privacy\.secure"):
        list(ask(Request("measure"), among=[0]))


def test_a_device_tells_what_a_narrow_network_needs(setup: Setup, program: Program) -> None:
    """Of dense states too, and refuses below it."""
    data = open_data(setup.config, 0, setup=str(setup.folder))
    local = Local(0, data, setup.config, other_network(program))
    state = SparseState({n: np.ones(shape, np.float32) for n, shape in program.shapes().items()})
    request = train_request(RunState(0, state))
    assert fitting(local, request, budget=10**12)[1].startswith("as the run is set")
    with pytest.raises(ClientError, match="is too small: the process would need"):
        fitting(local, request, budget=10**6)
