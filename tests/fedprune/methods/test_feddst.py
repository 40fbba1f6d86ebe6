"""FedDST: a client's exchange against plain torch, the server's merge in float64, whole runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import digest, run_inline, tiny
from places import build, place, state_at
from torch import nn

from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.aggregate import StateMean
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.local.training import SEED_ROUND, epoch_batches, growth_rows, train
from fedprune.methods.base import RunState, train_request
from fedprune.methods.feddst import FedDST
from fedprune.methods.own_masks import PRUNED, MaskedMean
from fedprune.rounds.folder import MODEL as MODEL_FILE
from fedprune.rounds.folder import read_metrics
from prunelab.data.batches import Preprocessing
from prunelab.networks import float_state
from sparsemodel.layers.from_state import load_state_
from sparsemodel.runtime.adjust import prune_and_grow
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.state_file import load_state

ADJUSTS = {"until": 10}
SHOULD_ADJUST = 3  # rounds completed before an adjustment round


def question(method: FedDST) -> Request:
    return method.request(RunState(SHOULD_ADJUST, state_at(0.3), ADJUSTS))


def answer(method: FedDST, **training: Any) -> tuple[Request, Reply]:
    request = question(method)
    local = place("feddst", **training)
    reply = method.actions["train"](request, local)
    check_parts(reply, request)
    return request, reply


def own_model(request: Request, reply: Reply) -> SparseState:
    """The client's model under its own mask, from the parts of its reply."""
    asked, changed, values = request.state(MODEL).patterns, {}, {}
    assert asked is not None
    state = reply.states[MODEL]
    for name, gone in reply.masks[PRUNED].items():
        kept = ~np.isin(asked[name].positions(), gone.positions())
        new, grown = reply.entries[MODEL][name]
        at = np.concatenate([asked[name].positions()[kept], new])
        order = np.argsort(at)
        changed[name] = Pattern.from_positions(asked[name].shape, at[order])
        values[name] = np.concatenate([state.values[name][kept], grown])[order]
    return SparseState({**state.values, **values}, asked.replace(changed))


# --- a client ----------------------------------------------------------------------------------


def test_the_number_exchanged_falls_along_half_a_cosine() -> None:
    """Round 4 of R_stop 10: ⌊.2/2 (1 + cos(.4 π)) nnz⌋ of every layer."""
    state = state_at(0.3)
    assert state.patterns is not None
    expected = question(FedDST(adjust_rate=0.2)).expected
    rate = 0.1 * (1 + math.cos(0.4 * math.pi))
    wanted = {n: math.floor(rate * count) for n, count in state.patterns.counts().items()}
    assert expected.growth == expected.masks[PRUNED] == {n: k for n, k in wanted.items() if k}
    assert sum(expected.growth.values()) > 50


def test_after_all_steps_it_is_one_exchange_of_the_trained_model() -> None:
    """Bit for bit: the smallest go, those of largest gradient come, at zero."""
    request, reply = answer(FedDST(adjust_after=1.0))
    counts = request.expected.growth
    plain = train(train_request(RunState(3, state_at(0.3)), growth=counts), place("feddst"))
    expected = prune_and_grow(plain.states[MODEL], plain.entries[MODEL], counts)
    found = own_model(request, reply)
    assert found.patterns == expected.patterns
    assert reply.fields == plain.fields
    for name, value in expected.values.items():
        assert np.array_equal(found.values[name], value)


