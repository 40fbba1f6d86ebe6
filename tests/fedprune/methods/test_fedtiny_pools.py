"""Candidates of several kinds, and selections that let them train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import digest, laid_out, places_of, run_inline, tiny
from torch import nn

from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.messages import Reply, Request
from fedprune.exchange.pooled import pooled as add_up
from fedprune.local.optimizer import Optimizer
from fedprune.local.site import Local
from fedprune.local.training import epoch_batches
from fedprune.methods.base import Start
from fedprune.methods.fedtiny import kinds as kinds_of
from fedprune.methods.fedtiny.kinds import KINDS, pool_of_kinds
from fedprune.methods.fedtiny.narrow import channel_groups, narrow_mask
from fedprune.methods.fedtiny.plus import FedTinyPlus
from fedprune.methods.fedtiny.pool import (
    Pool,
    candidate_counts,
    candidate_pool,
    pool_request,
    received_pool,
)
from fedprune.methods.fedtiny.trials import (
    SEED_TRIAL,
    measure_flow,
    select_by_trial,
    try_steps,
)
from fedprune.methods.snip import Snip
from fedprune.methods.synflow import SynFlow
from fedprune.rounds.folder import read_metrics
from fedprune.rounds.setup import Setup
from prunelab.data.batches import Preprocessing
from prunelab.errors import RunError
from prunelab.networks import build_model, float_state
from sparsemodel.layers.from_state import load_state_
from sparsemodel.masks.distribution import erk, erk_conv, uniform
from sparsemodel.masks.mask import prunable_parameters
from sparsemodel.plans.program import program_of
from sparsemodel.runtime.adjust import carry, prune_to_largest
from sparsemodel.runtime.outputs import with_outputs
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("setup")
    return laid_out(folder, method__name="fedtiny-plus", data__alpha=0.3, training__batch_size=16)


def answers(setup: Setup, action: Any) -> Any:
    def ask(request: Request) -> Any:
        def replies() -> Iterator[tuple[int, Reply]]:
            for place in places_of(setup):
                reply = action(request, place)
                request.check(reply)
                yield place.client, reply

        return add_up(replies(), request.expected)

    return ask


def start_of(setup: Setup) -> Start:
    return Start(
        setup.start_state, setup.prunable, setup.blocks, lambda request: iter(()), 4,
        setup.config.seed, place=setup.place, program=setup.program,
    )  # fmt: skip


def masks(pool: Pool) -> list[Patterns]:
    found = [pool.candidate(number).patterns for number in range(len(pool))]
    return [mask for mask in found if mask is not None]


# --- outputs -----------------------------------------------------------------------------------


def test_silent_outputs_get_their_largest_weight_for_the_smallest_others() -> None:
    """Outputs 1 and 3 are silent; their largest are 2 and 1. Of output 0's three all but its
    largest may go, the smallest first."""
    dense = SparseState({"w": np.float32([[9, 8, 7], [-2, 1, 0], [6, 0, 0], [0, 0, 1]])})
    patterns = Patterns({"w": Pattern.from_positions((4, 3), np.array([0, 1, 2, 6]))})
    found = with_outputs(carry(dense, patterns), dense)
    assert found.dense()["w"].tolist() == [[9, 0, 0], [-2, 0, 0], [6, 0, 0], [0, 0, 1]]
    few = Patterns({"w": Pattern.from_positions((4, 3), np.array([0, 1, 6]))})
    found = with_outputs(carry(dense, few), dense)
    assert found.dense()["w"].tolist() == [[9, 0, 0], [-2, 0, 0], [6, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3])
def test_a_pool_that_keeps_outputs_is_still_a_union_and_counts(density: float) -> None:
    """What clients make of it is what each candidate would be made of the dense model."""
    generator = np.random.default_rng(3)
    shapes = {"a": (16, 4, 3, 3), "b": (24, 16, 3, 3), "c": (10, 24)}
    dense = SparseState(
        {n: generator.standard_normal(s).astype(np.float32) ** 3 for n, s in shapes.items()}
    )
    counts = candidate_counts(shapes, density, num_candidates=5, seed=1)
    pool = received_pool(pool_request(candidate_pool(dense, counts, outputs=True), "measure"))
    for each, candidate in zip(counts, masks(pool), strict=True):
        alone = with_outputs(prune_to_largest(dense, each), dense)
        assert candidate == alone.patterns
        assert candidate.counts() == each
        for name, pattern in candidate.items():
            silent = (np.diff(pattern.row_ptr) == 0).sum()
            assert silent == max(0, shapes[name][0] - each[name])


# --- kinds -------------------------------------------------------------------------------------


def test_every_kind_meets_the_density_and_travels_sparse(setup: Setup) -> None:
    pool, names = pool_of_kinds(
        KINDS, start_of(setup), 0.2, num_candidates=10, outputs=False
    )  # fmt: skip
    nested = ["noise", "erk", "noise", "erk", "uniform", "erk-conv"]
    assert names == [*nested, "synflow", "snip", "gradual", "narrow"]
    assert len({mask.digest() for mask in masks(pool)}) == 10
    for name, mask in zip(names, masks(pool), strict=True):
        assert mask.density == pytest.approx(0.2, rel=0.02 if name != "narrow" else 0.15)
        assert mask.density <= 0.2 * 1.02
    request = pool_request(pool, "measure")
    assert all(state.patterns is not None for state in request.states.values())
    received = received_pool(request)
    assert masks(received) == masks(pool)
    assert [dict(each) for each in pool.kept()] == [mask.counts() for mask in masks(pool)]


def test_kinds_by_their_own_definitions(setup: Setup) -> None:
    start = start_of(setup)
    dense = start.state()
    one = {
        kind: masks(pool_of_kinds([kind], start, 0.2, num_candidates=1, outputs=False)[0])[0]
        for kind in KINDS
    }
    assert one["uniform"].counts() == uniform(start.prunable, 0.2)
    assert one["erk-conv"].counts() == erk_conv(start.prunable, 0.2)
    assert one["synflow"] == SynFlow(density=0.2).mask(start)
    assert one["snip"] == Snip(density=0.2).mask(start)
    (faithful,) = masks(
        candidate_pool(
            dense, candidate_counts(start.prunable, 0.2, num_candidates=1, seed=start.seed)
        )
    )
    assert one["noise"] == faithful
    # Noise around the counts of ERK, of the same draws: each layer's factor in [.5, 1.5].
    middle = erk(start.prunable, 0.2)
    for name, count in one["erk"].counts().items():
        size = np.prod(start.prunable[name])
        assert min(0.5 * middle[name], size) - 1 <= count <= min(1.5 * middle[name], size) + 1
    assert one["erk"].counts() != middle


def test_gradual_pruning_ends_trained_at_the_density(setup: Setup) -> None:
    """Its weights are not those of the start at its mask, and its mask is no one-shot one."""
    start = start_of(setup)
    state = kinds_of.STATES["gradual"](start, 0.1, True)
    assert state.patterns is not None
    assert state.patterns.counts() == uniform(start.prunable, 0.1)
    same = carry(start.state(), state.patterns)
    assert any(not np.array_equal(v, same.values[n]) for n, v in state.values.items())
    for name, pattern in state.patterns.items():
        rows = start.prunable[name][0]
        assert (np.diff(pattern.row_ptr) > 0).sum() == min(rows, pattern.num_active)
    again = kinds_of.STATES["gradual"](start, 0.1, True)
    assert all(np.array_equal(v, again.values[n]) for n, v in state.values.items())


def test_kinds_that_are_drawn_share_what_others_leave() -> None:
    places = kinds_of._places
    assert places(["noise"], 3) == ["noise"] * 3
    assert places(["narrow", "noise", "uniform"], 3) == ["noise", "narrow", "uniform"]
    assert places(["synflow", "erk", "noise"], 1) == ["erk", "noise", "synflow"]
    assert places(["synflow"], 7) == ["synflow"]


@pytest.mark.parametrize("candidates", ["", "noise,", "noise,noise", "wide"])
def test_kinds_that_are_none_are_refused(candidates: str) -> None:
    with pytest.raises(ConfigError, match="candidates: expected some of noise, erk, uniform"):
        FedTinyPlus(candidates=candidates)


# --- narrow ------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Two layers, then one that reads flattened maps of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.body = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.body(torch.relu(self.stem(x)))))
        return self.head(torch.flatten(x, 1))  # type: ignore[no-any-return]


def test_narrow_by_hand() -> None:
    """Channels 1 of the stem and 2 of the body are the largest: one block of 9 weights between
    them, and the four columns of body's channel 2 for each of three classes."""
    model = Chain()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
        model.stem.weight[1], model.body.weight[2] = 1.0, -1.0
    program = program_of(model, (1, 2, 2))
    dense = SparseState({name: v.numpy() for name, v in float_state(model).items()})
    prunable = {"body.weight": (4, 4, 3, 3), "head.weight": (3, 16)}
    mask = narrow_mask(dense, program, prunable, 21 / 192)  # 9 + 12 weights
    body = np.zeros((4, 4, 9), bool)
    body[2, 1] = True
    head = np.zeros((3, 4, 4), bool)
    head[:, 2] = True
    assert np.array_equal(mask["body.weight"].positions(), np.flatnonzero(body))
    assert np.array_equal(mask["head.weight"].positions(), np.flatnonzero(head))
    with pytest.raises(RunError, match="a channel of every layer, 21 weights, and density"):
        narrow_mask(dense, program, prunable, 20 / 192)


