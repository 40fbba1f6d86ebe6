"""Optimisers of clients: torch's own, to rounding, on every execution; schedules; clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from little_clients import local, narrow, network_from, random_mask, samples, state_of
from torch import nn
from torch.nn import functional

from fedprune.errors import ConfigError
from fedprune.exchange.messages import MODEL, Reply
from fedprune.given import name_object
from fedprune.local import optimizer as optimizers
from fedprune.local.optimizer import Adam, Optimizer, clip
from fedprune.local.training import SEED_ROUND, epoch_batches, train
from fedprune.methods.base import RunState, train_request
from fedprune.settings import OPTIMIZERS, SCHEDULES, TrainingConfig
from prunelab.data.tensors import prepare
from sparsemodel.masks.mask import Mask

TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, c: torch.optim.SGD(
        p, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay
    ),
    "adam": lambda p, c: torch.optim.Adam(p, lr=c.lr, weight_decay=c.weight_decay),
    "adamw": lambda p, c: torch.optim.AdamW(p, lr=c.lr, weight_decay=c.weight_decay),
}


def config(optimizer: str, **rest: Any) -> TrainingConfig:
    settings = {"rounds": 4, "local_epochs": 2, "batch_size": 8, "lr": 0.01, "weight_decay": 0.02}
    return TrainingConfig(optimizer=optimizer, **{**settings, **rest})


def answer(training: TrainingConfig, mask: Mask | None, *, round_index: int = 0) -> Reply:
    place = local(*samples(40), training=training, network=network_from(narrow))
    return train(train_request(RunState(round_index, state_of(narrow(), mask))), place)


def plain_loop(training: TrainingConfig, mask: Mask | None) -> nn.Module:
    """The same steps by torch alone, the mask laid over weights and gradients."""
    place = local(*samples(40), training=training, network=network_from(narrow))
    model = narrow().train()
    if mask is not None:
        mask.apply(model)
    optimizer = TORCH[training.optimizer](model.parameters(), training)
    for _, images, labels in epoch_batches(
        *samples(40), epochs=training.local_epochs, batch_size=training.batch_size,
        seed=place.seed(SEED_ROUND, 0), augmented=False,
    ):  # fmt: skip
        optimizer.zero_grad()
        logits = model(prepare(torch.from_numpy(images)))
        functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        named = dict(model.named_parameters())
        for name, keep in (mask or {}).items():
            gradient = named[name].grad
            assert gradient is not None
            gradient.mul_(keep)
        if training.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
    return model


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("execution", ["sparse", "masked", "dense", None])
def test_steps_are_torchs(execution: str | None, optimizer: str, clip_norm: float) -> None:
    mask = None if execution is None else random_mask(0.4)
    training = config(optimizer, execution=execution or "auto", clip_norm=clip_norm)
    reply, model = answer(training, mask), plain_loop(training, mask)
    expected = state_of(model, mask)
    for name, value in reply.states[MODEL].values.items():
        # Adam divides by the root of a square: a gradient near 0 keeps few digits.
        assert np.allclose(value, expected.values[name], rtol=2e-3, atol=2e-4), name


def test_adams_moments_are_as_long_as_the_active_weights() -> None:
    values = {"w": np.ones(30, np.float32)}
    rule = Adam()
    rule(values, {"w": np.ones(30, np.float32)})
    assert rule.held_bytes() == 2 * 4 * 30


def test_the_first_step_of_adam_by_hand() -> None:
    """m / (1 - b1) = g and v / (1 - b2) = g²: the direction is the sign; decay adds .1 w apart."""
    gradients = {"w": np.array([3.0, -0.5], np.float32)}
    Adam(weight_decay=0.1, decoupled=True)({"w": np.array([10.0, 20.0], np.float32)}, gradients)
    assert gradients["w"] == pytest.approx([2.0, 1.0], abs=1e-5)


def test_clipping_is_of_all_gradients_together() -> None:
    gradients = {"a": np.array([3.0], np.float32), "b": np.array([0.0, 4.0], np.float32)}
    clip(gradients, 10.0)
    assert gradients["b"].tolist() == [0, 4]
    clip(gradients, 2.5)
    assert gradients["a"] == pytest.approx([1.5])
    assert gradients["b"] == pytest.approx([0, 2.0])


def test_schedules_by_hand() -> None:
    """Rounds 0, 1, 2, 3 of four: a half cosine, a line, nothing."""
    expected = {
        "cosine": [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5],
        "linear": [1.0, 0.75, 0.5, 0.25],
        "constant": [1.0] * 4,
    }
    assert set(expected) == set(SCHEDULES) == set(optimizers.SCHEDULES)
    assert set(OPTIMIZERS) == set(optimizers.OPTIMIZERS)
    for name, factors in expected.items():
        training = config("sgd", schedule=name)
        found = [Optimizer(training, done).sgd.lr / training.lr for done in range(4)]
        assert found == pytest.approx(factors)


def test_a_rule_and_a_schedule_of_ones_own() -> None:
    """Signs of gradients as directions, at half the rate: weights move by .005, or have none."""

    class Signs:
        def __call__(self, values: Any, gradients: Any) -> None:
            for gradient in gradients.values():
                np.sign(gradient, out=gradient)

    def half(done: int, rounds: int) -> float:
        return 0.5

    training = config(name_object(Signs), schedule=name_object(half), local_epochs=1, batch_size=40)
    before, after = state_of(narrow(), random_mask(0.4)), answer(training, random_mask(0.4))
    for name in random_mask(0.4):
        moved = np.abs(after.states[MODEL].values[name] - before.values[name])
        assert moved[moved > 0] == pytest.approx(0.005, abs=1e-6)
        assert (moved > 0).mean() > 0.9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "nowhere:rule"}, "training.optimizer 'nowhere:rule': cannot import"),
        ({"optimizer": "math:pi"}, "'math:pi' is a float, expected a function"),
        ({"optimizer": "builtins:int"}, "'builtins:int' made a int; expected a function of"),
        ({"schedule": "nowhere:schedule"}, "training.schedule 'nowhere:schedule': cannot import"),
        (
            {"optimizer": "torch.optim:Adam"},
            "without arguments .* sgd, adam, adamw",
        ),
        ({"schedule": "math:sqrt"}, "'math:sqrt' fails for round 0 of 4 .TypeError"),
        ({"schedule": "operator:sub"}, r"'operator:sub' gives -4.0 for round 0"),
    ],
)
def test_what_is_no_optimiser_or_schedule(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Optimizer(config(**{"optimizer": "sgd", **settings}), 0)


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(functional.dropout(x.flatten(1), 0.5, self.training))  # type: ignore[no-any-return]


def test_what_layers_draw_comes_from_the_seed() -> None:
    def values(seed: int) -> list[float]:
        torch.manual_seed(seed)  # of the process: it decides nothing, and is left alone
        place = local(*samples(40), training=config("sgd"), network=network_from(built))
        reply = train(train_request(RunState(0, state_of(built()))), place)
        assert torch.initial_seed() == seed
        return reply.states[MODEL].values["fc.weight"].ravel().tolist()  # type: ignore[no-any-return]

    def built() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return WithDropout()

    assert values(1) == values(2)
