"""PERP over clients: norms and biases move, everything else is as it was, and is sent once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import run_inline, tiny
from places import build, mini_batches, place, prunable, state_at
from torch import nn

from fedprune.errors import ClientError
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import MODEL, Request
from fedprune.exchange.pooled import Pooled
from fedprune.methods.base import RunState, Start
from fedprune.methods.perp import PERP, TRAINED, retrain
from fedprune.rounds.folder import MODEL as MODEL_FILE
from fedprune.rounds.folder import read_metrics
from prunelab.errors import RunError
from prunelab.networks import float_state
from sparsemodel.layers.from_state import load_state_
from sparsemodel.recovery.perp import parameter_names
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state

STATE = state_at(0.3)


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def begun() -> RunState:
    names = set(parameter_names(build()))
    order = [n for n in STATE.values if n in names or is_statistic(n)]
    return RunState(2, STATE, {TRAINED: order})


@pytest.mark.parametrize("execution", ["sparse", "masked", "dense"])
def test_steps_by_hand(execution: str) -> None:
    """SGD of plain torch on norms and biases alone; not a bit of what else is held is sent."""
    asked = PERP(0.3).request(begun())
    local = place(method="perp", execution=execution, lr=0.05, momentum=0.5)
    reply = retrain(asked, local)
    check_parts(reply, asked)
    assert not reply.states
    model, training = build(), local.config.training
    load_state_(model, STATE)
    names = parameter_names(model)
    moving = {name: model.get_parameter(name) for name in names}
    rate = training.lr * 0.5 * (1 + np.cos(np.pi * 2 / training.rounds))
    optimizer = torch.optim.SGD(moving.values(), rate, momentum=0.5, weight_decay=0.01)
    for images, labels in mini_batches(local, 2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    expected = {name: value.numpy() for name, value in float_state(model).items()}
    found = reply.tensors[TRAINED]
    assert set(found) == {*names, *filter(is_statistic, expected)}
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
        assert not np.array_equal(value, STATE.values[name]), name


def test_the_same_frozen_state_is_named_in_every_round() -> None:
    state = begun()
    first = PERP(0.3).request(state)
    moved = {name: value + 1 for name, value in first.tensors[TRAINED].items()}
    after = PERP(0.3).update(state, Pooled([0], 1, tensors={TRAINED: moved}))
    second = PERP(0.3).request(after)
    assert second.hold == {MODEL}
    for name, value in first.states[MODEL].values.items():
        assert np.array_equal(second.states[MODEL].values[name], value)
        assert np.array_equal(after.model.values[name], moved.get(name, STATE.values[name]))
    assert np.array_equal(second.tensors[TRAINED]["fc.bias"], STATE.values["fc.bias"] + 1)


@pytest.mark.parametrize("secure", [False, True])
def test_a_run_changes_and_sends_nothing_else(secure: bool, tmp_path: Path) -> None:
    common = {"training__rounds": 3, "data__num_train": 60, "data__clients": 3}
    common |= {"privacy__secure_aggregation": secure}
    out = run_inline(tiny(method__name="perp", **common), tmp_path / "perp")
    final = load_state(out / MODEL_FILE)[0]
    lines = [line for line in read_metrics(out) if "round" in line]
    assert all(not line["skipped"] for line in lines)
    assert final.patterns is not None
    assert final.patterns.density == pytest.approx(0.2, rel=0.02)
    if secure:
        plain = run_inline(
            tiny(method__name="perp", **{**common, "privacy__secure_aggregation": False}),
            tmp_path / "plain",
        )
        other = load_state(plain / MODEL_FILE)[0]
        assert other.patterns == final.patterns
        assert all(np.array_equal(v, other.values[n]) for n, v in final.values.items())
        return
    wanda = run_inline(tiny(method__name="wanda", **common), tmp_path / "wanda")
    assert load_state(wanda / MODEL_FILE)[0].patterns == final.patterns
    theirs = [line for line in read_metrics(wanda) if "round" in line]
    num_trained = sum(final.values[name].size for name in begun().memory[TRAINED])
    for line, their in zip(lines, theirs, strict=True):
        # Beside the values a tensor costs its header: names travel once a message.
        assert 4 * num_trained < line["bytes_up"] / 3 < 4 * num_trained + 3000
        assert line["bytes_up"] < their["bytes_up"]
    assert lines[0]["bytes_down"] > theirs[0]["bytes_down"]  # all of it, once
    assert lines[1]["bytes_down"] < theirs[1]["bytes_down"]


def test_questions_that_cannot_be_are_refused() -> None:
    asked = PERP(0.3).request(begun())
    pruned = next(iter(prunable()))
    for tensors in (
        {},
        {TRAINED: {}},
        {TRAINED: {"nothing": np.zeros(1, np.float32)}},
        {TRAINED: {pruned: np.zeros(prunable()[pruned], np.float32)}},
    ):
        odd: Request = replace(asked, tensors=tensors)
        with pytest.raises(ClientError, match="some of the model that are not pruned"):
            retrain(odd, place(method="perp"))


def test_a_network_without_norms_and_biases_is_refused() -> None:
    local: Any = place(method="perp")
    bare = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    local = replace(local, network=replace(local.network, build=lambda: bare))
    state = SparseState({n: v.numpy() for n, v in float_state(bare).items()})
    server = Start(lambda: state, {}, {}, lambda request: iter(()), 2, 7, place=lambda: local)
    with pytest.raises(RunError, match="no norm with weights and no bias"):
        PERP(0.5).start(server)
