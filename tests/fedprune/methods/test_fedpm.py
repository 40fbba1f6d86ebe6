"""FedPM: scores and votes by hand, draws that can be repeated, and what goes up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import digest, run_inline, tiny
from places import build, dense_state, mini_batches, place, prunable
from torch import nn

from fedprune.errors import ClientError, ConfigError
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.methods.base import RunState, Start
from fedprune.methods.fedpm import (
    MASK,
    REST,
    SEED_CLIENT,
    FedPM,
    Scores,
    Votes,
    drawn,
    probabilities,
    random_weights,
    sigmoid,
    train_masks,
)
from fedprune.rounds.folder import RunFolder, prepare, read_checkpoint, read_metrics
from fedprune.settings import TrainingConfig
from prunelab.runs.seeds import rng
from sparsemodel.runtime.pattern import Pattern, Patterns

NAMES = list(prunable())


def started(method: FedPM | None = None) -> RunState:
    def nobody(request: Request) -> Any:
        raise AssertionError("it asks nobody before the first round")

    return (method or FedPM()).start(Start(dense_state, prunable(), {}, nobody, 4, 0))


def vote(*masks: list[int], weight: int = 1) -> Reply:
    """A client's answer: of each layer the places that it keeps, of six."""
    patterns = {
        f"layer{number}": Pattern.from_positions((2, 3), np.array(places, np.int64))
        for number, places in enumerate(masks)
    }
    rest = {REST: {"bias": np.float32([weight])}}
    return Reply(weight, {"loss": 1.0}, tensors=rest, masks={MASK: Patterns(patterns)})


def test_random_weights_are_of_one_size_and_of_the_seed() -> None:
    """e/√(3·3·2) with both signs, for a layer of two inputs and nine places."""
    weights = random_weights({"conv": (8, 2, 3, 3)}, seed=5)["conv"]
    assert np.allclose(abs(weights), np.e / np.sqrt(18))
    assert 0.3 < (weights > 0).mean() < 0.7
    assert np.array_equal(weights, random_weights({"conv": (8, 2, 3, 3)}, seed=5)["conv"])
    assert not np.array_equal(weights, random_weights({"conv": (8, 2, 3, 3)}, seed=6)["conv"])


def test_two_steps_of_scores_by_hand() -> None:
    """Adam on ∂L/∂w̃ · w · θ(1 − θ); the network moves to the next draw, other weights by SGD."""
    scores, weights = {"w": np.float32([0.5, -1.0])}, {"w": np.float32([2, -2])}
    training = TrainingConfig(rounds=1, lr=0.1, momentum=0.0, weight_decay=0.0)
    ours = Scores(scores, weights, rng(3), training=training, round_index=0, lr=0.1)
    twin, s = rng(3), np.array([0.5, -1.0])
    first, second = np.zeros(2), np.zeros(2)
    values = {"w": ours.drawn()["w"], "bias": np.float32([1.0])}
    drawn(sigmoid(np.float32(s)), twin)
    for step, gradient in ((1, np.array([0.3, 0.7])), (2, np.array([-0.2, 0.1]))):
        gradients = {"w": np.float32(gradient), "bias": np.float32([0.5])}
        ours.move(values, gradients)
        theta = 1 / (1 + np.exp(-s))
        slope = gradient * np.array([2, -2]) * theta * (1 - theta)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        corrected = np.sqrt(second / (1 - 0.999**step))
        s = s - 0.1 * first / (1 - 0.9**step) / (corrected + 1e-8)
        np.testing.assert_allclose(scores["w"], s, rtol=1e-5)
        expected = np.where(drawn(sigmoid(np.float32(s)), twin), weights["w"], 0)
        assert np.array_equal(values["w"] - gradients["w"], expected)
        assert gradients["bias"] == pytest.approx([0.05])
        values["w"] = values["w"] - gradients["w"]


