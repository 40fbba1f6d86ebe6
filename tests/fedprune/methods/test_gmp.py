"""Federated GMP and GraNet: masks and counts of the schedule, and of one process, step by step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import run_inline, tiny
from torch import nn

from fedprune.errors import ConfigError
from fedprune.exchange.messages import MODEL
from fedprune.exchange.pooled import Pooled
from fedprune.methods.base import RunState, Start
from fedprune.methods.gmp import GMP, GraNet
from fedprune.rounds.folder import MODEL as MODEL_FILE
from fedprune.rounds.folder import read_metrics
from prunelab.errors import RunError
from sparsemodel.errors import DensityError
from sparsemodel.loops.gradual import GradualPruner
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.schedule import cosine, cubic
from sparsemodel.runtime.adjust import carry
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import Entries, SparseState
from sparsemodel.storage.state_file import load_state

SHAPES = {"0.weight": (10, 12), "1.weight": (6, 10)}
SCHEDULE = {"prune_from": 1, "prune_until": 9, "prune_every": 3}
CHANGES = (4, 7, 9)


def merged(round_number: int) -> dict[str, np.ndarray[Any, Any]]:
    """What clients might have made of the weights; the second layer's are smaller."""
    random = np.random.default_rng(round_number)
    return {
        name: (scale * random.normal(size=shape)).astype(np.float32)
        for (name, shape), scale in zip(SHAPES.items(), (1.0, 0.6), strict=True)
    }


def started(method: GMP, rounds: int = 10) -> RunState:
    def nobody(request: object) -> Any:
        raise AssertionError("no client is asked before the first round")

    state = SparseState(merged(0))
    return method.start(Start(lambda: state, SHAPES, {}, nobody, rounds, 7))


def after_training(state: RunState, growth: Entries | None = None) -> Pooled:
    """New weights at the places that there are."""
    new = SparseState(merged(state.round_index + 1))
    patterns = state.model.patterns
    model = new if patterns is None else carry(new, patterns)
    return Pooled([0], 1, states={MODEL: model}, growth=growth or {})


def active(state: RunState) -> dict[str, np.ndarray[Any, Any]]:
    """Where weights are, bool [weights]."""
    patterns = state.model.patterns
    found = {name: np.ones(int(np.prod(shape)), bool) for name, shape in SHAPES.items()}
    for name, pattern in (patterns or {}).items():
        found[name][:] = False
        found[name][pattern.positions()] = True
    return found


# --- gradual magnitude pruning -------------------------------------------------------------------


