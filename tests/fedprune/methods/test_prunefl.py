"""PruneFL: the rule by hand and by brute force, squared gradients by autograd, whole runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import digest, run_inline, tiny
from places import build, dense_state, place, prunable, state_at
from torch import nn

from fedprune.config import RunConfig
from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.exchange.pooled import Pooled
from fedprune.local.training import GROWTH_BATCHES, SEED_GROWTH, epoch_batches, train
from fedprune.methods.base import RunState, Start, train_request
from fedprune.methods.prunefl import FIRST, PRUNE, SQUARES, PruneFL, Rule, num_worthwhile
from fedprune.rounds.folder import read_checkpoint, read_metrics, read_summary
from prunelab.data.batches import Preprocessing
from prunelab.errors import RunError
from sparsemodel.layers.from_state import load_state_
from sparsemodel.runtime.adjust import carry
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

MEMORY = {"until": 10, "limit": 0}


# --- the rule ----------------------------------------------------------------------------------


def two_layers() -> SparseState:
    """Of v (5 weights) 0, 1 and 4 are active, of w (4) the first and the last."""
    patterns = {
        "v": Pattern.from_positions((5,), np.array([0, 1, 4])),
        "w": Pattern.from_positions((4,), np.array([0, 3])),
    }
    values = {"v": np.float32([3, -1, 2]), "w": np.float32([1, -5]), "b": np.float32([1])}
    return SparseState(values, Patterns(patterns))


SQUARED = {
    "v": np.float32([9, 7, 0, 6, 1]),
    "w": np.float32([2, 8, 5, 0]),
    "b": np.float32([4]),
}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        # ρ = .5 protects v_0 of three (⌊1.5⌋) and w_3. In line: w_1 8, v_1 7, v_3 6, w_2 5, w_0 2.
        (2, ([0], [3])),
        (3, ([0], [1, 3])),
        (5, ([0, 1, 3], [1, 3])),
        (6, ([0, 1, 3], [1, 2, 3])),
        (1, ([0], [3])),  # what is protected stays
        (9, ([0, 1, 2, 3, 4], [0, 1, 2, 3])),
    ],
)
def test_the_limit_is_filled_by_squared_gradients(limit: int, expected: Any) -> None:
    patterns = Rule(share=0.5, limit=limit).reconfigured(two_layers(), SQUARED)
    found = tuple(patterns[name].positions().tolist() for name in ("v", "w"))
    assert found == expected


def test_the_ratio_by_hand() -> None:
    """T_0 = .5 · 9 = 4.5. Protected: v_0 and w_3, with b g² = 9 + 0 + 4 in the time 6.5: Γ = 2.

    w_1: (13 + 8) / 7.5 = 2.8; v_1: 28 / 8.5 = 3.29; v_3: 34 / 9.5 = 3.58; w_2: 39 / 10.5 = 3.71;
    w_0 has 2 < 3.71 and would lower it.
    """
    patterns = Rule(share=0.5, limit=9, fixed_time=0.5).reconfigured(two_layers(), SQUARED)
    assert patterns["v"].positions().tolist() == [0, 1, 3]
    assert patterns["w"].positions().tolist() == [1, 2, 3]
    fewer = Rule(share=0.5, limit=4, fixed_time=0.5).reconfigured(two_layers(), SQUARED)
    assert fewer.num_active == 4


def test_no_other_set_has_a_larger_ratio() -> None:
    """Of all sets of nine weights, with drawn gains."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        squares, gain, time = draw.exponential(1, 9), draw.random(), draw.uniform(0.5, 5)
        count = num_worthwhile(squares, gain=gain, time=time)
        best = max(
            (gain + sum(chosen)) / (time + len(chosen))
            for size in range(10)
            for chosen in itertools.combinations(squares, size)
        )
        ours = (gain + np.sort(squares)[::-1][:count].sum()) / (time + count)
        assert ours == pytest.approx(best, rel=1e-12)
    assert num_worthwhile(np.array([2.0, 3.0]), gain=0.0, time=9.0) == 2
    assert num_worthwhile(np.array([2.0, 3.0]), gain=9.0, time=1.0) == 0


def test_small_layers_shrink_to_one_weight_and_no_further() -> None:
    state = two_layers()
    for _ in range(4):
        patterns = Rule(share=0.3, limit=2).reconfigured(state, SQUARED)
        state = carry(state, patterns)
    assert {name: pattern.num_active for name, pattern in patterns.items()} == {"v": 1, "w": 1}


# --- a client ----------------------------------------------------------------------------------


def question(**settings: Any) -> Request:
    return PruneFL(**settings).request(RunState(3, state_at(0.3), MEMORY))


