"""Width tiers: who is in them, means over the clients that have a coordinate, whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import digest, run_inline, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.config import RunConfig
from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.messages import MODEL, Reply, Resources
from fedprune.methods import HeteroFL
from fedprune.methods.base import RunState, Start
from fedprune.methods.widths import TierMean, assigned, parse_tiers
from fedprune.rounds.folder import read_metrics, read_summary
from prunelab.errors import RunError
from sparsemodel.runtime.narrow import leading
from sparsemodel.runtime.program import Node, Program
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state

PROGRAM = Program(
    (3,),
    (
        Node("input"),
        Node("conv", (0,), weight="a.weight", bias="a.bias"),
        Node("norm", (1,), weight="n.weight", mean="n.running_mean", variance="n.running_var"),
        Node("conv", (2,), weight="b.weight", bias="b.bias"),
    ),
    (
        ("a.weight", (8, 3)), ("a.bias", (8,)), ("n.weight", (8,)), ("n.running_mean", (8,)),
        ("n.running_var", (8,)), ("b.weight", (4, 8)), ("b.bias", (4,)),
    ),
)  # fmt: skip


def drawn(seed: int, *, shapes: Any = None) -> SparseState:
    draw = np.random.default_rng(seed)
    return SparseState(
        {
            name: abs(draw.normal(size=shape)).astype(np.float32)
            for name, shape in (shapes or PROGRAM.shapes()).items()
        }
    )


def begun(method: HeteroFL, clients: int = 6) -> RunState:
    def nobody(_: Any) -> Any:
        raise AssertionError("nobody is asked")

    return method.start(
        Start(lambda: drawn(0), {}, {}, nobody, 3, 1, num_clients=clients, program=PROGRAM)
    )


# --- tiers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "expected 'rate:share"), ("1:1, 2:1", "expected 'rate"), ("1:0", "expected 'rate"),
     ("1:1, 1:2", "expected 'rate"), ("0.5:1", "expected 1 as the largest rate, got 0.5"),
     ("1:nan", "expected 'rate"), ("wide", "expected 'rate")],
)  # fmt: skip
def test_tiers_that_are_none_are_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"method.tiers: {why}"):
        RunConfig.parse({"method.name": "heterofl", "method.tiers": text})


@given(
    shares=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    clients=st.integers(1, 200),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_shares_are_kept_to_a_client(shares: list[float], clients: int, seed: int) -> None:
    number = assigned(shares, clients, seed=seed)
    assert np.array_equal(number, assigned(shares, clients, seed=seed))
    counts = np.bincount(number, minlength=len(shares))
    assert counts.sum() == clients
    assert (abs(counts - np.array(shares) / sum(shares) * clients) < 1 + 1e-6).all()


def test_another_seed_draws_others_and_each_tier_needs_a_client() -> None:
    assert not np.array_equal(assigned([1, 1], 40, seed=0), assigned([1, 1], 40, seed=1))
    with pytest.raises(RunError, match=r"gives none of 2 clients the rate 0\.25"):
        begun(HeteroFL(), clients=2)
    assert list(parse_tiers("0.5, 1: 3")) == [1.0, 0.5]


def test_a_network_without_a_program_is_refused(tmp_path: Path) -> None:
    config = tiny(method__name="fjord", model__name="smooth_network:smooth", model__width=0)
    with pytest.raises(RunError, match="fjord makes narrower networks of the run's program, and"):
        run_inline(config, tmp_path / "run")


def test_a_scaler_without_batch_norms_is_refused_with_its_cure() -> None:
    program = Program(
        (3,),
        (Node("input"), Node("conv", (0,), weight="a"), Node("relu", (1,)),
         Node("conv", (2,), weight="b")),
        (("a", (8, 3)), ("b", (4, 8))),
    )  # fmt: skip
    server = Start(
        lambda: drawn(0), {}, {}, lambda request: iter(()), 3, 1, num_clients=6, program=program
    )
    with pytest.raises(RunError, match=r"no batch norm follows it, .* set method\.scaler to false"):
        HeteroFL().start(server)
    assert len(HeteroFL(scaler=False).start(server).notes["tiers"]) == 3


# --- means -------------------------------------------------------------------------------------


def replies(method: HeteroFL, state: RunState) -> dict[int, Reply]:
    """Each client's answer, of its tier's shapes, and of some classes."""
    plan, found = method.plan(state), {}
    for client in range(6):
        shapes = plan.tiers[plan.tier_of(client)].shapes
        classes = [c for c in range(4) if (client + c) % 3]
        found[client] = Reply(
            5 + client, {"loss": 1.0, "classes": classes}, {MODEL: drawn(9 + client, shapes=shapes)}
        )
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_each_coordinate_is_the_mean_of_those_that_have_it(masked: bool) -> None:
    """Against a loop over single numbers in float64; in whatever order answers come."""
    method = HeteroFL(masked_loss=masked)
    state = begun(method)
    answers, plan = replies(method, state), method.plan(state)
    models = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]):
        collector = method.collector(state)
        for client in order:
            collector.add(client, answers[client])
        pooled = collector.result()
        assert pooled.clients == [0, 1, 2, 3, 4, 5]
        models.append(pooled.model.values)
    assert all(np.array_equal(models[0][name], value) for name, value in models[1].items())
    widest = [c for c in range(6) if plan.tier_of(c) == 0]
    for name, before in state.model.values.items():
        for place in np.ndindex(before.shape):
            total = weight = 0.0
            for client, reply in answers.items():
                value = reply.states[MODEL].values[name]
                has = all(i < size for i, size in zip(place, value.shape, strict=True))
                if "running" in name:
                    has = client in widest
                if masked and name.startswith("b.") and place[0] not in reply.fields["classes"]:
                    has = False
                if has:
                    own = float(value[place])
                    if name.endswith("running_var"):
                        own += float(reply.states[MODEL].values["n.running_mean"][place]) ** 2
                    total, weight = total + reply.weight * own, weight + reply.weight
            expected = total / weight if weight else float(before[place])
            if name.endswith("running_var"):
                expected -= float(models[0]["n.running_mean"][place]) ** 2
            assert models[0][name][place] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_what_nobody_has_stays_as_it_was_to_the_bit() -> None:
    method = HeteroFL(masked_loss=False)
    state = begun(method)
    plan, collector = method.plan(state), method.collector(state)
    narrow = next(c for c in range(6) if plan.tier_of(c) == 2)
    reply = replies(method, state)[narrow]
    collector.add(narrow, reply)
    model = collector.result().model
    for name, before in state.model.values.items():
        own = reply.states[MODEL].values[name]
        expected = before.copy()
        if "running" not in name:
            expected[tuple(slice(size) for size in own.shape)] = own
        assert np.array_equal(model.values[name], expected)


@pytest.mark.parametrize("name", ["a.weight", "n.running_var", "b.weight"])
def test_a_refused_answer_leaves_no_trace(name: str) -> None:
    method = HeteroFL()
    state = begun(method)
    answers = replies(method, state)
    clean, other = method.collector(state), method.collector(state)
    for client in (0, 1, 2):
        clean.add(client, answers[client])
        other.add(client, answers[client])
    bad = answers[3].states[MODEL]
    bad = bad.replace({name: np.full_like(bad.values[name], np.nan)})
    with pytest.raises(ClientError, match="NaN or infinite"):
        other.add(3, replace(answers[3], states={MODEL: bad}))
    for key, value in clean.result().model.values.items():
        assert np.array_equal(other.result().model.values[key], value)


def test_what_a_client_of_each_tier_held_is_kept() -> None:
    method = HeteroFL(masked_loss=False)
    state = begun(method)
    collector = TierMean(method.plan(state), state.model)
    for client, reply in replies(method, state).items():
        collector.add(client, replace(reply, resources=Resources(100 + client, 1)))
    held = collector.result().fields["held"]
    plan = method.plan(state)
    assert held == {f"{tier.rate:g}": 100 + max(tier.clients) for tier in plan.tiers}


# --- whole runs --------------------------------------------------------------------------------

EQUAL = {"method__tiers": "1", "method__static_norm": False, "method__masked_loss": False}


def trained(config: RunConfig, out: Path) -> SparseState:
    return load_state(run_inline(config, out) / "model.safetensors")[0]


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory: pytest.TempPathFactory) -> SparseState:
    config = tiny(method__name="fedavg", training__rounds=2)
    return trained(config, tmp_path_factory.mktemp("fedavg") / "run")


@pytest.mark.parametrize("name", ["heterofl", "fjord"])
def test_with_all_clients_of_the_full_width_it_is_fedavg(
    name: str, fedavg: SparseState, tmp_path: Path
) -> None:
    """To the bit: the same network and steps, and the same integers are added up."""
    config = tiny(method__name=name, training__rounds=2, **EQUAL)
    model = trained(config, tmp_path / "run")
    assert list(model.values) == list(fedavg.values)
    for key, value in fedavg.values.items():
        assert np.array_equal(model.values[key], value)


@pytest.mark.parametrize("name", ["heterofl", "fjord"])
def test_a_run_of_three_widths(name: str, tmp_path: Path) -> None:
    """The same bits twice; what a client of each tier holds, sends and computes is told."""
    config = tiny(method__name=name, training__rounds=2)
    first, second = (run_inline(config, tmp_path / place) for place in ("a", "b"))
    assert digest(first) == digest(second)
    start, *rounds = read_metrics(first)
    assert [line["skipped"] for line in rounds] == [[], []]
    assert [line["clients"] for line in rounds] == [[0, 1, 2, 3]] * 2
    summary = read_summary(first)
    tiers = summary["tiers"]
    assert [tier["rate"] for tier in tiers] == [1, 0.5, 0.25]
    assert [tier["clients"] for tier in tiers] == [2, 1, 1]
    assert tiers[0]["model_bytes"] == summary["bytes_dense_round"]
    for wide, narrow in pairwise(tiers):
        assert narrow["model_bytes"] < 0.35 * wide["model_bytes"]
        assert narrow["macs"] < 0.3 * wide["macs"]
        assert narrow["state_bytes"] < 0.6 * wide["state_bytes"]
        assert 0 <= narrow["test_metric"] <= 1
    assert tiers[0]["state_bytes"] == summary["state_bytes"]
    assert start["tiers"] == [
        {key: tier[key] for key in ("rate", "clients", "model_bytes", "macs")} for tier in tiers
    ]
    assert json.dumps(summary)
    # Narrow clients' messages are as small as their networks: a round's bytes are less than those
    # of three full models beside the two that statistics take.
    assert rounds[0]["bytes_up"] < 3 * tiers[0]["model_bytes"]


def test_a_narrower_state_is_a_copy() -> None:
    state = drawn(3)
    own = leading(state, {**PROGRAM.shapes(), "a.bias": (2,)})
    own.values["a.bias"][...] = 7
    assert not (state.values["a.bias"] == 7).any()
