"""Local training: pruned weights stay zero, seeds decide everything, small clients work."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from little_clients import local, narrow, network_from, random_mask, samples, state_of
from torch import nn
from torch.nn import functional

from fedprune.config import TrainingConfig
from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.local import model as models
from fedprune.local import torch_models
from fedprune.local.model import LocalModel, RuntimeModel, Sgd, open_model
from fedprune.local.optimizer import round_sgd
from fedprune.local.training import (
    epoch_batches,
    growth_counts,
    growth_rows,
    train,
    train_epochs,
)
from fedprune.methods.base import RunState, train_request
from fedprune.rounds.workspace import compute_device
from prunelab.data.tensors import prepare
from sparsemodel.layers.from_state import load_state_
from sparsemodel.masks.mask import Mask
from sparsemodel.runtime.state import Entries, SparseState

SGD = Sgd(0.1, 0.9, 5e-4)


def trained(
    count: int = 40,
    *,
    mask: Mask | None = None,
    seed: int = 1,
    epochs: int = 2,
    execution: str = "auto",
) -> tuple[Any, float]:
    """A model after its epochs, and the loss of the last one."""
    training = TrainingConfig(batch_size=8, execution=execution)
    model = open_model(network_from(narrow), state_of(narrow(), mask), training)
    loss = train_epochs(model, *samples(count), sgd=SGD, epochs=epochs, batch_size=8, seed=seed)
    return model, loss


@pytest.mark.parametrize("execution", ["sparse", "masked", "dense"])
def test_pruned_weights_stay_exactly_zero_and_active_ones_move(execution: str) -> None:
    mask = random_mask(0.5)
    model, _ = trained(mask=mask, execution=execution)
    before, after = state_of(narrow(), mask), model.state()
    assert after.patterns == mask.csr()
    for name in mask:
        assert after.values[name].shape == (int(mask[name].sum()),)
        assert (after.values[name] != before.values[name]).all()
        if execution != "sparse":  # which has no place for a pruned weight
            weight = model._module.get_parameter(name).detach()
            assert not weight[~mask[name]].any()


def test_state_is_as_small_as_the_mask_says() -> None:
    """Dense: weights + gradients + momentum; sparse: those and three indices an active weight."""
    dense, _ = trained()
    sparse, _ = trained(mask=random_mask(0.1))
    assert sparse.held_bytes() < 0.5 * dense.held_bytes()


@pytest.mark.parametrize("density", [None, 0.5])
def test_equal_seeds_give_equal_bits(density: float | None) -> None:
    mask = None if density is None else random_mask(density)
    first, second, other = (trained(mask=mask, seed=s)[0].state().values for s in (1, 1, 2))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("density", [None, 0.5])
@pytest.mark.parametrize("count", [2, 9])
def test_two_samples_and_a_last_batch_of_one(count: int, density: float | None) -> None:
    """Nine samples in batches of eight would leave one alone, which batch norm cannot train."""
    model, _ = trained(count, mask=None if density is None else random_mask(density))
    assert all(np.isfinite(value).all() for value in model.state().values.values())
    order = epoch_batches(
        *samples(count), epochs=2, batch_size=8, seed=1, augmented=False
    )  # fmt: skip
    sizes = [len(labels) for _, _, labels in order]
    assert sum(sizes) == 2 * count
    assert min(sizes) >= 2


def test_augmented_batches_hold_the_same_labels_and_other_images() -> None:
    plain, changed = (
        list(epoch_batches(*samples(20), epochs=1, batch_size=20, seed=3, augmented=augmented))
        for augmented in (False, True)
    )
    assert plain[0][2].tolist() == changed[0][2].tolist()
    assert not np.array_equal(plain[0][1], changed[0][1])


@pytest.mark.parametrize("density", [None, 0.5])
def test_evaluation_adds_up(density: float | None) -> None:
    model, _ = trained(mask=None if density is None else random_mask(density))
    images, labels = samples(300)  # more than one evaluation batch
    result = model.evaluate(images, labels)
    plain = narrow()
    load_state_(plain, model.state())
    plain.eval()
    with torch.no_grad():
        logits = plain(prepare(torch.from_numpy(images)))
    target = torch.from_numpy(labels)
    assert result.metric_sum == int((logits.argmax(1) == target).sum())
    loss = functional.cross_entropy(logits, target).item()
    assert result.loss_sum / 300 == pytest.approx(loss, rel=1e-5)


def test_learning_rate_decays_by_the_cosine() -> None:
    config = TrainingConfig(rounds=10, lr=0.2, momentum=0.8, weight_decay=1e-3)
    numbers = [round_sgd(config, r) for r in range(10)]
    rates = [sgd.lr for sgd in numbers]
    assert rates[0] == 0.2
    assert rates[5] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(0.1 * (1 + math.cos(0.9 * math.pi)))
    assert rates == sorted(rates, reverse=True)
    assert {sgd[1:] for sgd in numbers} == {(0.8, 1e-3)}


def test_missing_cuda_is_a_clear_error() -> None:
    if torch.cuda.is_available():
        assert compute_device("cuda").type == "cuda"
        return
    with pytest.raises(ValueError, match="use 'cpu'"):
        compute_device("cuda")


# --- the answer to "train" ---------------------------------------------------------------------


def asked(state: SparseState, **growth: int) -> Request:
    return train_request(RunState(round_index=3, model=state), growth=growth)


def answer(count: int, *, request: Request, **training: Any) -> Reply:
    settings = TrainingConfig(**{"batch_size": 8, "rounds": 10, **training})
    return train(request, local(*samples(count), training=settings, network=network_from(narrow)))


def test_the_answer_holds_what_was_asked() -> None:
    mask = random_mask(0.5)
    request = asked(state_of(narrow(), mask), **{"fc.weight": 5, "layer2.0.conv1.weight": 7})
    reply = answer(20, request=request)
    request.check(reply)
    assert reply.num_examples == 20
    assert math.isfinite(reply.fields["loss"])
    assert reply.states[MODEL].patterns == mask.csr()
    assert {n: len(at) for n, (at, _) in reply.entries[MODEL].items()} == {
        "fc.weight": 5,
        "layer2.0.conv1.weight": 7,
    }
    assert reply.resources is None
    assert not answer(20, request=asked(state_of(narrow(), mask))).entries


def test_the_answer_says_what_was_held_when_asked() -> None:
    state = state_of(narrow())
    request = Request("train", states={MODEL: state}, report_resources=True)
    held = answer(20, request=request).resources
    assert held is not None
    trained = 12 * sum(p.numel() for p in narrow().parameters())
    assert held.state_bytes == trained + state.nbytes()  # and what the message brought
    assert held.peak_rss_bytes > 2**20


def test_the_answer_says_what_training_held_whatever_follows() -> None:
    """Growth frees the gradients; the account is that of the training before it."""
    state = state_of(narrow(), random_mask(0.5))
    held = []
    for growth in ({}, {"fc.weight": 5}):
        request = dataclasses.replace(asked(state, **growth), report_resources=True)
        reply = answer(20, request=request)
        assert reply.resources is not None
        held.append(reply.resources.state_bytes)
    assert held[0] == held[1]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_samples_are_refused(count: int) -> None:
    with pytest.raises(ClientError, match="at least 2"):
        answer(count, request=asked(state_of(narrow())))


@pytest.mark.parametrize(
    "grow", [[[0]], [["fc.weight", 3]], [[99, 3]], [[-1, 3]], [[0, -3]], [3], [[0, 1.5]]]
)
def test_growth_in_another_form_is_refused(grow: list[Any]) -> None:
    state, dense = state_of(narrow(), random_mask(0.5)), state_of(narrow())
    with pytest.raises(ClientError, match="grow"):
        growth_counts(Request("train", fields={"grow": grow}, states={MODEL: state}))
    with pytest.raises(ClientError, match="grow"):
        growth_counts(Request("train", fields={"grow": [[0, 1]]}, states={MODEL: dense}))


def test_growth_is_measured_on_a_mini_batch_of_the_round() -> None:
    place = local(
        *samples(20), training=TrainingConfig(batch_size=8), network=network_from(narrow)
    )  # fmt: skip
    first, again, other = (growth_rows(place, number).tolist() for number in (1, 1, 2))
    assert len(set(first)) == 8
    assert first == again != other


# --- execution ---------------------------------------------------------------------------------


def executed(execution: str, mask: Mask, num_samples: int = 8) -> tuple[LocalModel, float, Entries]:
    training = TrainingConfig(batch_size=8, execution=execution)
    model = open_model(network_from(narrow), state_of(narrow(), mask), training)
    images, labels = samples(40)
    loss = train_epochs(
        model, images, labels, sgd=Sgd(0.05, 0.9, 5e-4), epochs=2, batch_size=8, seed=1
    )
    before = model.state().values
    counts = {"fc.weight": 5, "layer2.0.conv1.weight": 7}
    growth = model.growth(counts, images[:num_samples], labels[:num_samples])
    after = model.state().values
    assert all(np.array_equal(before[name], after[name]) for name in mask)
    return model, loss, growth


@pytest.mark.parametrize("num_samples", [8, 2])  # of the growth gradients
@pytest.mark.parametrize("execution", ["sparse", "masked"])
def test_executions_do_the_same(execution: str, num_samples: int) -> None:
    """Ten steps, running statistics and growth gradients of each against plainly dense training."""
    mask = random_mask(0.5)
    model, loss, growth = executed(execution, mask, num_samples)
    dense, expected_loss, expected = executed("dense", mask, num_samples)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    state = model.state()
    for name, value in dense.state().values.items():
        np.testing.assert_allclose(state.values[name], value, rtol=2e-4, atol=2e-5)
    assert set(growth) == {"fc.weight", "layer2.0.conv1.weight"}
    for name, (indices, values) in growth.items():
        assert indices.tolist() == expected[name][0].tolist()
        assert not mask[name].reshape(-1)[torch.from_numpy(indices)].any()
        np.testing.assert_allclose(values, expected[name][1], rtol=1e-3, atol=1e-5)


def test_executions_hold_what_they_say() -> None:
    """12 bytes a weight when dense; masked: weights whole, the rest by density, 4 for an index;
    sparse: 12 + 12 for indices, all by density. Stem, norms and biases are dense in all."""
    mask = random_mask(0.1)
    held = {
        kind: trained(mask=mask, execution=kind)[0].held_bytes()
        for kind in ("dense", "masked", "sparse")
    }
    parameters = sum(p.numel() for p in narrow().parameters())
    rest = parameters - mask.num_weights
    assert held["dense"] == 12 * parameters
    assert held["masked"] == 12 * rest + 4 * mask.num_weights + 12 * mask.num_active
    rows = 4 * sum(2 * sum(p.shape[:2]) * 9 for p in mask.values())  # more than all row pointers
    assert 12 * rest + 24 * mask.num_active < held["sparse"]
    assert held["sparse"] < 12 * rest + 24 * mask.num_active + rows


KINDS = {
    "runtime": "RuntimeModel",
    "sparse": "SparseModules",
    "masked": "MaskedModel",
    "dense": "DenseModel",
}


@pytest.mark.parametrize(
    ("execution", "device", "expected", "dense"),
    [
        ("dense", "cpu", "dense", "dense"),
        ("masked", "cpu", "masked", "dense"),
        ("sparse", "cpu", "runtime", "runtime"),
        ("auto", "cpu", "runtime", "dense"),
        ("auto", "cuda", "masked", "dense"),
        ("sparse", "cuda", "sparse", "dense"),
    ],
)
def test_choice_of_execution(
    execution: str, device: str, expected: str, dense: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, name in KINDS.items():
        place = models if kind == "runtime" else torch_models
        monkeypatch.setattr(place, name, lambda *_, kind=kind, key=None: kind)
    config = TrainingConfig(execution=execution, device=device)
    network = network_from(narrow)
    assert open_model(network, state_of(narrow(), random_mask(0.5)), config) == expected
    assert open_model(network, state_of(narrow()), config) == dense  # nothing is pruned


def test_automatic_execution_without_native_kernels_is_masked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference path of sparse layers is slower than dense kernels."""
    network, state = network_from(narrow), state_of(narrow(), random_mask(0.5))
    assert isinstance(open_model(network, state, TrainingConfig()), RuntimeModel)
    monkeypatch.setattr("sparsemodel.kernels.cpu.library.library", lambda: None)
    model = open_model(network, state, TrainingConfig())
    assert isinstance(model, torch_models.MaskedModel)
    explicit = open_model(network, state, TrainingConfig(execution="sparse"))
    assert isinstance(explicit, torch_models.SparseModules)
    loss = explicit.step(*samples(8), sgd=SGD)
    assert loss == pytest.approx(model.step(*samples(8), sgd=SGD), rel=1e-5)


def test_one_sample_is_enough_where_there_is_no_batch_norm() -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    for build, trains in ((plain, True), (narrow, False)):
        network = network_from(build)
        place = local(*samples(1), training=TrainingConfig(lr=0.1), network=network)
        request = train_request(RunState(0, state_of(build())))
        if trains:
            before, after = request.state(MODEL), train(request, place).states[MODEL]
            assert any((after.values[n] != v).any() for n, v in before.values.items())
        else:
            with pytest.raises(ClientError, match="batch norm needs at least 2"):
                train(request, place)