def test_a_client_s_training_in_plain_torch() -> None:
    """Three steps: the gradient of the drawn network passes to θ as if nothing had been drawn."""
    state, local = started(), place("fedpm", 24, local_epochs=1, lr=0.02)
    asked = FedPM().request(state)
    reply = train_masks(asked, local)
    check_parts(reply, asked)
    training = local.config.training
    source = rng(local.seed(SEED_CLIENT, 0))
    weights = {n: torch.from_numpy(w) for n, w in random_weights(prunable(), 0).items()}
    theta = {n: torch.from_numpy(v) for n, v in probabilities(state).items()}
    scores = {n: (v / (1 - v)).log().requires_grad_() for n, v in theta.items()}
    adam = torch.optim.Adam(list(scores.values()), lr=0.1)
    model = build()
    rest = {n: p for n, p in model.named_parameters() if n not in NAMES}
    sgd = torch.optim.SGD(
        list(rest.values()), lr=training.lr, momentum=0.9, weight_decay=training.weight_decay
    )
    for images, labels in mini_batches(local, 0):
        chance = {n: s.sigmoid() for n, s in scores.items()}
        masks = {
            n: torch.from_numpy(drawn(p.detach().numpy(), source)).float() + p - p.detach()
            for n, p in chance.items()
        }
        used = {n: weights[n] * mask for n, mask in masks.items()}
        adam.zero_grad()
        sgd.zero_grad()
        logits = torch.func.functional_call(model, {**rest, **used}, (images,))
        nn.functional.cross_entropy(logits, labels).backward()
        adam.step()
        sgd.step()
    buffers = dict(model.named_buffers())
    for name, value in reply.tensors[REST].items():
        expected = rest[name] if name in rest else buffers[name]
        np.testing.assert_allclose(value, expected.detach(), rtol=1e-3, atol=1e-4, err_msg=name)
    for score in scores.values():  # the network after the last step
        drawn(score.detach().sigmoid().numpy(), source)
    # Where a draw comes out is a matter of a last bit for a few.
    odd = total = 0
    for name, score in scores.items():
        mask = drawn(score.detach().sigmoid().numpy(), source).reshape(-1)
        found = np.zeros(mask.size, bool)
        found[reply.masks[MASK][name].positions()] = True
        odd, total = odd + np.count_nonzero(found != mask), total + mask.size
    assert odd <= total // 500


def test_votes_are_counted_whoever_comes_first() -> None:
    """Three masks of two layers; the bias is the mean by weight, a vote is a vote."""
    replies = [vote([0, 1], [5]), vote([1], [], weight=3), vote([1, 4], [0, 5])]
    for order in ([0, 1, 2], [2, 0, 1]):
        votes = Votes()
        for client in order:
            votes.add(client, replies[client])
        pooled = votes.result()
        assert pooled.clients == [0, 1, 2]
        assert pooled.tensors["votes"]["layer0"].tolist() == [1, 3, 0, 0, 1, 0]
        assert pooled.tensors["votes"]["layer1"].tolist() == [1, 0, 0, 0, 0, 2]
        assert pooled.tensors[REST]["bias"].tolist() == pytest.approx([11 / 5])


def test_an_answer_that_cannot_be_used_changes_no_count() -> None:
    votes = Votes()
    votes.add(0, vote([0], [1]))
    with pytest.raises(ClientError, match="other clients"):
        votes.add(1, replace(vote([0], [1]), tensors={REST: {"what": np.float32([1])}}))
    assert votes.result().tensors["votes"]["layer0"].tolist() == [1, 0, 0, 0, 0, 0]


def all_or_none(state: RunState, kept: list[bool]) -> Any:
    """What a round gives in which each client keeps every weight, or none."""
    votes, asked = Votes(), FedPM().request(state)
    rest = {n: state.model.values[n] for n in asked.expected.tensors[REST]}
    for client, keeps in enumerate(kept):
        masks = {
            name: Pattern.from_positions(shape, np.arange(np.prod(shape) * keeps))
            for name, shape in prunable().items()
        }
        reply = Reply(8, {"loss": 1.0}, tensors={REST: rest}, masks={MASK: Patterns(masks)})
        check_parts(reply, asked)
        votes.add(client, reply)
    return votes.result()


