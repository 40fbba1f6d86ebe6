"""The methods as pure functions: FedTiny's three parts, the rivals, and known mistakes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from fedprune.methods.fedtiny.bn_selection import (
    measure_batch_norms,
    measure_candidates,
    pool_statistics,
    score_candidates,
    select_candidate,
)
from torch import nn

from fedprune.config import RunConfig
from fedprune.errors import ConfigError
from fedprune.exchange.messages import (
    MeasureReply,
    MeasureRequest,
    Pool,
    Reply,
    Request,
    ScoreRequest,
)
from fedprune.methods import METHODS, build_method
from fedprune.methods.base import RunState
from fedprune.methods.fedtiny import FedTiny
from fedprune.methods.fedtiny.pool import candidate_pool, pool_size
from fedprune.methods.fedtiny.progressive import is_adjustment_round
from fedprune.rounds.workspace import Workspace, open_workspace
from prunelab.data.tensors import prepare
from prunelab.errors import RunError
from prunelab.networks import batch_norm_pairs, float_state
from sparsemodel.masks.mask import Mask, mask_from_scores, prunable_parameters

SMALL = {
    "data.num_train": 400,
    "data.num_test": 100,
    "data.clients": 4,
    "model.width": 4,
    "training.rounds": 40,
    "method.density": 0.2,
    "method.adjust_every": 2,
    "method.adjust_until": 30,
}


def small(**changes: object) -> RunConfig:
    return RunConfig.parse({**SMALL, **{k.replace("__", "."): v for k, v in changes.items()}})


def fedtiny_state(config: RunConfig) -> tuple[FedTiny, RunState]:
    method = open_workspace(config).method
    assert isinstance(method, FedTiny)
    model = method.build_model()
    mask = candidate_pool(model, config.pruning, seed=0)[0]
    mask.apply(model)
    return method, RunState(round_index=0, weights=float_state(model), mask=mask)


# --- the pool ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "size"), [(0.1, 1), (0.05, 2), (0.01, 10), (0.001, 10)])
def test_pool_size_rule(density: float, size: int) -> None:
    """C = max(1, round(0.1 / d)), at most pool_limit = 10."""
    assert pool_size(RunConfig.parse({"method.density": density}).pruning) == size


def test_pool_candidates_differ_and_meet_the_density() -> None:
    config = small(method__pool_size=4)
    model = open_workspace(config).model()
    pool = candidate_pool(model, config.pruning, seed=3)
    assert len({mask.digest() for mask in pool}) == 4
    for mask in pool:
        assert mask.density == pytest.approx(0.2, rel=0.02)
        assert set(mask) == set(prunable_parameters(model))
        for name, pattern in mask.items():
            weight = dict(model.named_parameters())[name].detach().abs()
            assert weight[pattern].min() >= weight[~pattern].max()
    longer = candidate_pool(model, small(method__pool_size=6).pruning, seed=3)
    assert [mask.digest() for mask in longer[:4]] == [mask.digest() for mask in pool]


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


def test_pooled_statistics_are_those_of_the_union() -> None:
    """Clients of 3, 40 and 300 images (300: more than one batch) against all 343 at once."""
    images = open_workspace(small()).dataset.train_images[:343]
    model = OneNorm()
    parts = [images[:3], images[3:43], images[43:]]
    replies = [MeasureReply(len(part), [measure_batch_norms(model, part)]) for part in parts]
    pooled = pool_statistics(replies, batch_norm_pairs(model), 1)[0]
    union = prepare(images).double()
    assert pooled["norm.running_mean"].item() == pytest.approx(union.mean().item(), abs=1e-5)
    variance = union.var(unbiased=False).item()
    assert pooled["norm.running_var"].item() == pytest.approx(variance, abs=1e-5)
    last_client_only = measure_batch_norms(model, parts[-1])["norm.running_mean"].item()
    assert abs(last_client_only - pooled["norm.running_mean"].item()) > 1e-3
    unweighted = sum(r.statistics[0]["norm.running_mean"].item() for r in replies) / 3
    assert abs(unweighted - pooled["norm.running_mean"].item()) > 1e-3


def test_measuring_leaves_the_model_as_it_was() -> None:
    work = open_workspace(small())
    model = work.model()
    model.eval()
    before = float_state(model)
    statistics = measure_batch_norms(model, torch.from_numpy(work.client(0).dev_images))
    assert set(statistics) == {name for pair in work.batch_norms for name in pair}
    assert all(torch.equal(before[name], value) for name, value in float_state(model).items())
    assert not model.training
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def development(work: Workspace, client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of a client's development split."""
    data = work.client(client)
    return torch.from_numpy(data.dev_images), torch.from_numpy(data.dev_labels)