@pytest.mark.parametrize("execution", ["sparse", "masked"])
def test_in_the_middle_it_is_a_plain_loop_in_torch(execution: str) -> None:
    """Four steps, the exchange by the dense gradient of a mini-batch, four steps more."""
    request, reply = answer(FedDST(), execution=execution, lr=0.05)
    local, start, counts = place("feddst", lr=0.05), state_at(0.3), request.expected.growth
    training = local.config.training
    rate = training.lr * 0.5 * (1 + np.cos(np.pi * 3 / training.rounds))
    model = build()
    load_state_(model, start)
    model.train()
    masks = {}
    for name, parameter in model.named_parameters():
        masks[name] = torch.ones_like(parameter)
        if (pattern := start.pattern(name)) is not None:
            masks[name].zero_().view(-1)[torch.from_numpy(pattern.positions())] = 1

    def gradients(images: Any, labels: Any) -> dict[str, torch.Tensor]:
        inputs = torch.from_numpy(Preprocessing().apply(images))
        loss = nn.functional.cross_entropy(model(inputs), torch.from_numpy(labels))
        named = dict(model.named_parameters())
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    speed: dict[str, torch.Tensor] = {}
    own, rows = local.data.train, growth_rows(local, 3)
    source = epoch_batches(
        own.inputs, own.targets, epochs=2, batch_size=8, seed=local.seed(SEED_ROUND, 3),
        augmented=False,
    )  # fmt: skip
    for step, (_, images, labels) in enumerate(source):
        if step == 4:
            norms = {n: b.clone() for n, b in model.named_buffers()}
            dense = gradients(own.inputs[rows], own.targets[rows])
            for name, buffer in model.named_buffers():
                buffer.copy_(norms[name])
            for name, count in counts.items():
                mask, weight = masks[name].view(-1), model.get_parameter(name).detach().view(-1)
                smallest = torch.where(mask > 0, weight.abs(), torch.inf).argsort()[:count]
                largest = (dense[name].view(-1).abs() * (mask == 0)).argsort(descending=True)
                mask[smallest], mask[largest[:count]] = 0, 1
                weight[smallest] = 0
            speed = {}
        for name, gradient in gradients(images, labels).items():
            parameter = model.get_parameter(name)
            step_of = (gradient + 0.01 * parameter.detach()) * masks[name]
            speed[name] = training.momentum * speed.get(name, torch.zeros_like(step_of)) + step_of
            with torch.no_grad():
                parameter.sub_(rate * speed[name])
    found = own_model(request, reply)
    assert found.patterns is not None
    for name, pattern in found.patterns.items():
        expected = masks[name].view(-1).nonzero().view(-1).numpy()
        assert np.array_equal(pattern.positions(), expected), name
        assert pattern.num_active == start.patterns[name].num_active  # type: ignore[index]
    for name, value in float_state(model).items():
        np.testing.assert_allclose(
            found.dense_layer(name), value.numpy(), rtol=5e-3, atol=2e-4, err_msg=name
        )
    assert all((values != 0).any() for _, values in reply.entries[MODEL].values())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_optimisers_that_keep_moments_go_on_under_the_new_mask(optimizer: str) -> None:
    request, reply = answer(FedDST(), optimizer=optimizer, clip_norm=1.0, lr=0.01)
    assert own_model(request, reply).patterns != request.state(MODEL).patterns


def test_other_rounds_are_plain_training() -> None:
    method, state = FedDST(), RunState(2, state_at(0.3), ADJUSTS)
    request = method.request(state)
    assert method.collector(state) is None
    ours = method.actions["train"](request, place("feddst"))
    theirs = train(train_request(state), place("feddst"))
    assert not ours.masks
    for name, value in theirs.states[MODEL].values.items():
        assert np.array_equal(ours.states[MODEL].values[name], value)


# --- the server --------------------------------------------------------------------------------


def small(values: list[float], kept: list[int], size: int = 6) -> SparseState:
    pattern = Pattern.from_positions((size,), np.array(kept))
    return SparseState({"w": np.float32(values), "b": np.float32([1])}, Patterns({"w": pattern}))


def told(model: list[float], gone: list[int], grown: dict[int, float], weight: int) -> Reply:
    """Of a client under {0, 2, 3}: values there, pruned ones, and what it grew."""
    entries = (np.array(list(grown), np.int64), np.float32(list(grown.values())))
    return Reply(
        weight,
        states={MODEL: small(model, [0, 2, 3])},
        entries={MODEL: {"w": entries}},
        masks={PRUNED: Patterns({"w": Pattern.from_positions((6,), np.array(gone, np.int64))})},
    )


def test_the_merge_by_hand() -> None:
    """Weights 1, 2, 3 of samples; who has it counts.

    w_0: all three: (1·1 + 2·2 + 3·4) / 6 = 17/6; w_2: the last alone: 5; w_3: nobody: gone;
    w_1: the first and the second: (1·3 + 2·6) / 3 = 5; w_4: the second: −9; w_5: the third, and
    the first, who grew a zero: (1·0 + 3·.5) / 4 = .375.
    Of {0, 1, 2, 4, 5} three stay by magnitude: 4, and of the equal 5s both, so that 0 goes.
    """
    base = small([0, 0, 0], [0, 2, 3])
    assert base.patterns is not None
    collector = MaskedMean(base.patterns)
    collector.add(4, told([1, 7, 7], [2, 3], {1: 3, 5: 0}, 1))
    collector.add(0, told([2, 7, 7], [2, 3], {1: 6, 4: -9}, 2))
    collector.add(2, told([4, 5, 7], [3], {5: 0.5}, 3))
    pooled = collector.result()
    assert pooled.clients == [0, 2, 4]
    assert pooled.weight == 6
    assert pooled.model.patterns is not None
    assert pooled.model.patterns["w"].positions().tolist() == [0, 1, 2, 4, 5]
    expected = [17 / 6, 5, 5, -9, 0.375]
    np.testing.assert_allclose(pooled.model.values["w"], expected, rtol=1e-6)
    assert pooled.model.values["b"].tolist() == [1]
    after = FedDST(density=0.5).update(RunState(1, base, ADJUSTS), pooled)
    assert after.model.patterns is not None
    assert after.model.patterns["w"].positions().tolist() == [1, 2, 4]
    np.testing.assert_allclose(after.model.values["w"], [5, 5, -9], rtol=1e-6)