def test_a_narrow_residual_network_reads_only_what_it_writes() -> None:
    """In every layer a dense block, whose inputs are the outputs that earlier layers keep; the
    channels of a stage's stream are the same for all its blocks and its shortcut."""
    model = build_model("resnet8", num_classes=10, input_shape=(1, 8, 8), seed=0)
    program = program_of(model, (1, 8, 8))
    dense = SparseState({name: v.numpy() for name, v in float_state(model).items()})
    prunable = {n: tuple(p.shape) for n, p in prunable_parameters(model).items()}
    mask = narrow_mask(dense, program, prunable, 0.1)
    assert 0.08 < mask.density <= 0.1
    groups, layers = channel_groups(program), program.layers()
    channels: dict[int, set[tuple[int, ...]]] = {}
    for name, pattern in mask.items():
        out, width, *kernel = (*prunable[name], 1, 1)[:4]
        kept = np.zeros(out * width * kernel[0] * kernel[1], bool)
        kept[pattern.positions()] = True
        block = kept.reshape(out, width, -1)
        rows, columns = block.any((1, 2)), block.any((0, 2))
        assert np.array_equal(
            block, np.broadcast_to(np.outer(rows, columns)[..., None], block.shape)
        )
        node = program.nodes[layers[name]]
        for group, used in ((groups[layers[name]], rows), (groups[node.inputs[0]], columns)):
            channels.setdefault(group, set()).add(tuple(np.flatnonzero(used)))
    assert all(len(found) == 1 for found in channels.values())
    shares = [len(next(iter(found))) for group, found in channels.items() if group != groups[-1]]
    assert max(shares) < 32  # of 64 channels of the last stage; √.1 of them is 20