def squares_by_autograd(state: SparseState, batches: int, **training: Any) -> dict[str, Any]:
    """The mean of g² of mini-batches, in float64, of a dense network with zeros."""
    local, model = place("prunefl", count=20, **training), build()
    load_state_(model, state)
    model.double().train()
    own, sums, samples = local.data.train, dict[str, Any](), 0
    source = epoch_batches(
        own.inputs, own.targets, epochs=1, batch_size=8, seed=local.seed(SEED_GROWTH, 3),
        augmented=False,
    )  # fmt: skip
    for _, (_, images, labels) in zip(range(batches), source, strict=False):
        inputs = torch.from_numpy(Preprocessing().apply(images)).double()
        loss = nn.functional.cross_entropy(model(inputs), torch.from_numpy(labels))
        named = dict(model.named_parameters())
        for name, gradient in zip(
            named, torch.autograd.grad(loss, list(named.values())), strict=True
        ):
            sums[name] = sums.get(name, 0.0) + len(labels) * gradient.numpy() ** 2
        samples += len(labels)
    return {name: total / samples for name, total in sums.items()}


@pytest.mark.parametrize("batches", [1, 9])
@pytest.mark.parametrize("execution", ["sparse", "masked"])
def test_a_client_measures_all_weights_after_training(batches: int, execution: str) -> None:
    request = question(batches=batches)
    assert request.fields[GROWTH_BATCHES] == batches  # by which the account counts them
    training = {"execution": execution}
    reply = PruneFL.actions["train"](request, place("prunefl", count=20, **training))
    check_parts(reply, request)
    plain = train(train_request(RunState(3, state_at(0.3))), place("prunefl", count=20, **training))
    for name, value in plain.states[MODEL].values.items():
        assert np.array_equal(reply.states[MODEL].values[name], value)
    expected = squares_by_autograd(plain.states[MODEL], batches)
    assert set(reply.tensors[SQUARES]) == set(expected)
    for name, value in reply.tensors[SQUARES].items():
        assert value.shape == expected[name].shape
        most = expected[name].max()
        np.testing.assert_allclose(value, expected[name], rtol=2e-3, atol=1e-4 * most)


def first_question(limit: int = 400, **fields: Any) -> Request:
    whole = Patterns({name: Pattern.full(shape) for name, shape in prunable().items()})
    values = {"limit": limit, "steps": 2, GROWTH_BATCHES: 1, "share": 0.3, "time": 0.0, **fields}
    return Request(PRUNE, fields=values, states={MODEL: carry(dense_state(), whole)})


@pytest.mark.parametrize("limit", [9, 400, 10**6])
def test_the_first_mask_meets_the_limit(limit: int) -> None:
    masks = [
        PruneFL.actions[PRUNE](first_question(limit), place("prunefl")).masks[FIRST]
        for _ in range(2)
    ]
    total = sum(int(np.prod(shape)) for shape in prunable().values())
    assert masks[0].num_active == min(limit, total)
    assert min(masks[0].counts().values()) >= 1
    assert masks[0] == masks[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": 0.0},
        {"share": 1.0},
        {"limit": 8},
        {GROWTH_BATCHES: 0},
        {"steps": -1},
        {"time": None},
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ClientError, match="field"):
        PruneFL.actions[PRUNE](first_question(**wrong), place("prunefl"))


def test_a_start_without_a_mask_is_refused() -> None:
    request = replace(first_question(), states={MODEL: dense_state()})
    with pytest.raises(ClientError, match="without a mask"):
        PruneFL.actions[PRUNE](request, place("prunefl"))


# --- the server --------------------------------------------------------------------------------


def test_the_mask_moves_by_the_mean_of_clients_squares() -> None:
    """The rule on the averaged weights and squares; kept weights keep their values, new are 0."""
    start = state_at(0.3)
    assert start.patterns is not None
    state = RunState(3, start, {"until": 10, "limit": start.patterns.num_active})
    draw = np.random.default_rng(1)
    shapes = {n: s for n, s in start.shapes().items() if "running" not in n}
    found = {n: draw.exponential(1, s).astype(np.float32) for n, s in shapes.items()}
    moved = start.replace({n: v + 1 for n, v in start.values.items()})
    pooled = Pooled([0], 1, states={MODEL: moved}, tensors={SQUARES: found})
    after = PruneFL(adjust_rate=0.3).update(state, pooled)
    expected = Rule(0.3, start.patterns.num_active).reconfigured(moved, found)
    assert after.model.patterns == expected
    assert expected != start.patterns
    assert expected.num_active == start.patterns.num_active
    for name in expected:
        whole, before = after.model.dense_layer(name), moved.dense_layer(name)
        both = np.intersect1d(expected[name].positions(), start.patterns[name].positions())
        new = np.setdiff1d(expected[name].positions(), both)
        assert np.array_equal(whole.reshape(-1)[both], before.reshape(-1)[both])
        assert not whole.reshape(-1)[new].any()
    # In other rounds nothing but the mean model counts.
    between = PruneFL(adjust_rate=0.3).update(replace(state, round_index=2), pooled)
    assert between.model is moved


