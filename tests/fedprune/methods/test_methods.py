"""The methods as pure functions: FedTiny's three parts, the rivals, and known mistakes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedprune.config import RunConfig, own_settings
from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.messages import MODEL, Expected, Reply, Request
from fedprune.exchange.pooled import Pooled, Pooler
from fedprune.exchange.pooled import pooled as add_up
from fedprune.exchange.robust import MEAN, Aggregation
from fedprune.local.data import Split
from fedprune.local.model import Network, open_model
from fedprune.local.site import Local, open_data
from fedprune.methods import METHODS, method_class
from fedprune.methods.base import Method, RunState, Start
from fedprune.methods.fedtiny import FedTiny
from fedprune.methods.fedtiny.pool import (
    POOL,
    Pool,
    candidate_counts,
    candidate_pool,
    pool_request,
    received_pool,
)
from fedprune.methods.fedtiny.progressive import adjust, is_adjustment_round
from fedprune.methods.fedtiny.selection import measure, score, select_candidate
from fedprune.rounds.setup import NETWORK, Setup
from fedprune.rounds.workspace import Workspace, open_workspace
from fedprune.settings import TrainingConfig
from prunelab.data.samples import stored
from prunelab.data.tensors import prepare
from prunelab.errors import RunError
from prunelab.networks import GRANULARITIES, float_state, parameter_blocks
from sparsemodel.errors import PlanError
from sparsemodel.masks.mask import Mask, mask_from_scores, prunable_parameters
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import Entries, SparseState

SMALL = {
    "data.num_train": 400,
    "data.num_test": 100,
    "data.clients": 4,
    "model.width": 4,
    "training.rounds": 40,
    "method.density": 0.2,
    "method.adjust_every": 2,
    "method.adjust_until": 30,
    "method.prune_until": 2,
}


def small(**changes: object) -> RunConfig:
    values = {**SMALL, **{k.replace("__", "."): v for k, v in changes.items()}}
    return RunConfig.parse(own_settings(values))


def fedtiny(config: RunConfig) -> FedTiny:
    assert isinstance(config.method, FedTiny)
    return config.method


def nobody(request: Request) -> Iterator[tuple[int, Reply]]:
    """No client answers."""
    yield from ()


def pooling(ask: Any, rule: Aggregation = MEAN) -> Pooler:
    """Answers added up, or made one by another rule."""
    return lambda request: add_up(ask(request), request.expected, aggregation=rule)


def beginning(work: Workspace, ask: Any = nobody) -> Start:
    """What a method's server half has to begin with, without pre-training."""
    config, model = work.config, work.model()
    values = float_state(model)
    state = SparseState({name: values[name].numpy() for name in work.shapes})
    blocks = {kind: parameter_blocks(model, granularity=kind) for kind in GRANULARITIES}
    return Start(
        lambda: state, shapes_of(model), blocks, ask, config.training.rounds, config.seed,
        num_clients=config.data.clients, program=program_of(model, work.torch.input_shape),
    )  # fmt: skip


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the parameters that may be pruned."""
    return {name: tuple(p.shape) for name, p in prunable_parameters(model).items()}


def state_under(work: Workspace, counts: dict[str, int]) -> SparseState:
    """The model's largest weights."""
    return candidate_pool(beginning(work).state(), [counts]).candidate(0)


def answered(model: SparseState, growth: Entries | None = None) -> Pooled:
    """What the clients of a round are made."""
    return Pooled([0], 1, states={MODEL: model}, growth=growth or {})


def fedtiny_state(config: RunConfig) -> tuple[FedTiny, RunState]:
    """As after candidate selection, without asking anybody."""
    work, method = open_workspace(config), fedtiny(config)
    model = work.model()
    (counts,) = candidate_counts(shapes_of(model), method.density, num_candidates=1, seed=0)
    memory = {
        "blocks": parameter_blocks(model, granularity=method.granularity),
        "adjustments": 0,
        "until": method.adjust_until,
    }
    return method, RunState(0, state_under(work, counts), memory)


