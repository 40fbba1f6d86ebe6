"""SparsyFed: powers of weights by hand, Top-K over all layers, and the runs it comes down to."""

from __future__ import annotations

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
from fedprune.methods.base import RunState, train_request
from fedprune.methods.sparsyfed import SparsyFed, power, top_k, train_powers
from fedprune.rounds.folder import MODEL as MODEL_FILE
from fedprune.rounds.folder import read_metrics, read_summary
from fedprune.rounds.setup import Setup
from fedprune.rounds.workspace import open_workspace
from prunelab.networks import float_state
from sparsemodel.layers.from_state import load_state_
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state

NAMES = list(prunable())
ALL = sum(int(np.prod(shape)) for shape in prunable().values())


def question(state: SparseState, *, keep: int = ALL, **settings: Any) -> Request:
    memory = {"layers": NAMES, "keep": keep}
    return SparsyFed(**settings).request(RunState(3, state, memory))


@pytest.mark.parametrize("execution", ["sparse", "masked", "dense"])
@pytest.mark.parametrize(("density", "momentum"), [(None, 0.9), (0.3, 0.9), (0.3, 0.0)])
def test_steps_by_hand(density: float | None, momentum: float, execution: str) -> None:
    """θ ← θ − η v with v ← μ v + ∂L/∂θ + λ θ by autograd through w = θ|θ|^(β−1), in plain torch."""
    beta, state = 1.5, state_at(density)
    local = place(method="sparsyfed", execution=execution, lr=0.02, momentum=momentum)
    training = local.config.training
    reply = train_powers(question(state, beta=beta), local)
    rate = training.lr * 0.5 * (1 + np.cos(np.pi * 3 / training.rounds))
    model = build()
    load_state_(model, state)
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in NAMES:
        held[name] = held[name].sign() * held[name].abs() ** (1 / beta)
    speed = {name: torch.zeros_like(p) for name, p in held.items()}
    for images, labels in mini_batches(local, 3):
        leaves = {name: p.requires_grad_() for name, p in held.items()}
        used = {n: t * t.abs() ** (beta - 1) if n in NAMES else t for n, t in leaves.items()}
        loss = nn.functional.cross_entropy(
            torch.func.functional_call(model, used, (images,)), labels
        )
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        with torch.no_grad():
            for (name, theta), gradient in zip(leaves.items(), gradients, strict=True):
                pruned = theta == 0 if name in NAMES else torch.zeros_like(theta, dtype=torch.bool)
                speed[name].mul_(momentum).add_(gradient.nan_to_num())
                speed[name].add_(training.weight_decay * theta)
                held[name] = (theta - rate * speed[name]).masked_fill(pruned, 0).detach()
    statistics = {n: v for n, v in float_state(model).items() if "running" in n}
    for name, value in {**held, **statistics}.items():
        found = reply.states[MODEL].dense_layer(name)
        np.testing.assert_allclose(found, value.numpy(), rtol=1e-3, atol=5e-5, err_msg=name)


def test_zeros_stay_zero_while_a_dense_client_trains() -> None:
    state = state_at(None)
    whole = {name: state.values[name].copy() for name in NAMES}
    for values in whole.values():
        values.reshape(-1)[::3] = 0
    reply = train_powers(question(state.replace(whole)), place(method="sparsyfed"))
    for name in NAMES:
        after, before = reply.states[MODEL].values[name], whole[name]
        assert np.array_equal(after == 0, before == 0)


def test_powers_are_inverse_and_keep_signs() -> None:
    values = np.float32([-0.3, 0, 0.02, 1])
    assert np.allclose(power(power(values, 1 / 1.25), 1.25), values)
    assert power(values, 1) is values


def test_top_k_ranks_all_layers_together() -> None:
    """Of 5 4 | 3 -6 0: three largest are 5, 4 and -6; all of them where more are asked for."""
    values = {"a": np.float32([[5, 4]]), "b": np.float32([3, -6, 0])}
    kept = top_k(values, 3)
    assert kept["a"].tolist() == [[True, True]]
    assert kept["b"].tolist() == [False, True, False]
    assert all(chosen.all() for chosen in top_k(values, 9).values())


@pytest.mark.parametrize("density", [None, 0.3])
def test_a_client_sends_its_budget(density: float | None) -> None:
    keep = 50
    local = place(method="sparsyfed")
    whole = values_of(train_powers(question(state_at(density)), local))
    sent = values_of(train_powers(question(state_at(density), keep=keep), local))
    flat = np.sort(np.concatenate([abs(whole[name]).reshape(-1) for name in NAMES]))
    assert sum(np.count_nonzero(sent[name]) for name in NAMES) == keep
    for name in NAMES:
        assert np.array_equal(sent[name], np.where(abs(whole[name]) >= flat[-keep], whole[name], 0))