# --- selections --------------------------------------------------------------------------------


def small_pool(setup: Setup) -> Pool:
    start = start_of(setup)
    return pool_of_kinds(["noise", "synflow"], start, 0.2, num_candidates=3, outputs=False)[0]


def trial_batches(place: Local, steps: int) -> list[tuple[Any, Any]]:
    data = place.data.train
    source = epoch_batches(
        data.inputs, data.targets, epochs=steps, batch_size=16, seed=place.seed(SEED_TRIAL),
        augmented=False,
    )  # fmt: skip
    return [(images, labels) for _, (_, images, labels) in zip(range(steps), source, strict=False)]


def test_steps_by_hand(setup: Setup) -> None:
    """Each candidate trained alone from its own state, then tested by adapted statistics."""
    pool, steps = small_pool(setup), 3
    winner, statistics, account = select_by_trial(
        pool, answers(setup, try_steps), selection="steps", steps=steps, metric="accuracy"
    )
    losses, samples, means = np.zeros(len(pool)), 0, 0.0
    for place in places_of(setup):
        dev = place.data.dev
        for number in range(len(pool)):
            model = place.open(pool.candidate(number))
            if number == winner:
                name = next(iter(statistics))
                means = means + len(dev) * model.statistics(dev.inputs)[name]
            sgd = Optimizer(place.config.training, 0).sgd
            for images, labels in trial_batches(place, steps):
                model.step(images, labels, sgd=sgd)
            state = model.state().replace(model.statistics(dev.inputs))
            losses[number] += place.open(state).evaluate(dev.inputs, dev.targets).loss_sum
        samples += len(dev)
    assert np.allclose(account["losses"], losses / samples)
    assert winner == int(np.argmin(losses))
    assert np.allclose(statistics[name], means / samples, atol=1e-6)
    assert len(account["densities"]) == 3