def pruned(pattern: Pattern) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Flat positions of the weights that do not exist."""
    return np.setdiff1d(np.arange(pattern.num_weights), pattern.positions())


# --- the pool ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "size"), [(0.1, 1), (0.05, 2), (0.01, 10), (0.001, 10)])
def test_pool_size_rule(density: float, size: int) -> None:
    """C = max(1, round(0.1 / d)), at most pool_limit = 10."""
    assert FedTiny(density=density).num_candidates == size


def test_pool_size_can_be_set() -> None:
    assert FedTiny(density=0.01, pool_limit=4).num_candidates == 4
    assert FedTiny(density=0.01, pool_limit=4, pool_size=12).num_candidates == 12


def test_pool_candidates_differ_and_meet_the_density() -> None:
    work = open_workspace(small())
    model = work.model()
    dense = beginning(work).state()
    counts = candidate_counts(shapes_of(model), 0.2, num_candidates=4, seed=3)
    pool = candidate_pool(dense, counts)
    candidates = [pool.candidate(number) for number in range(4)]
    masks = [state.patterns for state in candidates]
    assert len({mask.digest() for mask in masks if mask is not None}) == 4
    for state, mask in zip(candidates, masks, strict=True):
        assert mask is not None
        assert mask.density == pytest.approx(0.2, rel=0.02)
        assert set(mask) == set(prunable_parameters(model))
        for name, pattern in mask.items():
            weight = np.abs(dense.values[name].reshape(-1))
            at = pattern.positions()
            assert weight[at].min() >= weight[pruned(pattern)].max()
            assert np.array_equal(state.values[name], dense.values[name].reshape(-1)[at])
    longer = candidate_counts(shapes_of(model), 0.2, num_candidates=6, seed=3)
    assert longer[:4] == counts


def test_pool_gives_exactly_the_masks_of_the_scores() -> None:
    """From the union and counts alone, with many equal magnitudes, which go to the earlier."""
    work = open_workspace(small())
    model = work.model()
    dense = beginning(work).state()
    prunable = prunable_parameters(model)
    coarse = dense.replace({n: np.round(dense.values[n] * 8) / 8 for n in prunable})  # of eighths
    scores = {n: torch.from_numpy(np.abs(coarse.values[n])) for n in prunable}
    assert all(len(score.unique()) < score.numel() / 2 for score in scores.values())
    counts = candidate_counts(shapes_of(model), 0.2, num_candidates=5, seed=3)
    pool = candidate_pool(coarse, counts)
    assert pool.union.patterns is not None
    largest = {n: max(each[n] for each in counts) for n in prunable}
    assert pool.union.patterns.counts() == largest
    for number, each in enumerate(counts):
        assert pool.candidate(number).patterns == mask_from_scores(scores, each).csr()
    received = received_pool(pool_request(pool, "measure"))
    assert received.counts == pool.counts


@pytest.mark.parametrize(
    "counts",
    [
        None,
        [],
        "all",
        {"0": [1]},
        [3],
        [[]],
        [[1]],
        [[1, 1, 1]],
        [[1, -1]],
        [[1, 7]],
        [[10**30, 1]],
        [[1.0, 1]],
        [["1", 1]],
        [[True, 1]],
        [[1, 1], [1]],
        [[[1], 1]],
    ],
)
def test_hostile_counts_of_a_pool_are_refused(counts: Any) -> None:
    """Two layers, of which the pool holds 5 and 6 weights."""
    patterns = Patterns(
        {
            name: Pattern.from_positions((4, 5), np.arange(count))
            for name, count in (("a", 5), ("b", 6))
        }
    )
    union = SparseState({"a": np.ones(5, np.float32), "b": np.ones(6, np.float32)}, patterns)
    good = Request("measure", fields={"counts": [[1, 6], [5, 0]]}, states={POOL: union})
    assert received_pool(good).counts == [{"a": 1, "b": 6}, {"a": 5, "b": 0}]
    with pytest.raises(ClientError):
        received_pool(Request("measure", fields={"counts": counts}, states={POOL: union}))


def test_a_pool_is_a_state_under_patterns() -> None:
    whole = SparseState({"a": np.ones((4, 5), np.float32)})
    with pytest.raises(ClientError, match="without candidates"):
        received_pool(Request("measure", fields={"counts": [[1]]}, states={POOL: whole}))
    with pytest.raises(ClientError, match="came without its 'pool'"):
        received_pool(Request("measure", fields={"counts": [[1]]}, states={MODEL: whole}))


# --- batch-norm selection ----------------------------------------------------------------------


class OneNorm(nn.Module):
    """A single batch norm on the prepared image, so that its input is known exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.norm(x).flatten(1))
        return out


