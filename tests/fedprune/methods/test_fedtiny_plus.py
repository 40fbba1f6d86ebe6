"""FedTiny's options beyond the paper, each by hand; and that none of them touches FedTiny."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import digest, laid_out, run_inline, tiny
from torch import nn

from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.messages import MODEL, Request
from fedprune.exchange.pooled import Pooled
from fedprune.local.site import Local, open_data
from fedprune.local.training import SEED_GROWTH, epoch_batches, train
from fedprune.methods.base import RunState
from fedprune.methods.fedtiny import FedTiny
from fedprune.methods.fedtiny.merged import grow, summed_growth, train_and_grow
from fedprune.methods.fedtiny.plus import FedTinyPlus
from fedprune.methods.fedtiny.pool import candidate_counts, candidate_pool
from fedprune.methods.fedtiny.progressive import adjust
from fedprune.rounds.folder import MODEL as MODEL_FILE
from fedprune.rounds.folder import read_metrics
from fedprune.rounds.ledger import Totals, forward_flops
from fedprune.rounds.setup import Setup
from prunelab.data.batches import Preprocessing
from sparsemodel.layers.from_state import load_state_
from sparsemodel.runtime.adjust import prune_to_largest
from sparsemodel.runtime.outputs import largest_of_rows
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state

FAITHFUL = {
    "growth_at": "after", "growth_batches": 0, "keep_outputs": False, "protect": 0,
    "adjust_from": 0, "candidates": "noise", "selection": "batch-norm", "pool_size": 0,
    "granularity": "block",
}  # fmt: skip
PLUS = {f"method__{key}": value for key, value in FAITHFUL.items()}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A laid-out federation of small batches."""
    return laid_out(
        tmp_path_factory.mktemp("setup"),
        method__name="fedtiny-plus",
        data__alpha=0.3,
        training__batch_size=16,
        **PLUS,
    )


def plus(**settings: Any) -> FedTinyPlus:
    """Faithful but for these."""
    return FedTinyPlus(**{**FAITHFUL, **settings})


def place(setup: Setup, client: int = 0, **training: Any) -> Local:
    config = setup.config
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, **training)
    )  # fmt: skip
    return Local(
        client, open_data(setup.config, client, setup=str(setup.folder)), config, setup.network
    )


def beginning(setup: Setup, density: float = 0.2) -> SparseState:
    counts = candidate_counts(setup.prunable, density, num_candidates=1, seed=0)[0]
    return prune_to_largest(setup.start_state(), counts)


# --- FedTiny itself ----------------------------------------------------------------------------


def test_fedtiny_s_bits_are_those_it_always_had() -> None:
    """Candidates and an adjustment of made-up weights: comparisons alone, the same everywhere."""
    generator = np.random.default_rng(5)
    shapes = {"a": (6, 4, 3, 3), "b": (8, 6, 3, 3), "c": (10, 8)}
    dense = SparseState(
        {n: generator.integers(-500, 500, s).astype(np.float32) for n, s in shapes.items()}
    )
    counts = candidate_counts(shapes, 0.1, num_candidates=3, seed=2)
    pool = candidate_pool(dense, counts)
    masks = [pool.candidate(number).patterns for number in range(3)]
    first = masks[0]
    assert first is not None
    growth = {
        name: (np.setdiff1d(np.arange(p.num_weights), p.positions())[::7], np.float32([]))
        for name, p in first.items()
    }
    growth = {
        n: (at, generator.integers(-9, 9, len(at)).astype(np.float32))
        for n, (at, _) in growth.items()
    }
    moved = adjust(pool.candidate(0), growth, {"b": 9, "c": 3}).patterns
    assert moved is not None
    digests = [mask.digest() for mask in [*masks, moved] if mask is not None]
    assert digests == GOLDEN


GOLDEN = [
    "691f66073557d8884976464507e301fd",
    "b573266a514a8c6280f25651dfdff7a7",
    "62d1a80927bbdd8dbc54a84961c89883",
    "d7f27f51349a99a4d0050740e8655ccd",
]


