"""A client's models compute the same: the runtime, sparse modules, masked and dense ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from little_clients import SHAPE, narrow, network_from, random_mask, samples, state_of
from smooth_network import smooth
from torch import nn

from fedprune.config import TrainingConfig
from fedprune.local.model import LocalModel, RuntimeModel, Sgd
from fedprune.local.torch_models import DenseModel, MaskedModel, SparseModules
from prunelab.networks import build_model
from sparsemodel.masks.mask import Mask
from sparsemodel.runtime.state import SparseState, Tensors

SGD = Sgd(0.05, 0.9, 1e-3)
KINDS = ["runtime", "modules", "masked", "dense"]


def smooth_one() -> nn.Module:
    return build_model(smooth, num_classes=3, input_shape=SHAPE, seed=0)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet8": narrow, "smooth": smooth_one}
CASES = [
    *((name, kind) for name, kind in (("resnet8", kind) for kind in KINDS)),
    *(("smooth", kind) for kind in KINDS if kind != "runtime"),
]


def opened(kind: str, build: Callable[[], nn.Module], state: SparseState, **changes: Any) -> Any:
    training = TrainingConfig(**{"batch_size": 8, **changes})
    if kind == "runtime":
        program = network_from(build).program
        assert program is not None
        return RuntimeModel(program, state, training)
    torch_kinds = {"modules": SparseModules, "masked": MaskedModel, "dense": DenseModel}
    return torch_kinds[kind](build, state, training)


def pair(name: str, kind: str, density: float = 0.4) -> tuple[Mask, LocalModel, LocalModel]:
    """The mask, a model of this kind under it, and a plainly dense one."""
    build = NETWORKS[name]
    mask = random_mask(density, build())
    state = state_of(build(), mask)
    return mask, opened(kind, build, state), opened("dense", build, state)


def close(ours: Tensors, theirs: Tensors, *, rtol: float = 1e-3, atol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == np.float32
        np.testing.assert_allclose(ours[name], value, rtol=rtol, atol=atol, err_msg=name)


def test_the_smooth_network_has_no_program() -> None:
    assert network_from(smooth_one).program is None


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_steps_are_those_of_dense_training(name: str, kind: str) -> None:
    """Five steps of bytes and floats, the last batch of one more; losses and every value."""
    mask, ours, theirs = pair(name, kind)
    images, labels = samples(41)
    floats = (images.astype(np.float32) / 255 - 0.5) / 0.25
    for start in (0, 8, 16, 24):
        some = slice(start, start + 8)
        fed = floats if start == 8 else images
        loss = ours.step(fed[some], labels[some], sgd=SGD)
        assert loss == pytest.approx(theirs.step(images[some], labels[some], sgd=SGD), rel=1e-4)
    ours.step(images[32:], labels[32:], sgd=SGD)  # nine
    theirs.step(images[32:], labels[32:], sgd=SGD)
    assert ours.state().patterns == mask.csr()
    close(ours.state().values, theirs.state().values)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_correction_sees_active_gradients_and_changes_the_step(name: str, kind: str) -> None:
    _, ours, theirs = pair(name, kind)
    before = ours.state().values
    seen: list[dict[str, Any]] = []

    def keep(values: Tensors, gradients: Tensors) -> None:
        assert values.keys() == gradients.keys()
        seen.append({key: gradient.copy() for key, gradient in gradients.items()})
        for key, gradient in gradients.items():
            assert np.array_equal(values[key].reshape(-1), before[key].reshape(-1))
            gradient[...] = 1.0

    images, labels = samples(8)
    loss = ours.step(images, labels, sgd=Sgd(0.5, 0.0, 0.0), correction=keep)
    expected = theirs.step(images, labels, sgd=Sgd(0.5, 0.0, 0.0), correction=keep)
    assert loss == pytest.approx(expected, rel=1e-4)
    close(seen[0], seen[1], atol=1e-6)
    after = ours.state().values
    for key in seen[0]:
        np.testing.assert_allclose(after[key], before[key] - 0.5, rtol=1e-6, atol=1e-6)
    assert {k for k in before if "running" in k} == before.keys() - seen[0].keys()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_empty_correction_changes_no_bit(name: str, kind: str) -> None:
    _, first, _ = pair(name, kind)
    _, second, _ = pair(name, kind)
    images, labels = samples(16)
    for some in (slice(0, 8), slice(8, 16)):
        first.step(images[some], labels[some], sgd=SGD)
        second.step(images[some], labels[some], sgd=SGD, correction=lambda values, gradients: None)
    ours, theirs = first.state().values, second.state().values
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        (*case, count)
        for case in CASES
        for count in (8, 9, 20)  # 20: more than a batch, for torch alone
        if count < 10 or case[1] != "runtime"
    ],
)
def test_growth_is_that_of_dense_gradients(name: str, kind: str, count: int) -> None:
    mask, ours, theirs = pair(name, kind)
    images, labels = samples(count)
    wanted = {name: 5 + place for place, name in enumerate(list(mask)[-3:])}
    found, expected = (model.growth(wanted, images, labels) for model in (ours, theirs))
    assert found.keys() == expected.keys() == wanted.keys()
    for key, (indices, values) in found.items():
        assert len(indices) == wanted[key]
        assert indices.tolist() == expected[key][0].tolist()
        assert not mask[key].reshape(-1)[torch.from_numpy(indices)].any()
        np.testing.assert_allclose(values, expected[key][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("count", [2, 9, 300, 35])  # 300, 35: batches of 17, of 17, 16 and 2
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_statistics_are_those_of_dense_modules(name: str, kind: str, count: int) -> None:
    """In the same batches: what later norms see depends on them."""
    images = samples(count)[0]
    mask, _, _ = pair(name, kind)
    state = state_of(NETWORKS[name](), mask)
    ours, theirs = (opened(k, NETWORKS[name], state, batch_size=16) for k in (kind, "dense"))
    found, expected = ours.statistics(images), theirs.statistics(images)
    close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(np.array_equal(v, ours.state().values[n]) for n, v in state.values.items())


@pytest.mark.parametrize("count", [1, 9, 300])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_evaluation_is_that_of_dense_modules(name: str, kind: str, count: int) -> None:
    _, ours, theirs = pair(name, kind)
    images, labels = samples(40)
    for model in (ours, theirs):
        model.step(images[:8], labels[:8], sgd=SGD)
    before = ours.state().values
    images, labels = samples(count)
    found, expected = ours.evaluate(images, labels), theirs.evaluate(images, labels)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-4)
    assert found.metric_sum == expected.metric_sum
    assert all(np.array_equal(v, before[n]) for n, v in ours.state().values.items())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_another_load_starts_anew(name: str, kind: str) -> None:
    """Under other patterns and under the same, with momentum at zero, as a model just opened."""
    build = NETWORKS[name]
    _, model, _ = pair(name, kind)
    images, labels = samples(8)
    for density, seed in ((0.4, 5), (0.2, 6)):
        model.step(images, labels, sgd=SGD)
        model.growth({}, images, labels)
        state = state_of(build(), random_mask(density, build(), seed=seed))
        model.load(state)
        assert model.state().patterns == state.patterns
        fresh = opened(kind, build, state)
        for _ in range(2):
            assert model.step(images, labels, sgd=SGD) == fresh.step(images, labels, sgd=SGD)
        ours, theirs = model.state().values, fresh.state().values
        assert all(np.array_equal(value, ours[key]) for key, value in theirs.items())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_state_is_a_copy_both_ways(name: str, kind: str) -> None:
    build = NETWORKS[name]
    given = state_of(build(), random_mask(0.4, build()))
    kept = {key: value.copy() for key, value in given.values.items()}
    model = opened(kind, build, given)
    taken = model.state()
    model.step(*samples(8), sgd=SGD)
    for key, value in kept.items():
        assert np.array_equal(given.values[key], value)
        assert np.array_equal(taken.values[key], value)
        given.values[key][...] = 7
        taken.values[key][...] = 9
    assert not any(
        (value == 7).all() or (value == 9).all() for value in model.state().values.values()
    )


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_dense_state_is_trained_densely(name: str) -> None:
    """Against torch's own SGD."""
    build = NETWORKS[name]
    model, plain = opened("dense", build, state_of(build())), build()
    optimizer = torch.optim.SGD(plain.parameters(), **SGD._asdict())
    images, labels = samples(16)
    for some in (slice(0, 8), slice(8, 16)):
        inputs = torch.from_numpy((images[some].astype(np.float32) / 255 - 0.5) / 0.25)
        loss = nn.functional.cross_entropy(plain(inputs), torch.from_numpy(labels[some]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = model.step(images[some], labels[some], sgd=SGD)
        assert found == pytest.approx(loss.item(), rel=1e-5)
    close(model.state().values, state_of(plain).values, rtol=1e-4)
    assert model.state().patterns is None


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_held_is_that_of_its_arrays(name: str, kind: str) -> None:
    """Weights, gradients, momentum, and the patterns where there are any: by hand."""
    build = NETWORKS[name]
    mask, model, _ = pair(name, kind, density=0.1)
    parameters = sum(p.numel() for p in build().parameters())
    rest, active = parameters - mask.num_weights, mask.num_active
    trained = model.state()
    opened_with = model.held_bytes()
    model.step(*samples(8), sgd=SGD)
    held = model.held_bytes()
    assert opened_with < held
    if kind == "dense":
        assert held == 12 * parameters
    elif kind == "masked":
        assert held == 12 * rest + 4 * mask.num_weights + 12 * active
    else:
        patterns = trained.patterns
        assert patterns is not None
        arrays = 12 * (rest + active) + patterns.nbytes()
        assert arrays <= held <= arrays + 3 * patterns.nbytes() + 1024