def network_of(model: nn.Module) -> Network:
    """The network as clients take it."""
    shapes = {name: tuple(value.shape) for name, value in float_state(model).items()}
    try:
        return Network(program_of(model, (1, 8, 8)), type(model), shapes)
    except PlanError:
        return Network(None, type(model), shapes)


@pytest.mark.parametrize("sparse", [False, True])
def test_pooled_statistics_are_those_of_the_union(sparse: bool) -> None:
    """Clients of 3, 40 and 300 images (300: more than one batch) against all 343 at once."""
    images = stored(open_workspace(small()).dataset.train)[0][:343]
    plain = OneNorm()
    state = SparseState({name: value.numpy() for name, value in float_state(plain).items()})
    if sparse:
        state = candidate_pool(state, [{"fc.weight": 100}]).union
    model = open_model(network_of(plain), state, TrainingConfig())
    parts = [images[:3], images[3:43], images[43:]]
    replies = [Reply(len(part), tensors={"0": model.statistics(part)}) for part in parts]
    pooled = add_up(enumerate(replies), Expected()).tensors["0"]
    union = prepare(torch.from_numpy(images)).double()
    assert pooled["norm.running_mean"].item() == pytest.approx(union.mean().item(), abs=1e-5)
    variance = union.var(unbiased=False).item()
    assert pooled["norm.running_var"].item() == pytest.approx(variance, abs=1e-5)
    last_client_only = model.statistics(parts[-1])["norm.running_mean"].item()
    assert abs(last_client_only - pooled["norm.running_mean"].item()) > 1e-3
    unweighted = sum(r.tensors["0"]["norm.running_mean"].item() for r in replies) / 3
    assert abs(unweighted - pooled["norm.running_mean"].item()) > 1e-3


@pytest.mark.parametrize("execution", ["sparse", "masked", "dense"])
def test_measuring_leaves_the_model_as_it_was(execution: str, tmp_path: Path) -> None:
    work = open_workspace(small(training__execution=execution))
    counts = candidate_counts(shapes_of(work.model()), 0.2, num_candidates=1, seed=0)[0]
    state = state_under(work, counts)
    place = clients(work, tmp_path)[0]
    model = place.open(state)
    statistics = model.statistics(place.data.dev.inputs)
    norms = {name for name in work.shapes if ".running_" in name}
    assert set(statistics) == norms
    assert all(np.array_equal(state.values[n], v) for n, v in model.state().values.items())
    if execution != "sparse":
        modules = list(model._module.modules())  # type: ignore[attr-defined]
        assert all(m.momentum == 0.1 for m in modules if isinstance(m, nn.BatchNorm2d))
        assert not any(m._forward_pre_hooks for m in modules)


def laid_out(work: Workspace, folder: Path) -> Setup:
    """What a run starts from, in a folder."""
    if not (folder / NETWORK).exists():
        work.lay_out(folder, with_start=False)
    return Setup(work.config, folder)


def clients(work: Workspace, folder: Path) -> list[Local]:
    """Every client's place in this process."""
    config, network = work.config, laid_out(work, folder).network
    return [
        Local(n, open_data(config, n, setup=str(folder)), config, network)
        for n in range(config.data.clients)
    ]


def local_ask(work: Workspace, folder: Path) -> tuple[list[str], Any]:
    """Clients that answer in this process, and a record of what they were asked."""
    asked: list[str] = []

    def ask(request: Request) -> Iterator[tuple[int, Reply]]:
        asked.append(request.action)
        for place in clients(work, folder)[: request.num_clients or None]:
            reply = work.method.actions[request.action](request, place)
            request.check(reply)
            yield place.client, reply

    return asked, ask