def test_the_order_of_answers_changes_no_bit() -> None:
    replies = []
    for client in range(3):
        request = question(FedDST())
        local = place("feddst", count=20 + 7 * client, client=client)
        replies.append((client, FedDST.actions["train"](request, local)))
    patterns = request.state(MODEL).patterns
    assert patterns is not None
    found = []
    for order in ([0, 1, 2], [2, 0, 1]):
        collector = MaskedMean(patterns)
        for client in order:
            collector.add(*replies[client])
        found.append(collector.result().model)
    assert found[0].patterns == found[1].patterns
    for name, value in found[0].values.items():
        assert np.array_equal(value, found[1].values[name])
    # And the values are those of float64, coordinate by coordinate.
    for name in request.expected.growth:
        total, weight = (np.zeros(found[0].dense_layer(name).size) for _ in range(2))
        for _, reply in replies:
            own = own_model(request, reply)
            at = own.patterns[name].positions()  # type: ignore[index]
            total[at] += reply.weight * own.values[name].astype(np.float64)
            weight[at] += reply.weight
        at = np.flatnonzero(weight)
        assert np.array_equal(found[0].patterns[name].positions(), at)  # type: ignore[index]
        np.testing.assert_allclose(found[0].values[name], total[at] / weight[at], rtol=1e-6)


def test_clients_that_exchange_nothing_give_the_plain_mean() -> None:
    """Bit for bit what the run's own mean gives."""
    base = state_at(0.3)
    assert base.patterns is not None
    name = next(iter(base.patterns))
    empty = Pattern.from_positions(base.patterns[name].shape, np.empty(0, np.int64))
    collector, method = MaskedMean(base.patterns), FedDST()
    plain = StateMean()
    for client in range(2):
        request = train_request(RunState(3, base))
        reply = train(request, place("feddst", count=20 + client, client=client))
        plain.add(reply.states[MODEL], weight=reply.weight)
        collector.add(client, replace(reply, masks={PRUNED: Patterns({name: empty})}))
    mean = plain.result()
    after = method.update(RunState(3, base, ADJUSTS), collector.result()).model
    assert after.patterns == base.patterns
    for key, value in mean.values.items():
        assert np.array_equal(after.values[key], value)


def test_answers_that_do_not_add_up_are_refused_and_leave_no_trace() -> None:
    base = small([0, 0, 0], [0, 2, 3])
    assert base.patterns is not None
    collector = MaskedMean(base.patterns)
    collector.add(0, told([1, 2, 3], [0], {1: 4}, 1))
    before = collector.result().model
    with pytest.raises(ClientError, match="called pruned that were not active"):
        collector.add(1, told([1, 2, 3], [1], {5: 4}, 1))
    with pytest.raises(ClientError, match="2 weights pruned and 1 grown"):
        collector.add(1, told([1, 2, 3], [0, 2], {5: 4}, 1))
    with pytest.raises(ClientError, match="NaN"):
        collector.add(1, told([1, np.nan, 3], [0], {5: 4}, 1))
    after = collector.result()
    assert after.clients == [0]
    assert after.model.patterns == before.patterns
    assert np.array_equal(after.model.values["w"], before.values["w"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("adjust_after", 1.5),
        ("adjust_rate", 1.0),
        ("adjust_every", 0),
        ("adjust_until", -1),
        ("distribution", "global"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"method.{setting}: expected"):
        FedDST(**{setting: value})


def test_adjustments_end_at_60_percent_of_the_rounds() -> None:
    assert FedDST().used(20)["adjust_until"] == 12
    assert FedDST(adjust_until=5).used(20)["adjust_until"] == 5


# --- runs --------------------------------------------------------------------------------------


def test_a_run_moves_the_mask_at_its_density_and_the_same_way_twice(tmp_path: Path) -> None:
    config = tiny(method__name="feddst", training__rounds=3, training__batch_size=16)
    lines = read_metrics(run_inline(config, tmp_path / "one"))
    start, rounds = lines[0], lines[1:]
    assert all(line["density"] == pytest.approx(0.2, rel=0.01) for line in rounds)
    assert len({line["density"] for line in rounds}) == 1
    assert [len(line["adjusted"]) > 3 for line in rounds] == [True, True, True]
    assert not any(line["skipped"] for line in [start, *rounds])
    assert digest(run_inline(config, tmp_path / "two")) == digest(tmp_path / "one")


def test_a_run_without_adjustments_is_the_fixed_mask(tmp_path: Path) -> None:
    common = {"training__rounds": 2, "method__adjust_until": 1}
    ours = run_inline(
        tiny(method__name="feddst", method__distribution="uniform", **common), tmp_path / "ours"
    )
    theirs = run_inline(tiny(method__name="magnitude", **common), tmp_path / "theirs")
    found, expected = (load_state(out / MODEL_FILE)[0] for out in (ours, theirs))
    assert found.patterns == expected.patterns
    assert all(np.array_equal(v, found.values[name]) for name, v in expected.values.items())