def local_ask(work_config: RunConfig) -> tuple[list[str], object]:
    """Clients that answer in this process, and a record of what they were asked."""
    work = open_workspace(work_config)
    asked: list[str] = []

    def ask(request: Request) -> Iterator[tuple[int, Reply]]:
        asked.append(type(request).__name__)
        for client in range(work_config.data.clients):
            model = work.model()
            images, labels = development(work, client)
            if isinstance(request, MeasureRequest):
                statistics = measure_candidates(model, request.pool, images)
                yield client, MeasureReply(len(labels), statistics)
            elif isinstance(request, ScoreRequest):
                yield client, score_candidates(model, request, images, labels)

    return asked, ask


def test_selection_takes_the_smallest_weighted_loss_and_its_statistics() -> None:
    config = small(method__pool_size=3)
    work = open_workspace(config)
    model = work.model()
    masks = candidate_pool(model, config.pruning, seed=1)
    pool = Pool(float_state(model), masks)
    asked, ask = local_ask(config)
    winner, statistics, account = select_candidate(model, pool, ask, adaptive=True)  # type: ignore[arg-type]
    assert asked == ["MeasureRequest", "ScoreRequest"]
    assert account["losses"][winner] == min(account["losses"])
    # Only running statistics are aggregated: scale and shift (γ, β) stay the server's.
    assert set(statistics) == {name for pair in work.batch_norms for name in pair}
    # The weighted loss by hand, with the winner's mask and statistics.
    total, samples = 0.0, 0
    for client in range(4):
        request = ScoreRequest(Pool(pool.weights, [masks[winner]]), [statistics])
        reply = score_candidates(work.model(), request, *development(work, client))
        total, samples = total + reply.loss_sums[0], samples + reply.num_examples
    assert account["losses"][winner] == pytest.approx(total / samples, rel=1e-6)


def test_vanilla_selection_does_not_adapt() -> None:
    config = small(method__pool_size=2)
    model = open_workspace(config).model()
    pool = Pool(float_state(model), candidate_pool(model, config.pruning, seed=1))
    asked, ask = local_ask(config)
    _, statistics, account = select_candidate(model, pool, ask, adaptive=False)  # type: ignore[arg-type]
    assert asked == ["ScoreRequest"]
    assert not account["adaptive"]
    assert all(torch.equal(value, pool.weights[name]) for name, value in statistics.items())


def test_selection_without_an_answer_is_an_error() -> None:
    with pytest.raises(RunError, match="fewer clients"):
        pool_statistics([], [], 2)


# --- progressive pruning -----------------------------------------------------------------------


def test_every_block_has_its_turn_from_output_to_input() -> None:
    """ΔR = 2 and three blocks: 3, 2, 1, 3, ... A pointer of round % 3 would differ, and with
    an even number of blocks would never visit half of them."""
    config = small()
    method, state = fedtiny_state(config)
    visited = []
    for _ in range(config.training.rounds):
        counts = method.growth_counts(state)
        if counts:
            visited.append(next(i for i, b in enumerate(method.blocks) if set(counts) <= set(b)))
        state = method.update(
            state,
            mean=state.weights,
            growth={
                name: (
                    state.mask.pruned(name)[:k],
                    torch.ones(min(k, len(state.mask.pruned(name)))),
                )
                for name, k in counts.items()
                if state.mask is not None
            },
        )
    # Rounds 2, 4, ..., 28; in the last ones a_l may fall to zero for the smallest block.
    assert visited[:9] == [2, 1, 0, 2, 1, 0, 2, 1, 0]
    assert set(visited) == {0, 1, 2}


def test_even_number_of_blocks_all_visited() -> None:
    method = open_workspace(small(model__name="resnet18", model__width=0)).method
    assert isinstance(method, FedTiny)
    assert len(method.blocks) == 4
    shapes = {n: p.shape for n, p in prunable_parameters(method.build_model()).items()}
    generator = torch.Generator().manual_seed(0)
    mask = Mask({n: torch.rand(s, generator=generator) < 0.01 for n, s in shapes.items()})
    seen = set()
    for adjustment in range(4):
        counts = method.growth_counts(RunState(2 * adjustment + 1, {}, mask, adjustment))
        seen |= {i for i, block in enumerate(method.blocks) if set(counts) <= set(block)}
    assert seen == {0, 1, 2, 3}