def test_selection_takes_the_smallest_weighted_loss_and_its_statistics(tmp_path: Path) -> None:
    work = open_workspace(small())
    counts = candidate_counts(shapes_of(work.model()), 0.2, num_candidates=3, seed=1)
    pool = candidate_pool(beginning(work).state(), counts)
    asked, ask = local_ask(work, tmp_path)
    winner, statistics, account = select_candidate(
        pool, pooling(ask), adaptive=True, metric="accuracy"
    )
    assert asked == ["measure", "score"]
    assert account["losses"][winner] == min(account["losses"])
    # Only running statistics are aggregated: scale and shift (γ, β) stay the server's.
    assert set(statistics) == {name for name in work.shapes if ".running_" in name}
    # The weighted loss by hand, by torch, with the winner's mask and statistics.
    dense = replaced(work, place_config(work, "dense"))
    total, hits, samples = 0.0, 0, 0
    for place in clients(dense, tmp_path / "dense"):
        model = place.open(pool.candidate(winner).replace(statistics))
        loss, correct = model.evaluate(place.data.dev.inputs, place.data.dev.targets)
        total, hits, samples = total + loss, hits + correct, samples + len(place.data.dev)
    assert account["losses"][winner] == pytest.approx(total / samples, rel=1e-5)
    assert account["metrics"][winner] == pytest.approx(hits / samples)
    weights = {name: math.prod(work.shapes[name]) for name in counts[0]}
    assert account["densities"][1] == {n: counts[1][n] / weights[n] for n in weights}


def place_config(work: Workspace, execution: str) -> RunConfig:
    training = replace(work.config.training, execution=execution)
    return replace(work.config, training=training)


def replaced(work: Workspace, config: RunConfig) -> Workspace:
    return replace(work, config=config)


def test_the_winner_becomes_the_model_with_its_statistics(tmp_path: Path) -> None:
    work = open_workspace(small(method__pool_size=3))
    _, ask = local_ask(work, tmp_path)
    server = beginning(work, ask)
    state = work.method.start(server)
    selection = state.notes["selection"]
    assert selection["adaptive"]
    assert selection["clients"] == [0, 1, 2, 3]
    counts = candidate_counts(server.prunable, 0.2, num_candidates=3, seed=server.seed)
    pool = candidate_pool(server.state(), counts)
    expected = pool.candidate(selection["winner"])
    assert state.model.patterns == expected.patterns
    for name, value in expected.values.items():
        same = np.array_equal(state.model.values[name], value)
        assert same == (".running_" not in name)


@pytest.mark.parametrize("kind", ["median", "multi-krum"])
def test_a_liar_does_not_choose_the_candidate(kind: str, tmp_path: Path) -> None:
    """One of four with statistics and losses that the gate lets through."""
    work = open_workspace(small())
    counts = candidate_counts(shapes_of(work.model()), 0.2, num_candidates=3, seed=1)
    pool = candidate_pool(beginning(work).state(), counts)
    _, honest = local_ask(work, tmp_path)

    def ask(request: Request) -> Iterator[tuple[int, Reply]]:
        for client, reply in honest(request):
            if client:
                yield client, reply
            elif request.action == "score":
                worst = [1e9 if c == wanted else 0.0 for c in range(3)]
                yield client, replace(reply, fields={**reply.fields, "losses": worst})
            else:
                tensors = {
                    number: {
                        name: np.full_like(v, 900.0 if name.endswith("mean") else 1e5)
                        for name, v in each.items()
                    }
                    for number, each in reply.tensors.items()
                }
                yield client, replace(reply, tensors=tensors)

    rule = Aggregation(kind, byzantine=0.25)
    options = {"adaptive": True, "metric": "accuracy"}
    wanted, _, _ = select_candidate(pool, pooling(honest, rule), **options)
    winner, statistics, account = select_candidate(pool, pooling(ask, rule), **options)
    assert account["losses"][winner] < 20
    assert all(np.abs(value).max() < 50 for value in statistics.values())
    misled, ruined, _ = select_candidate(pool, pooling(ask), **options)
    assert misled != wanted
    assert max(value.max() for value in ruined.values()) > 1e4


def test_vanilla_selection_does_not_adapt(tmp_path: Path) -> None:
    work = open_workspace(small())
    counts = candidate_counts(shapes_of(work.model()), 0.2, num_candidates=2, seed=1)
    pool = candidate_pool(beginning(work).state(), counts)
    asked, ask = local_ask(work, tmp_path)
    _, statistics, account = select_candidate(pool, pooling(ask), adaptive=False, metric="accuracy")
    assert asked == ["score"]
    assert not account["adaptive"]
    assert all(np.array_equal(v, pool.union.values[name]) for name, v in statistics.items())