@pytest.mark.parametrize("within", ["layer", "all"])
def test_masks_are_those_of_one_process(within: str) -> None:
    """The server's masks of merged weights are those of a pruner that sees the same weights."""
    method = GMP(0.2, within=within, **SCHEDULE)
    state = started(method)
    model = nn.Sequential(nn.Linear(12, 10, bias=False), nn.Linear(10, 6, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    everything = Mask({name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()})
    pruner = GradualPruner(model, optimizer, plan=method.plan(state), mask=everything)
    for number in range(1, 11):
        before = active(state)
        with torch.no_grad():
            for name, value in merged(number).items():
                model.get_parameter(name).copy_(torch.from_numpy(value) * pruner.mask[name])
        optimizer.step()
        pruner.step()
        state = method.update(state, after_training(state))
        now = active(state)
        for name, pattern in pruner.mask.items():
            assert np.array_equal(now[name], pattern.numpy().reshape(-1)), (number, name)
            assert not (now[name] & ~before[name]).any()  # what is pruned stays pruned
        assert any((now[name] != before[name]).any() for name in now) == (number in CHANGES)
        if number >= 4:
            density = cubic(max(c for c in CHANGES if c <= number), start=1, end=9, final=0.2)
            kept = {name: int(places.sum()) for name, places in now.items()}
            if within == "layer":
                assert kept == {n: round(density * int(np.prod(s))) for n, s in SHAPES.items()}
            else:
                assert sum(kept.values()) == round(density * 180)
                assert kept["0.weight"] / 120 > kept["1.weight"] / 60
        expected = merged(number)
        for name, places in now.items():
            assert np.array_equal(
                state.model.dense_layer(name).reshape(-1), expected[name].reshape(-1) * places
            )


def test_three_rounds_by_hand() -> None:
    """From 1 to 1/4 after two rounds: 1/4 + 3/4 (1/2)³ = .34375 of eight weights are 3, then 2."""
    method = GMP(0.25, prune_until=2)
    weights = np.float32([[8, -7, 1, 2], [0.5, 6, -3, 4]])
    state = RunState(0, SparseState({"w": weights}), {"until": 2, "layers": ["w"]})
    state = method.update(state, Pooled([0], 1, states={MODEL: state.model}))
    assert state.model.patterns is not None
    assert state.model.patterns["w"].positions().tolist() == [0, 1, 5]
    trained = state.model.replace({"w": np.float32([0.1, -7, 9])})
    state = method.update(state, Pooled([0], 1, states={MODEL: trained}))
    assert state.model.dense()["w"].tolist() == [[0, -7, 0, 0], [0, 9, 0, 0]]
    state = method.update(state, Pooled([0], 1, states={MODEL: state.model}))
    assert state.model.values["w"].tolist() == [-7, 9]


def test_density_one_is_federated_averaging(tmp_path: Path) -> None:
    common = {"method__density": 1.0, "training__rounds": 2, "data__num_train": 60}
    states = [
        load_state(run_inline(tiny(method__name=n, **common), tmp_path / n) / MODEL_FILE)[0]
        for n in ("fedavg", "gmp", "granet")
    ]
    for found in states[1:]:
        assert found.patterns is None
        assert all(np.array_equal(v, found.values[n]) for n, v in states[0].values.items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_messages_shrink_with_the_mask(dtype: str, tmp_path: Path) -> None:
    """In a run of five rounds; coded changes, whose residuals follow from dense to pruned."""
    config = tiny(
        method__name="gmp", training__rounds=5, method__density=0.05, data__num_train=60,
        federation__value_dtype=dtype,
    )  # fmt: skip
    lines = [line for line in read_metrics(run_inline(config, tmp_path / "a")) if "round" in line]
    densities = [cubic(r, start=0, end=4, final=0.05) for r in (1, 2, 3, 4, 4)]
    assert [line["density"] for line in lines] == pytest.approx(densities, rel=0.01)
    assert all(not line["skipped"] for line in lines)
    sent = [line["bytes_up"] for line in lines]
    assert sent == sorted(sent, reverse=True)
    assert sent[-1] < 0.5 * sent[0]


# --- GraNet --------------------------------------------------------------------------------------


def test_without_regeneration_it_is_gradual_magnitude_pruning() -> None:
    ours, plain = GraNet(0.2, **SCHEDULE, regenerate=0, regenerate_last=0), GMP(0.2, within="all")
    plain = replace(plain, **SCHEDULE)
    first, second = started(ours), started(plain)
    for _ in range(10):
        assert not ours.request(first).expected.growth
        first = ours.update(first, after_training(first))
        second = plain.update(second, after_training(second))
        assert first.model.patterns == second.model.patterns


def test_the_exchange_by_an_independent_count() -> None:
    """After each shrinking ⌊r_t · active⌋ of the smallest go, and the best known gradients come."""
    ours = GraNet(0.2, **SCHEDULE, regenerate_last=0.1)
    plain = GMP(0.2, within="all", **SCHEDULE)
    state, moved = started(ours), 0
    for number in range(1, 11):
        asked = ours.request(state).expected.growth
        assert bool(asked) == (number in CHANGES[1:])  # at the first nothing was pruned
        growth: Entries = {}
        for name, count in asked.items():
            free = np.flatnonzero(~active(state)[name])
            gradients = np.random.default_rng(number).normal(size=len(free)).astype(np.float32)
            best = np.argsort(-np.abs(gradients), kind="stable")[:count]
            growth[name] = (np.sort(free[best]), gradients[np.sort(best)])
        pooled = after_training(state, growth)
        shrunk = plain.update(state, pooled)
        after = ours.update(state, pooled)
        share = cosine(number - 1, value=0.5, end=8, lowest=0.1)
        for name in SHAPES:
            kept, now = active(shrunk)[name], active(after)[name]
            assert kept.sum() == now.sum()  # the exchange keeps the density
            count = int(share * kept.sum()) if name in growth else 0
            assert count <= asked.get(name, 0)
            weights = np.abs(shrunk.model.dense_layer(name).reshape(-1))
            expected = kept.copy()
            if count:
                at, gradients = growth[name]
                expected[np.argsort(np.where(kept, weights, np.inf), kind="stable")[:count]] = False
                new = at[np.argsort(-np.abs(gradients), kind="stable")[:count]]
                expected[new] = True
                assert not after.model.dense_layer(name).reshape(-1)[new].any()
                moved += count
            assert np.array_equal(now, expected), (number, name)
        state = after
    assert moved > 5


def test_an_exchange_by_hand() -> None:
    """Six of eight weights become ⌊.34375 · 8⌉ = 3; half of them, ⌊1.5⌋ = 1, is exchanged."""
    method = GraNet(0.25, prune_until=2, regenerate=0.5, regenerate_last=0.5)
    pattern = Pattern.from_positions((8,), np.arange(6))
    model = SparseState({"w": np.float32([5, 1, -4, 2, 3, 0.5])}, Patterns({"w": pattern}))
    state = RunState(0, model, {"until": 2, "layers": ["w"]})
    assert method.request(state).expected.growth == {"w": 2}  # no more than were pruned
    growth: Entries = {"w": (np.array([6, 7]), np.float32([0.1, -0.2]))}
    after = method.update(state, Pooled([0], 1, states={MODEL: model}, growth=growth))
    assert after.model.patterns is not None
    assert after.model.patterns["w"].positions().tolist() == [0, 2, 7]
    assert after.model.values["w"].tolist() == [5, -4, 0]


def test_a_run_grows_weights_and_keeps_to_the_schedule(tmp_path: Path) -> None:
    common = {"training__rounds": 4, "data__num_train": 60, "method__within": "all"}
    outs = [run_inline(tiny(method__name=n, **common), tmp_path / n) for n in ("gmp", "granet")]
    densities = [cubic(r, start=0, end=3, final=0.2) for r in (1, 2, 3, 3)]
    for out in outs:
        lines = [line for line in read_metrics(out) if "round" in line]
        assert [line["density"] for line in lines] == pytest.approx(densities, rel=0.005)
    plain, grown = (load_state(out / MODEL_FILE)[0].patterns for out in outs)
    assert plain is not None
    assert grown is not None
    assert plain.num_active == grown.num_active
    assert plain != grown


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (GMP, {"prune_from": -1}),
        (GMP, {"prune_until": -1}),
        (GMP, {"prune_until": 3, "prune_from": 3}),
        (GMP, {"prune_every": 0}),
        (GMP, {"within": "row"}),
        (GraNet, {"regenerate": 1.5}),
        (GraNet, {"regenerate_last": float("nan")}),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: type[GMP], setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        kind(**setting)


def test_a_schedule_that_ends_too_late_or_begins_too_late_is_refused() -> None:
    for settings in ({"prune_until": 11}, {"prune_from": 8}):
        with pytest.raises(RunError, match=r"prune_from < prune_until <= training\.rounds"):
            started(GMP(0.2, **settings))
    with pytest.raises(DensityError, match="fewer than the 2 layers"):
        started(GMP(0.005))


def test_differential_privacy_covers_what_moves_by_weights_alone() -> None:
    tiny(method__name="gmp", privacy__dp="central")
    with pytest.raises(ConfigError, match="moves its mask by clients' gradients"):
        tiny(method__name="granet", privacy__dp="central")
