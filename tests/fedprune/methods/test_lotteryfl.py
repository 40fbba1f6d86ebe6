"""LotteryFL: a ticket is pruned, rewound and trained; where tickets overlap they are averaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import digest, run_inline, tiny
from flwr.app import Context, Message
from places import dense_state, place, prunable, state_at, values_of

from fedprune.config import RunConfig
from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.flower import client
from fedprune.local.model import open_model
from fedprune.local.site import open_data
from fedprune.local.training import train
from fedprune.methods.base import RunState, Start, train_request
from fedprune.methods.lotteryfl import PRUNED, START, LotteryFL, TicketMean, train_ticket
from fedprune.rounds.folder import MODEL as MODEL_FILE
from fedprune.rounds.folder import read_checkpoint, read_metrics
from fedprune.rounds.setup import Setup
from fedprune.rounds.workspace import open_workspace
from prunelab.errors import DataWarning, RunError
from sparsemodel.runtime.adjust import carry
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state

NAMES = list(prunable())


def trained_state() -> SparseState:
    """Not the start: what has been trained since."""
    noise = np.random.default_rng(1)
    start = dense_state()
    moved = {
        name: value + noise.normal(0, 0.05, value.shape).astype(np.float32)
        for name, value in start.values.items()
        if "running" not in name
    }
    return start.replace(moved)


def state(density: float | None = None) -> RunState:
    """Of a run in which client 0 has a ticket of that density, or none."""
    kept = {START: dense_state()}
    if density is not None:
        layers = SparseState({name: dense_state().values[name] for name in NAMES})
        patterns = state_at(density).patterns
        assert patterns is not None
        kept["ticket-0"] = carry(layers, patterns)
    return RunState(3, trained_state(), {"layers": NAMES}, kept=kept)


def question(density: float | None, **settings: Any) -> Request:
    asked = LotteryFL(**settings).request(state(density))
    return asked.of_each([0])[0]


@pytest.mark.parametrize("density", [None, 0.3])
def test_a_ticket_that_does_badly_is_trained_as_it_is(density: float | None) -> None:
    asked, local = question(density, threshold=1.0), place(method="lotteryfl")
    ours = train_ticket(asked, local)
    check_parts(ours, asked)
    theirs = train(train_request(RunState(3, asked.states[MODEL])), local)
    assert all(np.array_equal(v, values_of(ours)[n]) for n, v in values_of(theirs).items())
    assert not any(mask.num_active for mask in ours.masks[PRUNED].values())


@pytest.mark.parametrize("density", [None, 0.3])
def test_a_ticket_that_does_well_is_pruned_rewound_and_trained(density: float | None) -> None:
    """The smallest fifth of each layer goes, by what was received; the rest begins anew."""
    asked, local = question(density, threshold=0.0), place(method="lotteryfl")
    ours = train_ticket(asked, local)
    check_parts(ours, asked)
    received, start, patterns = asked.states[MODEL], dense_state(), {}
    for name in NAMES:
        pattern = received.pattern(name) or Pattern.full(received.values[name].shape)
        order = np.argsort(abs(received.values[name].reshape(-1)), kind="stable")
        lost = order[: len(order) // 5]
        gone = np.sort(pattern.positions()[lost])
        assert np.array_equal(ours.masks[PRUNED][name].positions(), gone)
        left = np.setdiff1d(pattern.positions(), gone)
        patterns[name] = Pattern.from_positions(pattern.shape, left)
    rewound = carry(start, Patterns(patterns))
    theirs = train(train_request(RunState(3, rewound)), local).states[MODEL]
    assert ours.states[MODEL].patterns == received.patterns
    for name, value in theirs.dense().items():
        assert np.array_equal(ours.states[MODEL].dense_layer(name), value)


def test_a_ticket_is_cut_until_it_has_its_density() -> None:
    """.3 of 100, a fifth at a time, to .2: 6, 4 and no more, and then nobody asks for it."""
    method = LotteryFL(density=0.2)
    model = SparseState({"w": np.zeros((10, 10), np.float32)})
    now = RunState(0, model, {"layers": ["w"]}, kept={START: model})
    counts = []
    for active in (100, 30, 24, 20):
        patterns = Patterns({"w": Pattern.from_positions((10, 10), np.arange(active))})
        counts.append(method.pruned_counts(now, patterns)["w"])
    assert counts == [20, 6, 4, 0]
    assert method.pruned_counts(now, None) == {"w": 20}
    ticket = SparseState({"w": np.zeros(20, np.float32)}, patterns)
    done = method.request(replace(now, kept={**now.kept, "ticket-1": ticket})).of_each([0, 1])
    assert "prune" in done[0].fields
    assert not done[1].fields
    assert list(done[1].states) == [MODEL]
    assert done[1].states[MODEL].patterns == patterns


def told(values: list[float], kept: list[int] | None, gone: list[int], weight: int) -> Reply:
    """An answer for a layer of four and a bias."""
    patterns = None
    if kept is not None:
        patterns = Patterns({"w": Pattern.from_positions((2, 2), np.array(kept))})
    layer = np.float32(values) if kept is not None else np.float32(values).reshape(2, 2)
    states = {MODEL: SparseState({"w": layer, "b": np.float32([weight])}, patterns)}
    masks = {PRUNED: Patterns({"w": Pattern.from_positions((2, 2), np.array(gone, np.int64))})}
    return Reply(weight, {"loss": 1.0}, states=states, masks=masks)


def meaned(order: list[int]) -> tuple[SparseState, dict[str, SparseState]]:
    before = SparseState({"w": np.float32([[9, 9], [9, 9]]), "b": np.float32([0])})
    start = SparseState({"w": np.float32([[5, 6], [7, 8]]), "b": np.float32([0])})
    now = RunState(0, before, {"layers": ["w"]}, kept={START: start})
    replies = [told([1, 2], [0, 1], [], 1), told([4, 8, 0], [0, 1, 2], [2], 3)]
    mean = TicketMean(now, ["w"], lambda client: {"w": 1})
    for number in order:
        mean.add(number, replies[number])
    states = dict(mean.result().states)
    return states.pop(MODEL), states


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_weights_are_averaged_where_tickets_overlap(order: list[int]) -> None:
    """1 and 4 weigh 1 and 3: 13/4; 2 and 8: 26/4; what both have pruned keeps its 9."""
    model, tickets = meaned(order)
    assert model.values["w"].tolist() == [[3.25, 6.5], [9, 9]]
    assert model.values["b"].tolist() == [2.5]
    assert list(tickets) == ["ticket-1"]
    assert tickets["ticket-1"].values["w"].tolist() == [5, 6]


def test_one_client_s_weight_is_its_own() -> None:
    before = SparseState({"w": np.float32([[9, 9], [9, 9]]), "b": np.float32([0])})
    now = RunState(0, before, {"layers": ["w"]}, kept={START: before})
    mean = TicketMean(now, ["w"], lambda client: {"w": 1})
    mean.add(0, told([1, 2], [0, 1], [], 1))
    mean.add(1, told([4, 8, 0, 6], None, [2], 3))
    assert mean.result().model.values["w"].tolist() == [[3.25, 6.5], [9, 6]]


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        (told([1, 2], [0, 1], [0, 1], 1), "nobody asked"),
        (told([1, 2], [0, 1], [3], 1), "not active"),
    ],
)
def test_prunings_that_cannot_be_are_refused(reply: Reply, match: str) -> None:
    before = SparseState({"w": np.float32([[9, 9], [9, 9]]), "b": np.float32([0])})
    now = RunState(0, before, {"layers": ["w"]}, kept={START: before})
    mean = TicketMean(now, ["w"], lambda client: {"w": 1})
    with pytest.raises(ClientError, match=match):
        mean.add(0, reply)


def test_without_a_pruning_it_is_federated_averaging(tmp_path: Path) -> None:
    common = {"training__rounds": 2, "method__threshold": 1.0}
    outs = [
        run_inline(tiny(method__name=n, **common), tmp_path / n) for n in ("lotteryfl", "fedavg")
    ]
    found, expected = (load_state(out / MODEL_FILE)[0] for out in outs)
    assert found.patterns is None
    assert all(np.array_equal(v, found.values[name]) for name, v in expected.values.items())


def pruning(**changes: Any) -> RunConfig:
    """Every client that tells anything right prunes half of its weights."""
    settings = {"method__threshold": 0.0, "method__prune_rate": 0.5, **changes}
    return tiny(method__name="lotteryfl", training__rounds=3, **settings)


def test_a_run_s_tickets_get_to_their_density_and_it_can_go_on(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_inline(pruning(), first)

    def stopping(message: Message, context: Context) -> Message:
        if message.metadata.group_id == "3":
            raise KeyboardInterrupt
        return client.app(message, context)

    with pytest.raises(KeyboardInterrupt):
        run_inline(pruning(), second, clients=stopping)
    run_inline(pruning(), second, resume=True)
    assert digest(first) == digest(second)
    checkpoint = read_checkpoint(first)
    assert checkpoint is not None
    tickets = [s for name, s in checkpoint.state.kept.items() if name != START]
    densities = [s.patterns.density for s in tickets if s.patterns is not None]
    assert len(densities) == 4
    assert min(densities) == pytest.approx(0.2, rel=0.02)
    sent = [line["bytes_up"] for line in read_metrics(first) if "train_loss" in line]
    assert sent[2] < sent[1] < sent[0]


def test_clients_test_their_own_tickets(tmp_path: Path) -> None:
    config = pruning(federation__evaluate="clients", data__num_train=200)
    with pytest.warns(DataWarning, match="left aside"):
        out = run_inline(config, tmp_path / "run")
    open_workspace(config).lay_out(tmp_path / "setup", with_start=True)
    setup = Setup(config, tmp_path / "setup")
    checkpoint = read_checkpoint(out)
    assert checkpoint is not None
    own = config.method.personal(checkpoint.state)
    assert own is not None
    told_of = {line["client"]: line for line in read_metrics(out)[-1]["test_clients"]}
    assert any(own(number).patterns is not None for number in told_of)
    for number, line in told_of.items():
        model = open_model(setup.network, own(number).ordered(setup.shapes), config.training)
        test = open_data(config, number, setup=str(setup.folder)).test
        score = model.evaluate(test.inputs, test.targets)
        assert line["loss"] == pytest.approx(score.loss_sum / len(test), rel=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": ["what"]},
        {"layers": None},
        {"prune": [1]},
        {"prune": [10**6] * len(NAMES)},
        {"threshold": "much"},
    ],
)
def test_questions_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    asked = question(None)
    odd = replace(asked, fields={**asked.fields, **fields})
    with pytest.raises(ClientError, match=next(iter(fields))):
        train_ticket(odd, place(method="lotteryfl"))


@pytest.mark.parametrize("metric", ["mae", ""])
def test_a_task_that_is_not_right_or_wrong_is_refused(metric: str) -> None:
    """Where a large error would count as doing well."""
    start = Start(dense_state, prunable(), {}, lambda request: iter(()), 3, 0, metric=metric)
    with pytest.raises(RunError, match="this task has no accuracy"):
        LotteryFL().start(start)


@pytest.mark.parametrize("setting", [{"prune_rate": 1.0}, {"prune_rate": 0.0}, {"threshold": 1.5}])
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        LotteryFL(**setting)