def test_clients_measure_and_score_on_their_development_split(tmp_path: Path) -> None:
    """The same answers whatever they have to train on; none without a development sample."""
    work = open_workspace(small())
    counts = candidate_counts(shapes_of(work.model()), 0.2, num_candidates=2, seed=1)
    pool = candidate_pool(beginning(work).state(), counts)
    place = clients(work, tmp_path)[0]
    data = place.data
    train = Split(data.train.inputs[::-1][:5], data.train.targets[:5])
    other = replace(data, train=train)
    empty = replace(data, dev=Split(data.dev.inputs[:0], data.dev.targets[:0]))
    request = pool_request(pool, "measure")
    reply = measure(request, place)
    again = measure(request, replace(place, data=other))
    assert reply.num_examples == len(data.dev)
    for number, tensors in reply.tensors.items():
        assert all(np.array_equal(v, again.tensors[number][n]) for n, v in tensors.items())
    scoring = pool_request(pool, "score", tensors=reply.tensors)
    found = score(scoring, place)
    assert found.fields == score(scoring, replace(place, data=other)).fields
    assert all(0 <= hits <= found.num_examples for hits in found.fields["metrics"])
    for question, action in ((request, measure), (scoring, score)):
        with pytest.raises(ClientError, match="no development sample"):
            action(question, replace(place, data=empty))
    with pytest.raises(ClientError, match="every candidate"):
        score(pool_request(pool, "score", tensors={"0": reply.tensors["0"]}), place)


def test_selection_without_an_answer_is_an_error() -> None:
    work = open_workspace(small())
    counts = candidate_counts(shapes_of(work.model()), 0.2, num_candidates=2, seed=1)
    pool = Pool(candidate_pool(beginning(work).state(), counts).union, counts)
    with pytest.raises(RunError, match="no client could measure"):
        select_candidate(pool, pooling(nobody), adaptive=True, metric="accuracy")
    with pytest.raises(RunError, match="no client could evaluate"):
        select_candidate(pool, pooling(nobody), adaptive=False, metric="accuracy")


# --- progressive pruning -----------------------------------------------------------------------


def at_round(state: RunState, round_index: int, **memory: object) -> RunState:
    return replace(
        state, round_index=round_index, memory={**state.memory, **memory}
    )  # fmt: skip


def test_every_block_has_its_turn_from_output_to_input() -> None:
    """ΔR = 2 and three blocks: 3, 2, 1, 3, ... A pointer of round % 3 would differ, and with
    an even number of blocks would never visit half of them."""
    config = small()
    method, state = fedtiny_state(config)
    blocks = state.memory["blocks"]
    assert len(blocks) == 3
    visited = []
    for _ in range(config.training.rounds):
        counts = method.growth_counts(state)
        if counts:
            visited.append(next(i for i, b in enumerate(blocks) if set(counts) <= set(b)))
        assert state.model.patterns is not None
        free = {name: pruned(state.model.patterns[name])[:k] for name, k in counts.items()}
        growth = {name: (at, np.ones(len(at), np.float32)) for name, at in free.items()}
        state = method.update(state, answered(state.model, growth))
    # Rounds 2, 4, ..., 28; in the last ones a_l may fall to zero for the smallest block.
    assert visited[:9] == [2, 1, 0, 2, 1, 0, 2, 1, 0]
    assert set(visited) == {0, 1, 2}


def test_even_number_of_blocks_all_visited() -> None:
    config = small(model__name="resnet18", model__width=0)
    method, model = fedtiny(config), open_workspace(config).torch.skeleton
    blocks = parameter_blocks(model, granularity="block")
    assert len(blocks) == 4
    generator = np.random.default_rng(0)
    patterns, values = {}, {}
    for name, parameter in prunable_parameters(model).items():
        at = np.flatnonzero(generator.random(parameter.numel()) < 0.01)
        patterns[name] = Pattern.from_positions(tuple(parameter.shape), at)
        values[name] = np.ones(len(at), np.float32)
    state = SparseState(values, Patterns(patterns))
    seen = set()
    for adjustment in range(4):
        memory = {"blocks": blocks, "adjustments": adjustment, "until": method.adjust_until}
        counts = method.growth_counts(RunState(2 * adjustment + 1, state, memory))
        seen |= {i for i, block in enumerate(blocks) if set(counts) <= set(block)}
    assert seen == {0, 1, 2, 3}


