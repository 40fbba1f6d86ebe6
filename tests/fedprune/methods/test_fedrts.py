"""FedRTS: outcomes and beliefs by hand and against dense arrays in float64; whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import digest, run_inline, tiny
from places import dense_state, place, prunable, state_at

from fedprune.config import RunConfig
from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.aggregate import StateMean
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.local.training import train
from fedprune.methods.base import RunState, Start, train_request
from fedprune.methods.fedrts import NAMED, SEED_BELIEF, A, B, Belief, FedRTS, Votes
from fedprune.rounds.folder import MODEL as MODEL_FILE
from fedprune.rounds.folder import read_checkpoint, read_metrics
from prunelab.errors import RunError
from prunelab.runs.seeds import rng
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state


def beginning(method: FedRTS, rounds: int = 10, seed: int = 5) -> RunState:
    return method.start(Start(dense_state, prunable(), {}, lambda request: iter(()), rounds, seed))


def played(method: FedRTS, state: RunState, *, clients: int = 2) -> tuple[RunState, list[Reply]]:
    """The state after a round, and what clients answered."""
    request, collector = method.request(state), method.collector(state)
    assert collector is not None
    replies = []
    for client in range(clients):
        local = place("fedrts", count=20 + 9 * client, client=client, lr=0.05)
        reply = method.actions["train"](request, local)
        check_parts(reply, request)
        collector.add(client, reply)
        replies.append(reply)
    return method.update(state, collector.result()), replies


# --- outcomes and beliefs ----------------------------------------------------------------------


def by_hand(size: int, **settings: Any) -> tuple[FedRTS, RunState]:
    """A layer of so many weights, of which 0, 2, 3 and 5 are active."""
    pattern = Pattern.from_positions((size,), np.array([0, 2, 3, 5]))
    model = SparseState({"w": np.float32([1, 2, 3, 4])}, Patterns({"w": pattern}))
    ones = SparseState({"w": np.ones(4, np.float32)}, model.patterns)
    memory = {"until": 100, "adjustments": 0, "seed": 3}
    method = FedRTS(adjust_rate=0.5, adjust_every=2, **settings)
    return method, RunState(0, model, memory, kept={A: ones, B: ones})


def told(values: list[float], weight: int, size: int, named: list[int] | None = None) -> Reply:
    pattern = Pattern.from_positions((size,), np.array([0, 2, 3, 5]))
    masks = {}
    if named is not None:
        places = Pattern.from_positions((size,), np.array(named, np.int64))
        masks = {NAMED: Patterns({"w": places})}
    return Reply(
        weight,
        states={MODEL: SparseState({"w": np.float32(values)}, Patterns({"w": pattern}))},
        masks=masks,
    )


def test_a_round_s_outcomes_by_hand() -> None:
    """K = 4, k = ⌊.25 (1 + cos(π/100)) 4⌋ = 1, κ = 3; γ = .5, λ = 10.

    A client of weight 1 with |w| = 5 4 3 2 keeps 0, 2, 3, one of weight 3 with 0 4 4 8 keeps
    2, 3, 5, and so does the mean: 5/4 4 15/4 26/4. X = .125, 1, 1, .875.
    """
    method, state = by_hand(10)
    collector = method.collector(state)
    assert collector is not None
    collector.add(0, told([5, -4, 3, 2], 1, 10))
    collector.add(1, told([0, 4, -4, 8], 3, 10))
    after = method.update(state, collector.result())
    np.testing.assert_allclose(after.kept[A].values["w"], [2.25, 11, 11, 9.75])
    np.testing.assert_allclose(after.kept[B].values["w"], [9.75, 1, 1, 2.25])
    assert after.model.patterns == state.model.patterns
    assert after.memory["adjustments"] == 0


def test_an_adjustment_round_s_outcomes_by_hand() -> None:
    """Of pruned weights X is .25, and .5 Σ p_k more where clients name them.

    1 is named by the client of weight 1, 4 by that of weight 3: X = .375 and .625. All others
    share a = 1 + 10 · .25 = 3.5 and b = 1 + 10 · .75 = 8.5.
    """
    method, state = by_hand(10)
    state = replace(state, round_index=1)
    assert method.request(state).expected.masks == {NAMED: {"w": 1}}
    collector = method.collector(state)
    assert collector is not None
    collector.add(0, told([5, 4, 3, 2], 1, 10, [1]))
    collector.add(1, told([0, 4, 4, 8], 3, 10, [4]))
    after = method.update(state, collector.result())
    assert after.memory["adjustments"] == 1
    assert after.kept[A].patterns is not None
    believed = dict(
        zip(
            after.kept[A].patterns["w"].positions().tolist(),
            zip(after.kept[A].values["w"], after.kept[B].values["w"], strict=True),
            strict=True,
        )
    )
    assert believed[1] == (4.75, 7.25)
    assert believed[4] == (7.25, 4.75)
    assert set(believed) >= {0, 1, 2, 3, 4, 5}
    a, b = np.full(10, 3.5), np.full(10, 8.5)
    for at, pair in believed.items():
        a[at], b[at] = pair
    theta = rng(SEED_BELIEF, 3, 1, 0).beta(a, b)
    expected = np.sort(np.argsort(-theta)[:4])
    assert after.model.patterns is not None
    assert after.model.patterns["w"].positions().tolist() == expected.tolist()
    # Whatever was drawn without having been known before has the belief of the rest.
    for at in set(expected.tolist()) - {0, 1, 2, 3, 4, 5}:
        assert believed[at] == (3.5, 8.5)
    # Kept weights keep their mean values, grown ones are zero.
    mean = dict(zip([0, 2, 3, 5], np.float32([1.25, 4, 3.75, 6.5]), strict=True))
    assert after.model.values["w"].tolist() == [mean.get(at, 0) for at in expected.tolist()]


def test_rounds_are_those_of_dense_beliefs_in_float64() -> None:
    """Five rounds, two adjustments; what is kept of few weights stands for all of them."""
    method = FedRTS(density=0.3, adjust_every=2, adjust_until=6, adjust_rate=0.3)
    state = beginning(method)
    sizes = {name: int(np.prod(shape)) for name, shape in prunable().items()}
    a, b = ({n: np.ones(size) for n, size in sizes.items()} for _ in range(2))
    changes = 0
    for number in range(1, 6):
        before, counts = state, method._cores(state)
        if number == 5:
            assert method.collector(state) is None
            break
        state, replies = played(method, state)
        mean = StateMean()
        for reply in replies:
            mean.add(reply.states[MODEL], weight=reply.weight)
        total = sum(reply.weight for reply in replies)
        assert before.model.patterns is not None
        assert state.model.patterns is not None
        for place_of, (name, pattern) in enumerate(before.model.patterns.items()):
            at, outcome = pattern.positions(), np.zeros(sizes[name])
            models = [(0.5, mean.result())]
            models += [(0.5 * r.weight / total, r.states[MODEL]) for r in replies]
            for share, model in models:
                order = np.argsort(-np.abs(model.values[name]), kind="stable")
                outcome[at[order[: counts[name]]]] += share
            seen = np.zeros(sizes[name], bool)
            seen[at] = True
            if number % 2 == 0:
                inactive = np.setdiff1d(np.arange(sizes[name]), at)
                outcome[inactive] = 0.25
                for reply in replies:
                    if name in reply.masks[NAMED]:
                        outcome[reply.masks[NAMED][name].positions()] += 0.5 * reply.weight / total
                seen[:] = True
            a[name][seen] += 10 * outcome[seen]
            b[name][seen] += 10 * (1 - outcome[seen])
            if number % 2 == 0:
                known = state.kept[A].patterns[name].positions()  # type: ignore[index]
                rounded_a, rounded_b = a[name].copy(), b[name].copy()
                rounded_a[known] = state.kept[A].values[name]
                rounded_b[known] = state.kept[B].values[name]
                np.testing.assert_allclose(rounded_a, a[name], rtol=1e-5)
                np.testing.assert_allclose(rounded_b, b[name], rtol=1e-5)
                theta = rng(SEED_BELIEF, 5, number - 1, place_of).beta(rounded_a, rounded_b)
                drawn = np.sort(np.argsort(-theta, kind="stable")[: pattern.num_active])
                assert np.array_equal(state.model.patterns[name].positions(), drawn)
                changes += len(np.setdiff1d(drawn, at))
        assert state.model.patterns.counts() == before.model.patterns.counts()
        few = state.kept[A].patterns
        assert few is not None
        assert few.num_active < 0.75 * few.num_weights
    assert changes > 0


def test_equal_beliefs_are_drawn_alike_and_strong_ones_win() -> None:
    """Three weights of Beta(1000, 1) among a thousand of Beta(1, 3) are always drawn."""
    at, strong = np.array([5, 500, 999]), np.full(3, 1000, np.float32)
    belief = Belief(at, strong, np.ones(3, np.float32), (1.0, 3.0))
    counts = np.zeros(1000)
    for seed in range(400):
        drawn = belief.draw(1000, 100, rng(seed))
        assert len(drawn) == 100
        assert np.isin(at, drawn).all()
        counts[drawn] += 1
    others = np.delete(counts, at)
    # 97 of 997, 400 times: 38.9 each, deviation 5.9.
    assert abs(others.mean() - 400 * 97 / 997) < 1e-9
    assert others.std() == pytest.approx(5.9, rel=0.15)


# --- a client ----------------------------------------------------------------------------------


def test_clients_name_the_largest_gradients_and_send_no_values() -> None:
    method = FedRTS(density=0.3)
    state = RunState(3, state_at(0.3), {"until": 10, "adjustments": 0, "seed": 0})
    request = method.request(state)
    reply = method.actions["train"](request, place("fedrts"))
    check_parts(reply, request)
    plain = train(train_request(state, growth=request.expected.masks[NAMED]), place("fedrts"))
    assert not reply.entries
    assert set(reply.masks[NAMED]) == set(plain.entries[MODEL])
    for name, (at, _) in plain.entries[MODEL].items():
        assert np.array_equal(reply.masks[NAMED][name].positions(), at)
        assert len(at) == request.expected.masks[NAMED][name]
    for name, value in plain.states[MODEL].values.items():
        assert np.array_equal(reply.states[MODEL].values[name], value)


# --- refusals ----------------------------------------------------------------------------------


def test_active_weights_cannot_be_named_and_leave_no_trace() -> None:
    method, state = by_hand(10)
    collector = method.collector(state)
    assert isinstance(collector, Votes)
    collector.add(0, told([5, 4, 3, 2], 1, 10, [1]))
    with pytest.raises(ClientError, match="named for growth that are active"):
        collector.add(1, told([9, 9, 9, 9], 5, 10, [1, 3]))
    pooled = collector.result()
    assert pooled.clients == [0]
    assert pooled.model.values["w"].tolist() == [5, 4, 3, 2]
    assert pooled.growth["w"][0].tolist() == [1]


@pytest.mark.parametrize(
    ("setting", "value"), [("individual", 1.1), ("individual", -1.0), ("belief_weight", 0.0)]
)
def test_settings_that_cannot_be_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"method.{setting}: expected"):
        FedRTS(**{setting: value})  # type: ignore[arg-type]


# --- runs --------------------------------------------------------------------------------------


def config(**changes: Any) -> RunConfig:
    common = {"training__rounds": 3, "training__batch_size": 16, "method__adjust_every": 2}
    return tiny(**{"method__name": "fedrts", **common, **changes})


def test_a_stopped_run_keeps_its_beliefs_and_its_density(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_inline(config(), tmp_path / "whole")
    lines = read_metrics(whole)[1:]
    assert len({line["density"] for line in lines}) == 1
    assert [bool(line["adjusted"]) for line in lines] == [False, True, False]
    assert not any(line["skipped"] for line in lines)
    request, calls = FedRTS.request, []

    def stopping(self: FedRTS, state: RunState) -> Request:
        calls.append(state.round_index)
        if calls == [0, 1]:
            raise RunError("stopped")
        return request(self, state)

    monkeypatch.setattr(FedRTS, "request", stopping)
    out = tmp_path / "stopped"
    with pytest.raises(RunError, match="stopped"):
        run_inline(config(), out)
    checkpoint = read_checkpoint(out)
    assert checkpoint is not None
    assert set(checkpoint.state.kept) == {A, B}
    assert (checkpoint.state.kept[A].values["fc.weight"] >= 1).all()
    run_inline(config(), out, resume=True)
    assert digest(out) == digest(whole)


def test_a_run_without_adjustments_is_the_fixed_mask(tmp_path: Path) -> None:
    common = {"method__adjust_until": 1, "training__rounds": 2}
    ours = run_inline(config(method__distribution="uniform", **common), tmp_path / "ours")
    theirs = run_inline(config(method__name="magnitude", **common), tmp_path / "theirs")
    found, expected = (load_state(out / MODEL_FILE)[0] for out in (ours, theirs))
    assert found.patterns == expected.patterns
    assert all(np.array_equal(v, found.values[name]) for name, v in expected.values.items())
    checkpoint = read_checkpoint(ours)
    assert checkpoint is not None
    assert checkpoint.state.kept == {}