def test_with_every_option_faithful_it_is_fedtiny_bit_for_bit(tmp_path: Path) -> None:
    plain = run_inline(tiny(method__pool_size=0), tmp_path / "fedtiny")
    faithful = run_inline(tiny(method__name="fedtiny-plus", **PLUS), tmp_path / "plus")
    ends = [load_state(out / MODEL_FILE)[0] for out in (plain, faithful)]
    assert ends[0].patterns == ends[1].patterns
    for name, values in ends[0].values.items():
        assert np.array_equal(values, ends[1].values[name])
    for one, other in zip(read_metrics(plain), read_metrics(faithful), strict=True):
        assert one.get("bytes_up") == other.get("bytes_up")
        assert one.get("bytes_down") == other.get("bytes_down")


def test_every_option_together_runs_keeps_the_density_and_repeats_itself(tmp_path: Path) -> None:
    config = tiny(
        method__name="fedtiny-plus", method__growth_at="merged", method__growth_batches=2,
        method__keep_outputs=True, method__protect=2, method__adjust_from=1,
    )  # fmt: skip
    runs = [run_inline(config, tmp_path / name) for name in ("first", "second")]
    assert digest(runs[0]) == digest(runs[1])
    lines = [line for line in read_metrics(runs[0]) if "round" in line]
    assert len({line["density"] for line in lines}) == 1
    assert [bool(line["adjusted"]) for line in lines] == [False, True, True, False]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"growth_at": "before"},
            "growth_at: expected one of after, merged, fresh, drawn; got 'before'",
        ),
        ({"growth_batches": -1}, "growth_batches: expected 0 or more, got -1"),
        ({"protect": -1}, "protect: expected 0 or more"),
        ({"adjust_from": 9, "adjust_until": 9}, r"adjust_from: expected less than adjust_until"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        FedTinyPlus(**settings)


# --- growth at the merged model ----------------------------------------------------------------


def dense_gradients(local: Local, state: SparseState, batches: int | None) -> dict[str, Any]:
    """Mean gradient of every weight over mini-batches at a state, by autograd in float64."""
    model = local.network.build()
    load_state_(model, state)
    model.double().train()
    sums: dict[str, Any] = {}
    samples = 0
    source = epoch_batches(
        local.data.train.inputs, local.data.train.targets, epochs=1,
        batch_size=local.config.training.batch_size, seed=local.seed(SEED_GROWTH, 3),
        augmented=False,
    )  # fmt: skip
    for number, (_, images, labels) in enumerate(source):
        if number == batches:
            break
        model.zero_grad()
        inputs = torch.from_numpy(Preprocessing().apply(images)).double()
        nn.functional.cross_entropy(model(inputs), torch.from_numpy(labels)).backward()
        for name in state.patterns or ():
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            sums[name] = sums.get(name, 0.0) + len(labels) * gradient.numpy().reshape(-1)
        samples += len(labels)
    assert number > 1
    return {name: total / samples for name, total in sums.items()}


@pytest.mark.parametrize("execution", ["sparse", "masked"])
@pytest.mark.parametrize("batches", [0, 2])
def test_growth_is_the_mean_gradient_over_the_batches(
    setup: Setup, execution: str, batches: int
) -> None:
    """Values are exact; and where each batch gives all its pruned weights, so are the places."""
    local, state = place(setup, execution=execution), beginning(setup)
    assert state.patterns is not None
    names = list(state.patterns)[-3:]
    counts = {name: state.patterns[name].num_weights // 4 for name in names}
    entries, held = summed_growth(state, counts, local, batches=batches, round_index=3)
    gradients = dense_gradients(local, state, batches or None)
    assert held > 0
    assert set(entries) == set(names)
    for name, (at, values) in entries.items():
        pattern = state.patterns[name]
        assert len(at) == counts[name]
        assert (np.diff(at) > 0).all()
        assert not np.isin(at, pattern.positions()).any()
        assert np.allclose(values, gradients[name][at], rtol=1e-3, atol=1e-6)
        pruned = np.setdiff1d(np.arange(pattern.num_weights), pattern.positions())
        best = np.sort(np.abs(gradients[name][pruned]))[-counts[name] :]
        assert np.allclose(np.sort(np.abs(values)), best, rtol=1e-3, atol=1e-6)


def question(state: SparseState, counts: dict[str, int], **fields: Any) -> Request:
    order = list(state.patterns or ())
    grow = [[order.index(name), most] for name, most in counts.items()]
    return Request("train", 3, {"grow": grow, **fields}, states={MODEL: state})


def test_growth_comes_before_the_same_training(setup: Setup) -> None:
    local, state = place(setup), beginning(setup)
    name = list(state.patterns or ())[-1]
    asked = question(state, {name: 5}, growth_batches=2)
    asked = dataclasses.replace(asked, report_resources=True)
    reply = train_and_grow(asked, local)
    entries, held = summed_growth(state, {name: 5}, local, batches=2, round_index=3)
    alone = train(Request("train", 3, states={MODEL: state}, report_resources=True), local)
    assert reply.fields == alone.fields
    for key, values in alone.states[MODEL].values.items():
        assert np.array_equal(reply.states[MODEL].values[key], values)
    for found, again in zip(reply.entries[MODEL][name], entries[name], strict=True):
        assert np.array_equal(found, again)
    assert reply.resources is not None
    assert reply.resources.state_bytes >= held
    with pytest.raises(ClientError, match="growth_batches"):
        train_and_grow(question(state, {name: 5}, growth_batches=-1), local)


def test_without_batches_it_is_the_faithful_answer(setup: Setup) -> None:
    local, state = place(setup), beginning(setup)
    asked = question(state, {list(state.patterns or ())[-1]: 5})
    plain, plus = train(asked, local), train_and_grow(asked, local)
    for (at, values), (at_too, values_too) in zip(
        plain.entries[MODEL].values(), plus.entries[MODEL].values(), strict=True
    ):
        assert np.array_equal(at, at_too)
        assert np.array_equal(values, values_too)


def test_fresh_growth_is_asked_of_the_model_that_the_round_made(setup: Setup) -> None:
    """By hand: the weighted mean of what each client finds there, grown there and then."""
    method = plus(
        density=0.2, growth_at="fresh", growth_batches=2, adjust_every=3, granularity="entire"
    )
    blocks = setup.blocks["entire"]
    memory = {"blocks": blocks, "adjustments": 0, "until": 9, "clients": 4}
    before = RunState(2, beginning(setup), memory)
    assert not method.request(before).fields
    after = method.update(before, Pooled([0, 1], 1, states={MODEL: before.model}))
    assert after.model.patterns == before.model.patterns
    counts = dataclasses.replace(method, growth_at="after").growth_counts(before)
    assert len(counts) > 5
    asked = []

    def ask(request: Request, *, among: Any) -> Any:
        asked.append(request)
        assert list(among) == [0, 1, 2, 3]
        for client in (1, 0):
            yield client, grow(request, place(setup, client))

    settled = method.settle(after, ask)
    (request,) = asked
    assert request.round_index == 3
    assert request.states[MODEL] is after.model
    found = []
    for client in (0, 1):
        local = place(setup, client)
        entries, _ = summed_growth(after.model, counts, local, batches=2, round_index=3)
        found.append((len(local.data.train), entries))
    assert after.model.patterns is not None
    assert settled.model.patterns is not None
    assert settled.memory["adjustments"] == 1
    for name, pattern in after.model.patterns.items():
        mean = np.zeros(pattern.num_weights)
        for weight, entries in found:
            at, values = entries.get(name, (np.array([], int), np.float32([])))
            mean[at] += weight * values.astype(np.float64)
        grown = np.setdiff1d(settled.model.patterns[name].positions(), pattern.positions())
        best = np.argsort(-np.abs(mean), kind="stable")[: counts.get(name, 0)]
        assert np.array_equal(grown, np.sort(best))
    # In other rounds nobody is asked.
    later = method.settle(dataclasses.replace(settled, round_index=4), ask)
    assert later.model is settled.model
    assert len(asked) == 1


def test_fresh_growth_needs_single_answers_and_one_message_more(tmp_path: Path) -> None:
    fresh: dict[str, Any] = {"method__name": "fedtiny-plus", "method__growth_at": "fresh"}
    with pytest.raises(ConfigError, match="needs to see single clients' answers"):
        tiny(**fresh, privacy__secure_aggregation=True)
    config = tiny(**fresh, method__protect=1, method__adjust_until=3)
    runs = [run_inline(config, tmp_path / name) for name in ("first", "second")]
    assert digest(runs[0]) == digest(runs[1])
    lines = [line for line in read_metrics(runs[0]) if "round" in line]
    assert [bool(line["adjusted"]) for line in lines] == [True, True, False, False]
    assert lines[0]["bytes_up"] > lines[-2]["bytes_up"]
    assert lines[0]["bytes_down"] > 1.5 * lines[-1]["bytes_down"]
    assert len({line["density"] for line in lines}) == 1


def test_the_question_says_over_how_many_batches() -> None:
    asked = plus(growth_at="merged", growth_batches=3, adjust_every=1).request(one_layer())
    assert asked.fields == {"grow": [[0, 2]], "growth_batches": 3}
    assert plus(adjust_every=1).request(one_layer()).fields == {"grow": [[0, 2]]}
    later = dataclasses.replace(one_layer(), round_index=99)
    assert not plus(growth_at="merged", adjust_every=1).request(later).fields


def test_random_growth_is_drawn_by_the_server_and_nobody_is_asked() -> None:
    """Two of the twelve pruned places, each as likely; the two smallest weights make room."""
    method, state = plus(growth_at="drawn", adjust_every=1), one_layer()
    counts = np.zeros(20, int)
    for seed in range(300):
        drawn = dataclasses.replace(state, memory={**state.memory, "seed": seed})
        request = method.request(drawn)
        assert not request.fields
        assert not request.expected.growth
        pooled = Pooled([0], 1, states={MODEL: state.model})
        after = method.update(drawn, pooled)
        assert after.memory["adjustments"] == 1
        assert active(method.update(drawn, pooled)) == active(after)
        assert set(active(state)) - set(active(after)) == {1, 8}  # of values 1 and 3
        grown = np.setdiff1d(active(after), active(state))
        assert len(grown) == 2
        assert after.model.values["w"][np.isin(active(after), grown)].tolist() == [0, 0]
        counts[grown] += 1
    assert counts[active(state)].sum() == 0
    others = np.setdiff1d(np.arange(20), active(state))
    assert (np.abs(counts[others] - 50) < 30).all()  # 50 expected, a deviation of about 6.5


def test_random_growth_runs_for_fewer_bytes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method__name": "fedtiny-plus", "method__adjust_until": 3}
    drawn = tiny(**settings, method__growth_at="drawn", method__protect=1)
    runs = [run_inline(drawn, tmp_path / name) for name in ("first", "second")]
    assert digest(runs[0]) == digest(runs[1])
    asked = run_inline(tiny(**settings, method__growth_at="merged"), tmp_path / "asked")
    lines, others = (
        [line for line in read_metrics(run) if "round" in line] for run in (runs[0], asked)
    )
    assert [bool(line["adjusted"]) for line in lines] == [True, True, False, False]
    assert len({line["density"] for line in lines}) == 1
    assert lines[0]["bytes_up"] < others[0]["bytes_up"]


# --- what may be pruned ------------------------------------------------------------------------


def one_layer(until: int = 100) -> RunState:
    """Four outputs of five inputs; outputs 0 and 1 have four weights each, the others none."""
    at = np.array([0, 1, 2, 3, 5, 6, 7, 8])
    patterns = Patterns({"w": Pattern.from_positions((4, 5), at)})
    model = SparseState({"w": np.float32([9, 1, 8, 7, 6, 5, 4, 3])}, patterns)
    return RunState(0, model, {"blocks": [["w"]], "adjustments": 0, "until": until})


def adjusted(method: FedTiny, state: RunState, growth: list[int]) -> RunState:
    counts = method.growth_counts(state)
    assert counts == {"w": 2}
    entries = {"w": (np.array(growth), np.float32([5, 6]))}
    return method.update(state, Pooled([0], 1, states={MODEL: state.model}, growth=entries))


def active(state: RunState) -> list[int]:
    pattern = state.model.pattern("w")
    assert pattern is not None
    return [int(at) for at in pattern.positions()]


def test_kept_outputs_by_hand() -> None:
    """Output 1 holds two weights, the smallest of all, and two are to go: one of them stays."""
    patterns = Patterns({"w": Pattern.from_positions((4, 5), np.array([0, 1, 2, 3, 4, 5, 6, 10]))})
    values = {"w": np.float32([9, 8, 7, 6, 5, -2, 1, 0.5])}
    state = RunState(
        0, SparseState(values, patterns), {"blocks": [["w"]], "adjustments": 0, "until": 100}
    )
    plain = adjusted(plus(adjust_every=1), state, [15, 16])
    assert active(plain) == [0, 1, 2, 3, 4, 5, 15, 16]  # output 2 has fallen silent
    kept = adjusted(plus(adjust_every=1, keep_outputs=True), state, [15, 16])
    assert active(kept) == [0, 1, 2, 3, 5, 10, 15, 16]


def test_fewer_move_where_fewer_may_go() -> None:
    """Every output keeps its only weight, so nothing can be pruned, and nothing is grown."""
    patterns = Patterns({"w": Pattern.from_positions((8, 5), np.arange(0, 40, 5))})
    state = RunState(
        0,
        SparseState({"w": np.arange(8, dtype=np.float32)}, patterns),
        {"blocks": [["w"]], "adjustments": 0, "until": 100},
    )
    after = adjusted(plus(adjust_every=1, keep_outputs=True), state, [1, 2])
    assert after.model.patterns == patterns
    assert after.memory["adjustments"] == 1


def test_the_largest_of_rows_is_the_earlier_of_equals() -> None:
    pattern = Pattern.from_positions((4, 3), np.array([0, 1, 2, 6, 7, 9]))
    chosen = largest_of_rows(pattern, np.float32([1, -3, 3, 0, 0, -1]))
    assert chosen.tolist() == [False, True, False, True, False, True]
    assert (
        largest_of_rows(Pattern.from_positions((2, 3), np.array([], int)), np.float32([])).size == 0
    )


@pytest.mark.parametrize(("protect", "stay"), [(0, 0), (1, 2), (2, 2)])
def test_grown_weights_are_protected_for_some_rounds(protect: int, stay: int) -> None:
    """Weights that round 1 grew are zero after it: round 2 would prune them at once."""
    method = plus(adjust_every=1, protect=protect)
    first = adjusted(method, one_layer(), [10, 15])
    second = adjusted(method, first, [16, 17])
    assert len({10, 15} & set(active(second))) == stay
    third = adjusted(method, second, [11, 12])
    assert len({10, 15} & set(active(third))) == (2 if protect == 2 else 0)
    fourth = adjusted(method, third, [13, 14])
    assert not {10, 15} & set(active(fourth))
    for state in (first, second, third, fourth):
        assert len(active(state)) == 8
        assert all(
            state.round_index - since < protect for since, _ in state.memory.get("grown", [])
        )


def test_adjustments_begin_late_at_the_full_rate() -> None:
    """From round 4 on, α/2 (1 + cos(π (r − 4) / (10 − 4))) · 8 with α = .6: at round 5 4.47."""
    method = plus(adjust_every=1, adjust_rate=0.6, adjust_from=4)
    counts = [
        method.growth_counts(dataclasses.replace(one_layer(until=10), round_index=index)).get(
            "w", 0
        )
        for index in range(10)
    ]
    assert counts == [0, 0, 0, 0, 4, 3, 2, 1, 0, 0]


def test_the_account_counts_both_passes_over_the_batches(setup: Setup) -> None:
    """Growth over B samples: 2F + 2G for the gradients, and 3F for the exact sums, besides
    training's 3F a sample; F the forward pass at the mask, G that of the block's whole layers."""
    state = beginning(setup)
    name = list(state.patterns or ())[-1]
    forward = forward_flops(setup.layer_macs, state)
    block = 2 * setup.layer_macs[name]
    trained = 3 * forward * (40 + 9)
    for fields, samples, again in (
        ({}, 16 + 9, 0),
        ({"growth_batches": 2}, 32 + 9, 3),
        ({"growth_batches": 0}, 40 + 9, 3),
    ):
        totals = Totals()
        totals.count_training(setup, question(state, {name: 5}, **fields), state, {0: 40, 1: 9})
        once = (2 + again) * forward + block
        assert totals.train_flops == trained + once * samples