def test_adjustment_counts_follow_the_cosine() -> None:
    """a_l = floor(0.15 (1 + cos(π r / 30)) nnz_l): nearly 0.3 nnz at r = 2, nearly 0 at r = 28."""
    method, state = fedtiny_state(small())
    patterns = state.model.patterns
    assert patterns is not None
    for round_number in (2, 8, 14, 28):
        counts = method.growth_counts(at_round(state, round_number - 1))
        for name in state.memory["blocks"][-1]:
            rate = 0.15 * (1 + math.cos(math.pi * round_number / 30))
            expected = math.floor(rate * patterns[name].num_active)
            room = patterns[name].num_weights - patterns[name].num_active
            assert counts.get(name, 0) == min(expected, room)
    assert not method.growth_counts(at_round(state, 29))
    assert not method.growth_counts(at_round(state, 35))


def test_no_adjustment_outside_its_rounds() -> None:
    rounds = [r for r in range(1, 41) if is_adjustment_round(r, every=2, until=30)]
    assert rounds == list(range(2, 30, 2))


def test_adjustments_end_at_three_fifths_of_the_rounds_by_default(tmp_path: Path) -> None:
    work = open_workspace(small(method__adjust_until=0, method__pool_size=1))
    state = work.method.start(beginning(work, local_ask(work, tmp_path)[1]))
    assert state.memory["until"] == 24


def test_fixed_masks_ask_for_no_growth() -> None:
    _, state = fedtiny_state(small())
    fixed = small(method__name="fedtiny-fixed").method
    for round_index in range(40):
        assert not fixed.request(at_round(state, round_index)).fields


def test_the_request_names_layers_by_their_place() -> None:
    method, state = fedtiny_state(small())
    state = at_round(state, 1)
    counts = method.growth_counts(state)
    order = list(state.model.patterns or ())
    request = method.request(state)
    assert {order[place]: count for place, count in request.fields["grow"]} == counts
    assert request.round_index == 1
    assert request.states[MODEL] is state.model


def test_adjustment_keeps_density_and_starts_grown_weights_at_zero() -> None:
    method, start = fedtiny_state(small())
    state = at_round(start, 1)
    before = state.model.patterns
    assert before is not None
    counts = method.growth_counts(state)
    growth = {
        name: (pruned(before[name])[-k:], np.linspace(1, 2, k, dtype=np.float32))
        for name, k in counts.items()
    }
    after = method.update(state, answered(state.model, growth))
    patterns = after.model.patterns
    assert patterns is not None
    assert patterns.counts() == before.counts()
    for name, count in counts.items():
        grown = np.setdiff1d(patterns[name].positions(), before[name].positions())
        assert len(grown) == count
        assert np.array_equal(grown, growth[name][0])
        assert not after.model.dense_layer(name).reshape(-1)[grown].any()
        # The smallest weights went, and the others are as they were.
        gone = np.setdiff1d(before[name].positions(), patterns[name].positions())
        old = state.model.dense_layer(name).reshape(-1)
        kept = np.intersect1d(before[name].positions(), patterns[name].positions())
        assert abs(old[gone]).max() <= abs(old[kept]).min()
        assert np.array_equal(after.model.dense_layer(name).reshape(-1)[kept], old[kept])
    for name in set(before) - set(counts):
        assert patterns[name] == before[name]


def test_a_round_without_growth_entries_changes_no_mask() -> None:
    method, start = fedtiny_state(small())
    state = at_round(start, 1)
    after = method.update(state, answered(state.model))
    assert after.model.patterns == state.model.patterns
    assert after.memory["adjustments"] == 1


def test_growth_that_nobody_asked_for_is_left_out() -> None:
    method, start = fedtiny_state(small())
    state = at_round(start, 1)
    counts, patterns = method.growth_counts(state), state.model.patterns
    assert patterns is not None
    odd = next(name for name in patterns if name not in counts)
    growth = {odd: (pruned(patterns[odd])[:1], np.ones(1, np.float32))}
    assert adjust(state.model, growth, counts).patterns == patterns


