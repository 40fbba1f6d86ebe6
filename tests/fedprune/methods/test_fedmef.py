"""FedMef: extrusion and its learning rate by hand, which weights it presses, a mask in motion."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import digest, run_inline, tiny
from places import build, mini_batches, place, prunable, state_at, values_of
from torch import nn

from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.messages import MODEL, Request
from fedprune.exchange.pooled import Pooled
from fedprune.local.training import train
from fedprune.methods.base import RunState
from fedprune.methods.fedmef import Extrusion, FedMef, lowest, rex, train_pressing
from fedprune.rounds.folder import MODEL as MODEL_FILE
from fedprune.rounds.folder import read_metrics
from fedprune.settings import TrainingConfig
from prunelab.networks import float_state
from sparsemodel.layers.from_state import load_state_
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state

NAMES = list(prunable())


def before_adjusting(density: float = 0.3) -> RunState:
    """Two rounds of twenty are over; the third is followed by an adjustment."""
    return RunState(2, state_at(density), {"until": 12})


def question(**settings: Any) -> Request:
    return FedMef(adjust_every=3, **settings).request(before_adjusting())


def test_the_schedule_and_the_sigmoid() -> None:
    """p(t) = (2T − 2t)/(2T − t): 1, 4/5 after two of six, 0; 2σ(x) − 1 is tanh(x/2)."""
    assert [rex(done, 6) for done in (0, 2, 6)] == [1.0, 0.8, 0.0]
    assert math.tanh(0.7 / 2) == pytest.approx(2 / (1 + math.exp(-0.7)) - 1)


def test_the_lowest_are_among_the_active() -> None:
    """The zeros of a pruned layer are lower than any weight, and none of them is pressed."""
    patterns = Patterns({"w": Pattern.from_positions((2, 4), np.array([1, 3, 4, 6]))})
    state = SparseState({"w": np.float32([-0.5, 3, 0.1, -2])}, patterns)
    places = lowest(state.values, {"w": 2})["w"]
    assert patterns["w"].positions()[places].tolist() == [1, 4]


@pytest.mark.parametrize("execution", ["sparse", "masked", "dense"])
@pytest.mark.parametrize(("lr_weight", "max_lr"), [(1.0, 0.0), (0.0, 0.0), (4.0, 0.06)])
def test_steps_by_hand(lr_weight: float, max_lr: float, execution: str) -> None:
    """v ← μ v + ∇L + 2λ θ_low + decay; θ ← θ − η v with η as the budget says, in plain torch."""
    penalty, state = 0.3, before_adjusting().model
    asked = question(penalty=penalty, lr_weight=lr_weight, max_lr=max_lr)
    local = place(method="fedmef", execution=execution, lr=0.03, momentum=0.5)
    training = local.config.training
    reply = train_pressing(asked, local)
    rate = training.lr * 0.5 * (1 + np.cos(np.pi * 2 / training.rounds))
    model = build()
    load_state_(model, state)
    named, low, masks = dict(model.named_parameters()), {}, {}
    for name in NAMES:
        pattern = state.pattern(name)
        assert pattern is not None
        count = math.floor(0.1 * (1 + math.cos(math.pi * 3 / 12)) * pattern.num_active)
        assert asked.expected.growth[name] == count
        flat = named[name].detach().abs().reshape(-1)
        masks[name] = flat > 0
        low[name] = flat.masked_fill(flat == 0, torch.inf).argsort(stable=True)[:count]
    speed = {name: torch.zeros_like(p) for name, p in named.items()}
    batches = mini_batches(local, 2)
    rates = []
    for done, (images, labels) in enumerate(batches):
        pressed = [named[name].reshape(-1)[low[name]] for name in NAMES]
        loss = nn.functional.cross_entropy(model(images), labels)
        loss = loss + penalty * sum((p**2).sum() for p in pressed)
        norm = sum(float(p.detach().abs().sum()) for p in pressed)
        wanted = lr_weight * (2 / (1 + math.exp(-norm)) - 1) * training.lr
        wanted *= (2 * len(batches) - 2 * done) / (2 * len(batches) - done)
        rates.append(min(max_lr or training.lr, max(rate, wanted)))
        gradients = torch.autograd.grad(loss, list(named.values()))
        with torch.no_grad():
            for (name, weight), gradient in zip(named.items(), gradients, strict=True):
                step = gradient + training.weight_decay * weight
                if name in masks:
                    step *= masks[name].view_as(step)
                speed[name].mul_(training.momentum).add_(step)
                weight.sub_(rates[-1] * speed[name])
    assert (max(rates) > rate) == (lr_weight > 0)
    for name, value in float_state(model).items():
        found = reply.states[MODEL].dense_layer(name)
        np.testing.assert_allclose(found, value.numpy(), rtol=1e-3, atol=1e-4, err_msg=name)


def test_two_steps_with_little_to_press_out() -> None:
    """η_0 = .1, η_r = .05, ψ = 5, T = 4: η is .5 tanh(.2) = .0987, then 6/7 of .5 tanh(norm/2)."""
    training = TrainingConfig(rounds=2, schedule="linear", lr=0.1, momentum=0.0, weight_decay=0.0)
    low = {"w": np.array([0])}
    extrusion = Extrusion(training, 1, low, steps=4, penalty=0.5, lr_weight=5.0, max_lr=0.0)
    values, expected = {"w": np.float32([0.4, 2.0])}, np.array([0.4, 2.0])
    for factor in (1.0, 6 / 7):
        gradients = {"w": np.float32([1, 1])}
        extrusion.move(values, gradients)
        values["w"] -= gradients["w"]
        rate = 5 * 0.1 * factor * math.tanh(abs(expected[0]) / 2)
        expected = expected - max(0.05, rate) * np.array([1 + expected[0], 1])
    assert rate > 0.05
    np.testing.assert_allclose(values["w"], expected, rtol=1e-6)


def test_a_larger_penalty_leaves_less_to_prune() -> None:
    state, local = before_adjusting().model, place(method="fedmef", momentum=0.0)
    places = lowest(state.values, dict(question().expected.growth))

    def left(penalty: float) -> float:
        after = values_of(train_pressing(question(penalty=penalty), local))
        return sum(float(abs(after[name][at]).sum()) for name, at in places.items())

    amounts = [left(penalty) for penalty in (0.0, 0.3, 1.0)]
    assert amounts[0] > amounts[1] > amounts[2] > 0


def test_other_rounds_are_plain_training() -> None:
    state = before_adjusting()
    asked = FedMef(adjust_every=2).request(state)
    assert not asked.fields
    local = place(method="fedmef")
    ours, theirs = train_pressing(asked, local), train(asked, local)
    assert all(np.array_equal(v, values_of(ours)[n]) for n, v in values_of(theirs).items())


def test_the_mask_moves_and_keeps_its_size() -> None:
    """The smallest of the mean go, the largest gradients come at zero."""
    method, state = FedMef(adjust_every=3), before_adjusting()
    before, counts = state.model.patterns, method.asked_counts(state)
    assert before is not None
    assert counts.keys() == set(NAMES)
    growth = {}
    for name, count in counts.items():
        free = np.setdiff1d(np.arange(before[name].num_weights), before[name].positions())
        growth[name] = (free[:count], np.ones(count, np.float32))
    after = method.update(state, Pooled([0], 1, states={MODEL: state.model}, growth=growth))
    assert after.model.patterns is not None
    assert after.model.patterns.counts() == before.counts()
    for name, places in lowest(state.model.values, counts).items():
        gone = before[name].positions()[places]
        assert not np.isin(gone, after.model.patterns[name].positions()).any()
        grown = after.model.dense_layer(name).reshape(-1)[growth[name][0]]
        assert not grown.any()


def test_a_mask_that_never_moves_is_the_magnitude_mask(tmp_path: Path) -> None:
    common = {"training__rounds": 2, "method__adjust_rate": 0.0}
    outs = [
        run_inline(tiny(method__name=n, **common), tmp_path / n) for n in ("fedmef", "magnitude")
    ]
    found, expected = (load_state(out / MODEL_FILE)[0] for out in outs)
    assert found.patterns == expected.patterns
    assert all(np.array_equal(v, found.values[name]) for name, v in expected.values.items())


def test_a_run_keeps_its_density_and_gives_the_same_bits_twice(tmp_path: Path) -> None:
    config = tiny(method__name="fedmef", training__rounds=3)
    first, second = (run_inline(config, tmp_path / name) for name in ("first", "second"))
    assert digest(first) == digest(second)
    lines = [line for line in read_metrics(first) if "train_loss" in line]
    assert [line["density"] for line in lines] == pytest.approx([0.2] * 3, rel=0.02)
    assert lines[0]["adjusted"]
    assert load_state(first / MODEL_FILE)[0].patterns is not None


@pytest.mark.parametrize("key", ["penalty", "lr_weight", "max_lr"])
def test_questions_that_cannot_be_are_refused(key: str) -> None:
    for value in (-1.0, None, float("nan")):
        asked = question()
        odd = Request(asked.action, 2, {**asked.fields, key: value}, asked.states)
        with pytest.raises(ClientError, match=key):
            train_pressing(odd, place(method="fedmef"))


@pytest.mark.parametrize(
    "setting",
    [
        {"adjust_every": 0},
        {"adjust_until": -1},
        {"adjust_rate": 2.0},
        {"penalty": -0.1},
        {"lr_weight": float("inf")},
        {"max_lr": float("nan")},
    ],
)
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        FedMef(**setting)


def test_differential_privacy_is_refused() -> None:
    with pytest.raises(ConfigError, match="moves its mask by clients' gradients"):
        tiny(method__name="fedmef", privacy__dp="central")