def test_adjustment_counts_follow_the_cosine() -> None:
    """a_l = floor(0.15 (1 + cos(π r / 30)) nnz_l): nearly 0.3 nnz at r = 2, nearly 0 at r = 28."""
    config = small()
    method, state = fedtiny_state(config)
    assert state.mask is not None
    for round_number, adjustments in ((2, 0), (8, 0), (14, 0), (28, 0)):
        at = RunState(round_number - 1, state.weights, state.mask, adjustments=adjustments)
        counts = method.growth_counts(at)
        for name in method.blocks[-1]:
            rate = 0.15 * (1 + math.cos(math.pi * round_number / 30))
            expected = math.floor(rate * int(state.mask[name].sum()))
            room = int((~state.mask[name]).sum())
            assert counts.get(name, 0) == min(expected, room)
    assert not method.growth_counts(RunState(29, state.weights, state.mask))
    assert not method.growth_counts(RunState(35, state.weights, state.mask))


def test_no_adjustment_outside_its_rounds() -> None:
    config = small()
    rounds = [r for r in range(1, 41) if is_adjustment_round(r, config)]
    assert rounds == list(range(2, 30, 2))


def test_adjustment_keeps_density_and_starts_grown_weights_at_zero() -> None:
    config = small()
    method, start = fedtiny_state(config)
    state = RunState(1, start.weights, start.mask)
    assert state.mask is not None
    counts = method.growth_counts(state)
    growth = {
        name: (state.mask.pruned(name)[-k:], torch.linspace(1, 2, k)) for name, k in counts.items()
    }
    after = method.update(state, mean=state.weights, growth=growth)
    assert after.mask is not None
    assert after.mask.counts() == state.mask.counts()
    for name, count in counts.items():
        grown = after.mask[name] & ~state.mask[name]
        assert int(grown.sum()) == count
        assert torch.equal(grown.reshape(-1).nonzero()[:, 0], growth[name][0])
        assert not after.weights[name][grown].any()
        assert not after.weights[name][~after.mask[name]].any()
    for name in set(state.mask) - set(counts):
        assert torch.equal(after.mask[name], state.mask[name])


def test_a_round_without_growth_entries_changes_no_mask() -> None:
    method, start = fedtiny_state(small())
    state = RunState(1, start.weights, start.mask)
    after = method.update(state, mean=state.weights, growth={})
    assert after.mask == state.mask
    assert after.adjustments == 1


# --- every method ------------------------------------------------------------------------------


def test_all_methods_use_one_network_class_and_the_same_start() -> None:
    states = {}
    for name in METHODS:
        model = open_workspace(small(method__name=name, model__width=16)).method.build_model()
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
    config = small(method__name="magnitude")
    method = open_workspace(config).method
    model = method.build_model()
    scores = {n: p.detach().abs() for n, p in prunable_parameters(model).items()}
    state = method.initialise(model, RunState(0, float_state(model)), lambda _: iter(()))
    assert state.mask is not None
    assert state.mask == mask_from_scores(scores, state.mask.counts())
    assert state.mask.density == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("name", list(METHODS))
def test_contract_of_every_method(name: str) -> None:
    """update() counts rounds, keeps the state's names and never puts weight outside the mask."""
    config = small(method__name=name, model__width=8)
    method = open_workspace(config).method
    model = method.build_model()
    _, ask = local_ask(config)
    state = method.initialise(model, RunState(0, float_state(model)), ask)  # type: ignore[arg-type]
    after = method.update(state, mean=state.weights, growth={})
    assert after.round_index == 1
    assert after.weights.keys() == state.weights.keys()
    if after.mask is not None:
        masked = {n: after.weights[n] * ~after.mask[n] for n in after.mask}
        assert not any(value.any() for value in masked.values())
        assert isinstance(after.mask, Mask)


def test_unknown_method_lists_the_known() -> None:
    config = small(method__name="fedtinny")
    with pytest.raises(ConfigError, match="fedtiny, fedtiny-vanilla"):
        build_method(config, open_workspace(small()).dataset)