@pytest.mark.parametrize(("server", "left"), [(True, [5, 1]), (False, [0, 1, 4, 5])])
def test_the_server_averages_theta_and_prunes(server: bool, left: list[int]) -> None:
    """Mean θ is 1 -2 0 | 0 .5 -3: Top-2 are -3 and -2, and w = θ|θ|: -9 and -4."""
    mean = SparseState({"a": np.float32([[1, -2, 0]]), "b": np.float32([[0, 0.5, -3]])})
    method = SparsyFed(density=1 / 3, beta=2, global_top_k=server)
    state = RunState(0, mean, {"layers": ["a", "b"], "keep": 2})
    after = method.update(state, Pooled([0], 1, states={MODEL: mean})).model
    dense = np.concatenate([after.dense_layer(name).reshape(-1) for name in ("a", "b")])
    expected = np.float32([1, -4, 0, 0, 0.25, -9])
    assert np.flatnonzero(dense).tolist() == sorted(left)
    assert np.allclose(dense[left], expected[left])
    asked = method.request(RunState(1, after, state.memory)).states[MODEL]
    theta = np.concatenate([asked.dense_layer(name).reshape(-1) for name in ("a", "b")])
    assert np.allclose(theta[left], np.float32([1, -2, 0, 0, 0.5, -3])[left])


def test_first_powers_dense_is_federated_averaging(tmp_path: Path) -> None:
    common = {"training__rounds": 2, "method__density": 1.0}
    ours = run_inline(tiny(method__name="sparsyfed", method__beta=1.0, **common), tmp_path / "o")
    theirs = run_inline(tiny(method__name="fedavg", **common), tmp_path / "t")
    found, expected = (load_state(out / MODEL_FILE)[0] for out in (ours, theirs))
    assert found.patterns is None
    assert all(np.array_equal(v, found.values[name]) for name, v in expected.values.items())


def test_a_run_keeps_its_density_and_gives_the_same_bits_twice(tmp_path: Path) -> None:
    config = tiny(method__name="sparsyfed", training__rounds=3)
    first, second = (run_inline(config, tmp_path / name) for name in ("first", "second"))
    assert digest(first) == digest(second)
    densities = [line["density"] for line in read_metrics(first) if "train_loss" in line]
    assert densities == pytest.approx([0.2] * 3, rel=0.01)
    summary = read_summary(first)  # of sparse rounds, not of the first, which is dense
    assert summary["bytes_down_steady_round"] < 0.5 * summary["bytes_dense_round"]


def test_updates_are_those_of_what_was_sent(tmp_path: Path) -> None:
    """Cut to nearly nothing they leave the start as it was, which weights in θ's place do not."""
    config = tiny(
        method__name="sparsyfed", method__density=1.0, training__rounds=1,
        federation__aggregation="clipped", federation__clip=1e-6, federation__byzantine=0.25,
    )  # fmt: skip
    found = load_state(run_inline(config, tmp_path / "run") / MODEL_FILE)[0]
    open_workspace(config).lay_out(tmp_path / "setup", with_start=True)
    start = Setup(config, tmp_path / "setup").start_state()
    for name, value in start.values.items():
        if "running" not in name:
            np.testing.assert_allclose(found.values[name], value, atol=1e-5)


def test_masks_of_clients_joined_shrink(tmp_path: Path) -> None:
    config = tiny(method__name="sparsyfed", method__global_top_k=False)
    out = run_inline(config, tmp_path / "run")
    densities = [line["density"] for line in read_metrics(out) if "train_loss" in line]
    assert densities == sorted(densities, reverse=True)
    assert 0.2 < densities[-1] < densities[0] < 0.8


@pytest.mark.parametrize(
    "fields", [{"beta": 0.5}, {"beta": "much"}, {"keep": -1}, {"layers": ["what"]}, {"layers": 3}]
)
def test_questions_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    wanted = {"beta": 1.25, "keep": 9, "layers": NAMES, **fields}
    with pytest.raises(ClientError, match=next(iter(fields))):
        train_powers(
            train_request(RunState(0, state_at(None)), fields=wanted), place(method="sparsyfed")
        )


@pytest.mark.parametrize("beta", [0.9, float("inf"), float("nan")])
def test_exponents_that_cannot_be_are_refused(beta: float) -> None:
    with pytest.raises(ConfigError, match="beta"):
        SparsyFed(beta=beta)