# --- every method ------------------------------------------------------------------------------


def test_all_methods_use_one_network_class_and_the_same_start() -> None:
    states = {}
    for name in METHODS:
        model = open_workspace(small(method__name=name, model__width=16)).model()
        states[name] = (type(model), float_state(model))
    kind, reference = states["fedavg"]
    for name, (other, state) in states.items():
        assert other is kind
        if name != "small-dense":
            assert all(torch.equal(state[key], value) for key, value in reference.items())


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5])
def test_small_dense_is_as_large_as_the_sparse_model_allows(density: float) -> None:
    config = small(method__name="small-dense", model__width=16, method__density=density)
    work = open_workspace(config)
    full = open_workspace(small(method__name="fedavg", model__width=16)).model()
    pruned = sum(p.numel() for p in prunable_parameters(full).values())
    kept = round(density * pruned)
    dense = sum(v.numel() for v in float_state(full).values())
    allowed = 4 * (dense - pruned + kept)
    size = 4 * sum(v.numel() for v in float_state(work.model()).values())
    assert 0.6 * allowed < size <= allowed


def test_magnitude_keeps_the_largest_weights_of_each_layer() -> None:
    work = open_workspace(small(method__name="magnitude"))
    server = beginning(work)
    scores = {n: p.detach().abs() for n, p in prunable_parameters(work.model()).items()}
    patterns = work.method.start(server).model.patterns
    assert patterns is not None
    assert patterns == mask_from_scores(scores, patterns.counts()).csr()
    assert patterns.density == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("name", list(METHODS))
def test_contract_of_every_method(name: str, tmp_path: Path) -> None:
    """start() asks what clients answer, a client half answers every request, update() counts
    rounds and keeps the state's names; patterns are those of prunable weights."""
    work = open_workspace(small(method__name=name, model__width=8))
    method = work.method
    asked, ask = local_ask(work, tmp_path)
    server = replace(beginning(work, ask), place=laid_out(work, tmp_path).place)
    state = method.start(server)
    assert set(asked) <= set(method.actions)
    assert list(state.model.values) == list(work.shapes)
    assert state.model.shapes() == work.shapes
    # What a checkpoint holds are JSON values.
    assert json.loads(json.dumps([state.memory, state.notes])) == [state.memory, state.notes]
    state = replace(state, round_index=1)  # one with growth, where there is any
    request = method.request(state)
    reply = method.actions[request.action](request, clients(work, tmp_path)[0])
    request.check(reply)
    collector = method.collector(state)
    if collector is None:
        pooled = Pooled(
            [0], 1, states=reply.states, growth=reply.entries.get(MODEL, {}), tensors=reply.tensors
        )
        if MODEL in request.expected.states:
            assert reply.states[MODEL].patterns == state.model.patterns
    else:
        collector.add(0, reply)
        pooled = collector.result()
    after = method.update(state, pooled)
    assert after.round_index == 2
    assert list(after.model.values) == list(state.model.values)
    assert after.model.shapes() == work.shapes
    if name == "fedpm":  # as many as the clients want
        assert set(after.model.patterns or ()) == set(server.prunable)
    elif method.target_density == 1 or name in {"small-dense", "lotteryfl"}:
        assert after.model.patterns is None
    else:
        assert after.model.patterns is not None
        assert isinstance(Mask.from_csr(after.model.patterns), Mask)
        assert set(after.model.patterns) == set(server.prunable)
        assert after.model.patterns.density == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("name", list(METHODS))
def test_settings_of_every_method_survive_the_trip(name: str) -> None:
    """Through Flower's run config and through a file's flat names the method is the same."""
    config = small(method__name=name)
    assert RunConfig.parse(config.flower()).method == config.method
    assert RunConfig.parse(config.flat()).method == config.method
    assert type(config.method) is METHODS[name]
    assert isinstance(config.method, Method)
    assert METHODS[name](**config.method.settings()) == config.method


def test_unknown_method_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="fedtiny, fedtiny-vanilla"):
        RunConfig.parse({"method.name": "fedtinny"})
    with pytest.raises(ConfigError, match="fedtiny, fedtiny-vanilla"):
        method_class("fedtinny")