@pytest.mark.parametrize(("reset_every", "expected"), [(1, 1 / 3), (2, 4 / 7)])
def test_the_mode_of_the_beta(reset_every: int, expected: float) -> None:
    """Three of four masks, then one of three: 1/3, or 4/7 of all seven; a hundredth inwards."""
    method = FedPM(reset_every=reset_every)
    state = started(method)
    state = method.update(state, all_or_none(state, [True, True, True, False]))
    assert all(np.allclose(v, 0.01 + 0.98 * 0.75) for v in probabilities(state).values())
    state = method.update(state, all_or_none(state, [True, False, False]))
    theta = method.request(state).states[MODEL].values
    assert all(np.allclose(theta[name], 0.01 + 0.98 * expected) for name in NAMES)
    assert state.model.patterns is not None
    assert state.model.patterns.density == pytest.approx(0.01 + 0.98 * expected, abs=0.02)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """With the votes of the round before, in whatever order the file has their layers."""
    method = FedPM(reset_every=2)
    prepare(tmp_path / "run", tiny(method__name="fedpm"), resume=False)
    state = started(method)
    state = method.update(state, all_or_none(state, [True, False]))
    RunFolder(tmp_path / "run").save(state)
    checkpoint = read_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    resumed = replace(checkpoint.state, model=checkpoint.state.model.ordered(state.model.values))
    ours, theirs = (method.update(s, all_or_none(s, [True])) for s in (state, resumed))
    for name, value in ours.model.values.items():
        assert np.array_equal(value, theirs.model.values[name])
    assert ours.model.patterns == theirs.model.patterns


def test_the_network_is_a_draw_of_random_weights() -> None:
    state = started()
    weights = random_weights(prunable(), 0)
    for name in NAMES:
        whole = state.model.dense_layer(name)
        assert np.array_equal(whole, np.where(whole != 0, weights[name], 0))
    assert list(state.model.values) == list(dense_state().values)
    again = started().model
    assert all(np.array_equal(v, again.values[n]) for n, v in state.model.values.items())


def test_a_run_sends_a_bit_a_weight_and_gives_the_same_bits_twice(tmp_path: Path) -> None:
    config = tiny(method__name="fedpm", training__rounds=2)
    first, second = (run_inline(config, tmp_path / name) for name in ("first", "second"))
    assert digest(first) == digest(second)
    for line in read_metrics(first)[-2:]:
        assert 0.4 < line["density"] < 0.6
        assert not line["skipped"]
    weights = sum(int(np.prod(shape)) for shape in prunable().values())
    rest = sum(v.nbytes for n, v in dense_state().values.items() if n not in NAMES)
    assert read_metrics(first)[-2]["bytes_up"] / 4 < 1.1 * weights / 8 + rest + 1500


@pytest.mark.parametrize("fields", [{"layers": ["what"]}, {"layers": 3}, {"score_lr": "much"}])
def test_questions_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    asked = FedPM().request(started())
    odd = replace(asked, fields={**asked.fields, **fields})
    with pytest.raises(ClientError, match=next(iter(fields))):
        train_masks(odd, place(method="fedpm"))


def test_what_is_no_probability_is_refused() -> None:
    asked = FedPM().request(started())
    whole = np.ones_like(asked.states[MODEL].values[NAMES[0]])
    odd = replace(asked, states={MODEL: asked.states[MODEL].replace({NAMES[0]: whole})})
    with pytest.raises(ClientError, match="between 0 and 1"):
        train_masks(odd, place(method="fedpm"))


@pytest.mark.parametrize("setting", [{"score_lr": 0.0}, {"reset_every": 0}])
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        FedPM(**setting)
