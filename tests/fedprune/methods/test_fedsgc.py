"""FedSGC: which weights go and come, by hand and by a plain loop; the direction; whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import digest, run_inline, tiny
from places import place, state_at

from fedprune.config import RunConfig
from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import MODEL, Expected, Reply, Request
from fedprune.exchange.pooled import Pooled
from fedprune.flower import wire
from fedprune.local.training import growth_rows, train
from fedprune.methods.base import RunState, train_request
from fedprune.methods.fedsgc import DIRECTION, FALLING, RISING, FedSGC, chosen, direction
from fedprune.methods.own_masks import PRUNED
from fedprune.rounds.folder import MODEL as MODEL_FILE
from fedprune.rounds.folder import open_run, read_checkpoint, read_metrics
from prunelab.errors import RunError
from sparsemodel.runtime.adjust import prune_and_grow
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state

UNTIL = {"until": 10}


def of(values: list[float], kept: list[int], size: int = 8) -> SparseState:
    pattern = Pattern.from_positions((size,), np.array(kept, np.int64))
    return SparseState({"w": np.float32(values)}, Patterns({"w": pattern}))


def signs_for(state: SparseState, seed: int) -> SparseState:
    """A direction at two thirds of all weights, drawn."""
    assert state.patterns is not None
    draw, values, patterns = np.random.default_rng(seed), {}, {}
    for name, pattern in state.patterns.items():
        at = np.flatnonzero(draw.random(pattern.num_weights) < 2 / 3)
        patterns[name] = Pattern.from_positions(pattern.shape, at)
        values[name] = np.float32(draw.choice([-1, 1], len(at)))
    return SparseState(values, Patterns(patterns))


# --- which ones ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "count", "taken"),
    [
        (0.5, 2, [0, 3]),  # the best preferred (3), the best other (5)
        (1.0, 2, [1, 3]),
        (0.0, 2, [0, 2]),
        (1.0, 3, [0, 1, 3]),  # two are preferred: the best other makes up for the third
        (0.0, 3, [0, 2, 3]),  # and the other way round
        (0.5, 3, [0, 2, 3]),  # half of three is one
        (0.5, 0, []),
        (0.5, 4, [0, 1, 2, 3]),
    ],
)
def test_a_share_is_taken_among_the_preferred(share: float, count: int, taken: list[int]) -> None:
    scores, preferred = np.float32([5, 1, 4, 3]), np.array([0, 1, 0, 1], bool)
    found = chosen(scores, preferred, count=count, share=share)
    assert np.flatnonzero(found).tolist() == taken


def test_the_direction_by_hand() -> None:
    """Kept weights 2 → 3, 1 → 1, −1 → −2: +, 0, −; a weight grown meanwhile is its own value's.

    Of pruned ones the opposite of the mean gradient, but where it is zero or now active.
    """
    before, after = of([2, 1, -1], [0, 2, 5]), of([3, 1, -4, -2], [0, 2, 3, 5])
    growth = {"w": (np.array([1, 3, 4, 6]), np.float32([0.5, 9, -2, 0]))}
    found = direction(before, after, growth)
    assert found.patterns is not None
    assert found.patterns["w"].positions().tolist() == [0, 1, 3, 4, 5]
    assert found.values["w"].tolist() == [1, -1, -1, 1, -1]
    alone = direction(before, after, {})
    assert alone.patterns is not None
    assert alone.patterns["w"].positions().tolist() == [0, 3, 5]


# --- a client ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("against", "along"), [(0.5, 0.5), (1.0, 0.25), (0.0, 1.0)])
def test_an_exchange_is_that_of_a_plain_loop(against: float, along: float) -> None:
    start = state_at(0.3)
    signs = signs_for(start, seed=1)
    method = FedSGC(against=against, along=along, adjust_after=1.0)
    request = method.request(RunState(3, start, UNTIL, kept={DIRECTION: signs}))
    counts = request.expected.growth
    local = place("fedsgc")
    reply = method.actions["train"](request, local)
    check_parts(reply, request)
    trained = train(train_request(RunState(3, start)), local).states[MODEL]
    rows = growth_rows(local, 3)
    everything = {name: 2 * count for name, count in counts.items()}
    gradients = local.open(trained).growth(
        everything, local.data.train.inputs[rows], local.data.train.targets[rows]
    )
    moved = 0
    for name, count in counts.items():
        assert start.patterns is not None
        assert signs.patterns is not None
        compass = dict(
            zip(signs.patterns[name].positions().tolist(), signs.values[name], strict=True)
        )
        active = start.patterns[name].positions().tolist()
        rows_of = zip(active, trained.values[name], start.values[name], strict=True)
        weights = [(abs(w), i, (w - w0) * compass.get(i, 0) < 0) for i, w, w0 in rows_of]
        pairs = zip(*(each.tolist() for each in gradients[name]), strict=True)
        candidates = [(-abs(g), i, -g * compass.get(i, 0) > 0) for i, g in pairs if g]
        gone = pick(weights, count, int(against * count))
        new = pick(candidates, count, int(along * count))
        assert reply.masks[PRUNED][name].positions().tolist() == sorted(gone)
        assert reply.entries[MODEL][name][0].tolist() == sorted(new)
        assert not reply.entries[MODEL][name][1].any()
        smallest = {i for _, i, _ in sorted(weights)[:count]}
        moved += len(smallest.symmetric_difference(gone))
    assert moved > 0  # the direction did decide


def pick(rows: list[tuple[float, int, bool]], count: int, first: int) -> list[int]:
    """The best `first` of the preferred, then of the others, then of whatever is left."""
    preferred = [i for _, i, good in sorted(rows) if good][:first]
    others = [i for _, i, good in sorted(rows) if not good][: count - len(preferred)]
    taken = preferred + others
    rest = [i for _, i, _ in sorted(rows) if i not in taken]
    return taken + rest[: count - len(taken)]


def test_without_a_direction_it_is_the_plain_exchange() -> None:
    start = state_at(0.3)
    request = FedSGC(adjust_after=1.0).request(RunState(3, start, UNTIL))
    assert not request.masks
    reply = FedSGC.actions["train"](request, place("fedsgc"))
    plain = train(
        train_request(RunState(3, start), growth=request.expected.growth), place("fedsgc")
    )
    wanted = prune_and_grow(plain.states[MODEL], plain.entries[MODEL], request.expected.growth)
    assert wanted.patterns is not None
    assert start.patterns is not None
    for name in request.expected.growth:
        after, before = wanted.patterns[name].positions(), start.patterns[name].positions()
        assert np.array_equal(reply.entries[MODEL][name][0], np.setdiff1d(after, before))
        assert np.array_equal(reply.masks[PRUNED][name].positions(), np.setdiff1d(before, after))


@pytest.mark.parametrize("key", ["against", "along"])
def test_a_question_without_its_numbers_is_refused(key: str) -> None:
    request = FedSGC().request(RunState(3, state_at(0.3), UNTIL))
    fields = {name: value for name, value in request.fields.items() if name != key}
    with pytest.raises(ClientError, match=key):
        FedSGC.actions["train"](replace(request, fields=fields), place("fedsgc"))


# --- the server --------------------------------------------------------------------------------


def test_the_round_before_asks_for_gradients_and_keeps_the_direction() -> None:
    """Adjustments come after rounds 2, 4, ...: in round 1 and 3 clients tell gradients."""
    method, start = FedSGC(adjust_every=2), state_at(0.3)
    state = RunState(2, start, UNTIL)
    request = method.request(state)
    assert request.expected.growth == method.exchange_counts(state, ahead=2)
    assert request.expected.growth
    assert not request.expected.masks
    reply = method.actions["train"](request, place("fedsgc"))
    check_parts(reply, request)
    pooled = Pooled([0], 1, states={MODEL: reply.states[MODEL]}, growth=reply.entries[MODEL])
    after = method.update(state, pooled)
    expected = direction(start, reply.states[MODEL], reply.entries[MODEL])
    assert after.kept[DIRECTION].patterns == expected.patterns
    asked = method.request(after)
    rising, falling = asked.masks[RISING], asked.masks[FALLING]
    for name, values in expected.values.items():
        at = expected.patterns[name].positions()  # type: ignore[index]
        assert np.array_equal(rising[name].positions(), at[values > 0])
        assert np.array_equal(falling[name].positions(), at[values < 0])
        grown = reply.entries[MODEL].get(name)
        if grown is not None:
            assert np.isin(grown[0], at).all()
    collector = method.collector(after)
    assert collector is not None
    reply = method.actions["train"](asked, place("fedsgc"))
    collector.add(0, reply)
    last = method.update(after, collector.result())
    assert last.kept == {}
    assert last.model.patterns is not None
    assert last.model.patterns.counts() == start.patterns.counts()  # type: ignore[union-attr]


def test_masks_of_a_question_travel() -> None:
    mask = Patterns({"w": Pattern.from_positions((2, 3), np.array([0, 4]))})
    request = Request("train", masks={"one": mask, "two": mask}, expected=Expected())
    sent = wire.encode_request(
        request, program=wire.ProgramText(), held=frozenset(), base=None, dtype="fp32"
    )
    assert sent.mask_size > 0
    received = wire.receive(sent.record, wire.Held())
    assert received.request({"w": (2, 3)}).masks == {"one": mask, "two": mask}
    with pytest.raises(ClientError, match="of shape"):
        received.request({"w": (3, 2)})


@pytest.mark.parametrize("setting", ["against", "along"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_shares_that_cannot_be_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"method.{setting}: expected 0 to 1"):
        FedSGC(**{setting: value})  # type: ignore[arg-type]


# --- runs --------------------------------------------------------------------------------------


def config(**changes: Any) -> RunConfig:
    common = {"training__rounds": 3, "training__batch_size": 16, "method__adjust_every": 2}
    return tiny(**{"method__name": "fedsgc", **common, **changes})


def test_a_run_keeps_its_density_and_goes_the_same_way_twice(tmp_path: Path) -> None:
    lines = read_metrics(run_inline(config(), tmp_path / "one"))[1:]
    assert len({line["density"] for line in lines}) == 1
    assert [bool(line["adjusted"]) for line in lines] == [False, True, False]
    assert not any(line["skipped"] for line in lines)
    assert digest(run_inline(config(), tmp_path / "two")) == digest(tmp_path / "one")


def test_a_run_that_stopped_before_an_adjustment_goes_on_with_its_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_inline(config(), tmp_path / "whole")
    calls = []

    def stopping(self: FedSGC, state: RunState) -> Request:
        calls.append(state.round_index)
        if calls == [0, 1]:
            raise RunError("stopped")
        return request(self, state)

    request = FedSGC.request
    monkeypatch.setattr(FedSGC, "request", stopping)
    out = tmp_path / "stopped"
    with pytest.raises(RunError, match="stopped"):
        run_inline(config(), out)
    checkpoint = read_checkpoint(out)
    assert checkpoint is not None
    kept = checkpoint.state.kept[DIRECTION]
    assert kept.patterns is not None
    assert set(kept.values) == set(kept.patterns) == set(checkpoint.state.model.patterns or ())
    assert all(set(np.unique(values)) <= {-1, 1} for values in kept.values.values())
    with open_run(out) as folder:
        assert folder.state is not None
        assert list(folder.state.kept) == [DIRECTION]
    run_inline(config(), out, resume=True)
    assert digest(out) == digest(whole)


def test_a_run_without_adjustments_is_the_fixed_mask(tmp_path: Path) -> None:
    common = {"method__adjust_until": 1, "training__rounds": 2}
    ours = run_inline(config(method__distribution="uniform", **common), tmp_path / "ours")
    theirs = run_inline(config(method__name="magnitude", **common), tmp_path / "theirs")
    found, expected = (load_state(out / MODEL_FILE)[0] for out in (ours, theirs))
    assert found.patterns == expected.patterns
    assert all(np.array_equal(v, found.values[name]) for name, v in expected.values.items())


def test_replies_without_their_masks_are_refused() -> None:
    request = FedSGC().request(RunState(3, state_at(0.3), UNTIL))
    reply = FedSGC.actions["train"](request, place("fedsgc"))
    with pytest.raises(ClientError, match="expected masks"):
        check_parts(Reply(reply.num_examples, reply.fields, reply.states, reply.entries), request)