def test_flow_by_hand(setup: Setup) -> None:
    """‖mean gradient at the mask‖² of each client by autograd in float64, weighted by samples."""
    pool, steps = small_pool(setup), 2
    winner, _, account = select_by_trial(
        pool, answers(setup, measure_flow), selection="flow", steps=steps, metric="accuracy"
    )
    flows, samples = np.zeros(len(pool)), 0
    for place in places_of(setup):
        for number, mask in enumerate(masks(pool)):
            model = setup.network.build()
            load_state_(model, pool.candidate(number))
            model.double().train()
            total, seen = dict.fromkeys(mask, 0.0), 0
            for images, labels in trial_batches(place, steps):
                model.zero_grad()
                inputs = torch.from_numpy(Preprocessing().apply(images)).double()
                nn.functional.cross_entropy(model(inputs), torch.from_numpy(labels)).backward()
                for name, pattern in mask.items():
                    gradient = model.get_parameter(name).grad
                    assert gradient is not None
                    active = gradient.numpy().reshape(-1)[pattern.positions()]
                    total[name] = total[name] + len(labels) * active
                seen += len(labels)
            norm = sum(float((np.asarray(each) ** 2).sum()) for each in total.values()) / seen**2
            flows[number] += len(place.data.dev) * norm
        samples += len(place.data.dev)
    assert np.allclose(account["flows"], flows / samples, rtol=1e-3)
    assert winner == int(np.argmax(flows))


def test_the_account_counts_every_pass(setup: Setup) -> None:
    """Of steps: statistics before and after, the loss, and three passes a step."""
    asked: list[Request] = []

    def ask(request: Request) -> Any:
        asked.append(request)
        return answers(setup, try_steps)(request)

    pool = small_pool(setup)
    select_by_trial(pool, ask, selection="steps", steps=2, metric="accuracy")
    (request,) = asked
    assert len(request.forward_passes) == 3 * len(pool)
    assert len(request.batch_passes) == 2 * 3 * len(pool)


def test_selections_that_cannot_be_are_refused(setup: Setup) -> None:
    with pytest.raises(ConfigError, match="selection: expected one of batch-norm, steps, flow"):
        FedTinyPlus(selection="guess")
    with pytest.raises(ConfigError, match="selection_steps: expected 1 to 1000, got 0"):
        FedTinyPlus(selection_steps=0)
    pool, place = small_pool(setup), places_of(setup)[0]
    for steps in (None, 0, 1001):
        with pytest.raises(ClientError, match="steps"):
            try_steps(pool_request(pool, "steps", fields={"steps": steps}), place)
    lie = Reply(5, {"flows": [1.0, -1.0, 2.0]})

    def lying(request: Request) -> Any:
        request.check(lie)

    with pytest.raises(ClientError, match="'flows': expected 0 or more, got -1"):
        select_by_trial(pool, lying, selection="flow", steps=1, metric="accuracy")
    with pytest.raises(RunError, match="selection by flow: no client could try"):
        select_by_trial(
            pool, lambda request: add_up((), request.expected), selection="flow", steps=1,
            metric="accuracy",
        )  # fmt: skip


@pytest.mark.parametrize("selection", ["batch-norm", "steps", "flow"])
def test_runs_of_all_kinds_say_who_won(selection: str, tmp_path: Path) -> None:
    config = tiny(
        method__name="fedtiny-plus", method__candidates=", ".join(KINDS), method__pool_size=8,
        method__selection=selection, method__selection_steps=2, method__keep_outputs=True,
        method__growth_at="merged", training__rounds=2, server__pretrain_epochs=2,
    )  # fmt: skip
    out = run_inline(config, tmp_path / "run")
    (account,) = [line["selection"] for line in read_metrics(out) if "selection" in line]
    assert account["kinds"] == list(KINDS)
    assert len(account["densities"]) == 8
    assert 0 <= account["winner"] < 8
    if selection == "flow":
        assert digest(run_inline(config, tmp_path / "again")) == digest(out)