def test_no_client_is_an_error() -> None:
    limit = round(0.1 * sum(int(np.prod(shape)) for shape in prunable().values()))
    asked: list[Request] = []

    def nobody(request: Request) -> Iterator[tuple[int, Reply]]:
        asked.append(request)
        yield from ()

    def server(ask: Any) -> Start:
        return Start(dense_state, prunable(), {}, ask, 10, 0)

    with pytest.raises(RunError, match="no client could make the first mask"):
        PruneFL(density=0.1).start(server(nobody))
    (request,) = asked
    assert request.num_clients == 1
    assert request.fields["limit"] == limit
    reply = PruneFL.actions[PRUNE](request, place("prunefl"))
    check_parts(reply, request)
    request.check(reply)
    state = PruneFL(density=0.1).start(server(lambda request: iter([(3, reply)])))
    assert state.model.patterns == reply.masks[FIRST]
    assert state.notes["first_mask"]["client"] == 3
    for name, pattern in reply.masks[FIRST].items():
        weights = dense_state().values[name].reshape(-1)
        assert np.array_equal(state.model.values[name], weights[pattern.positions()])


@pytest.mark.parametrize("adaptive", [False, True])
def test_first_masks_that_cannot_be_are_refused(adaptive: bool) -> None:
    asked: list[Request] = []

    def nobody(request: Request) -> Iterator[tuple[int, Reply]]:
        asked.append(request)
        yield from ()

    with pytest.raises(RunError, match="no client"):
        PruneFL(density=0.1, adaptive=adaptive).start(
            Start(dense_state, prunable(), {}, nobody, 10, 0)
        )
    (request,) = asked
    limit, names = request.fields["limit"], list(prunable())

    def check(counts: dict[str, int]) -> None:
        shapes = prunable()
        patterns = {
            n: Pattern.from_positions(shapes[n], np.arange(c, dtype=np.int64))
            for n, c in counts.items()
        }
        request.check(Reply(32, masks={FIRST: Patterns(patterns)}))

    with pytest.raises(ClientError, match=f"expected (at most )?{limit}"):
        check({name: int(np.prod(shape)) for name, shape in prunable().items()})
    few = dict.fromkeys(names, 1)
    if adaptive:
        check(few)
    else:
        with pytest.raises(ClientError, match=f"of {len(names)} weights: expected {limit}"):
            check(few)
    largest = max(names, key=lambda name: int(np.prod(prunable()[name])))
    with pytest.raises(ClientError, match="without any weight of"):
        check({**dict.fromkeys(names, 0), largest: limit})


def test_squares_below_zero_are_refused() -> None:
    request = question()
    reply = PruneFL.actions["train"](request, place("prunefl"))
    request.check(reply)
    name, value = next(iter(reply.tensors[SQUARES].items()))
    odd = {SQUARES: {**reply.tensors[SQUARES], name: value - 1}}
    with pytest.raises(ClientError, match=f"squares of {name!r}: expected 0 or more"):
        request.check(replace(reply, tensors=odd))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("adjust_rate", 0.0), ("batches", 0), ("first_steps", -1), ("fixed_time", 0.0)],
)
def test_settings_that_cannot_be_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"method.{setting}: expected"):
        PruneFL(**{setting: value})  # type: ignore[arg-type]


# --- runs --------------------------------------------------------------------------------------


def config(**changes: Any) -> RunConfig:
    common = {"training__rounds": 3, "training__batch_size": 16, "method__adjust_every": 2}
    return tiny(**{"method__name": "prunefl", **common, **changes})


def test_a_run_asks_one_client_first_keeps_its_density_and_repeats(tmp_path: Path) -> None:
    out = run_inline(config(), tmp_path / "one")
    start, *rounds = read_metrics(out)
    assert start["first_mask"]["client"] in range(4)
    assert not start["skipped"]
    assert {line["density"] for line in rounds} == {start["density"]}
    assert start["density"] == pytest.approx(0.2, rel=0.01)
    assert [bool(line["adjusted"]) for line in rounds] == [False, True, False]
    # One client of four got the start; squares of all weights went up in one round.
    summary = read_summary(out)
    assert summary["bytes_start_down"] < 0.5 * summary["bytes_dense_round"]
    up = [line["bytes_up"] for line in rounds]
    assert up[1] > 4 * 0.9 * summary["bytes_dense_round"] > up[0]
    assert digest(run_inline(config(), tmp_path / "two")) == digest(out)


def test_published_runs_may_keep_fewer_weights(tmp_path: Path) -> None:
    changes = {"method__adaptive": True, "method__fixed_time": 0.01}
    out = run_inline(config(**changes), tmp_path / "run")
    start, *rounds = read_metrics(out)
    assert all(0 < line["density"] < 0.19 for line in (start, *rounds))
    checkpoint = read_checkpoint(out)
    assert checkpoint is not None
    assert checkpoint.state.model.patterns is not None
    assert checkpoint.state.model.patterns.density == rounds[-1]["density"]


def test_without_reconfigurations_rounds_are_plain_averaging_at_the_first_mask() -> None:
    state = RunState(1, state_at(0.3), {"until": 1, "limit": 9})
    method = PruneFL(adjust_until=1)
    request = method.request(state)
    assert request.expected == train_request(state).expected
    ours = method.actions["train"](request, place("prunefl"))
    theirs = train(train_request(state), place("prunefl"))
    assert not ours.tensors
    for name, value in theirs.states[MODEL].values.items():
        assert np.array_equal(ours.states[MODEL].values[name], value)
    pooled = Pooled([0], 1, states=ours.states)
    assert method.update(state, pooled).model is ours.states[MODEL]
