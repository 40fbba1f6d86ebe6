"""The trainer against `TrainingPlan`, bit for bit, and against torch in float64."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from little_networks import random_mask
from plan_networks import NETWORKS, network
from programs import SHAPES, described, masked, samples, state_of
from torch import nn
from torch.nn import functional

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.layers.sparsify import densify, sparsify
from sparsemodel.masks.mask import Mask
from sparsemodel.optim import SparseSGD
from sparsemodel.plans.plan import TrainingPlan
from sparsemodel.plans.program import program_of
from sparsemodel.runtime import trainer as trainer_module
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState
from sparsemodel.runtime.structures import Structures
from sparsemodel.runtime.trainer import Trainer

SHAPE = (3, 16, 16)
SGD: dict[str, float] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}

pytestmark = pytest.mark.usefixtures("plans_on_one_thread")


@pytest.fixture(autouse=True)
def _own_structures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "shared_structures", Structures())


def tensors(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(images), torch.from_numpy(labels)


def assert_same_bits(state: SparseState, model: nn.Module) -> None:
    expected = densify(model).state_dict()
    for name, array in state.dense().items():
        assert np.array_equal(array, expected[name].numpy()), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("name", ["resnet8", "resnet18", "pooled"])
def test_all_bits_are_those_of_the_training_plan(
    name: str, bfloat16: bool, recompute: bool
) -> None:
    model, mask = masked(name)
    sparse = sparsify(model, mask)
    plan = TrainingPlan(
        sparse,
        SHAPES[name],
        batch_size=8,
        recompute=recompute,
        activation_dtype=torch.bfloat16 if bfloat16 else torch.float32,
    )
    optimizer = SparseSGD(sparse.parameters(), **SGD)
    trainer = Trainer(
        program_of(model, SHAPES[name]),
        state_of(model, mask),
        batch_size=8,
        recompute=recompute,
        bfloat16=bfloat16,
    )
    counts = {weight: 3 + number for number, weight in enumerate(mask)}
    for step in range(6):
        images, labels = samples(8 if step < 5 else 5, step, SHAPES[name])
        ours = trainer.step(images, labels, **SGD)
        assert ours == plan.step(*tensors(images, labels), optimizer=optimizer)
        if step % 2:
            found = trainer.growth(counts, images, labels)
            expected = plan.topk_pruned_gradients(counts, *tensors(images, labels))
            assert list(found) == list(expected)
            for weight, (indices, values) in found.items():
                assert np.array_equal(indices, expected[weight][0].numpy())
                assert np.array_equal(values, expected[weight][1].numpy())
    assert_same_bits(trainer.state(), sparse)
    images, labels = samples(19, 9, SHAPES[name])
    assert np.array_equal(trainer.forward(images), plan.forward(torch.from_numpy(images)).numpy())
    loss, num_correct = trainer.evaluate(images, labels)
    assert (loss / 19, num_correct) == plan.evaluate(*tensors(images, labels))


@pytest.mark.parametrize("name", SHAPES)
def test_training_is_that_of_the_masked_dense_network(name: str) -> None:
    model, mask = masked(name)
    trainer = Trainer(program_of(model, SHAPES[name]), state_of(model, mask), batch_size=16)
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    for step in range(3):
        images, labels = samples(16, step, SHAPES[name])
        loss, num_correct = trainer.step(images, labels, **SGD)
        logits = model(torch.from_numpy(images).double())
        expected = functional.cross_entropy(logits, torch.from_numpy(labels))
        optimizer.zero_grad()
        expected.backward()
        for weight in mask:
            gradient = model.get_parameter(weight).grad
            assert gradient is not None
            gradient *= mask[weight]
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        assert num_correct == int((logits.argmax(1).numpy() == labels).sum())
    expected_state = model.state_dict()
    for key, array in trainer.state().dense().items():
        np.testing.assert_allclose(array, expected_state[key].numpy(), rtol=1e-4, atol=1e-4)


def test_a_dense_model_is_trained_too() -> None:
    model = network("resnet8")
    program = program_of(model, SHAPE)
    trainer = Trainer(program, state_of(model, None), batch_size=8)
    plan = TrainingPlan(model, SHAPE, batch_size=8)
    optimizer = SparseSGD(model.parameters(), **SGD)
    for step in range(2):
        images, labels = samples(8, step)
        expected = plan.step(*tensors(images, labels), optimizer=optimizer)
        assert trainer.step(images, labels, **SGD) == expected
    assert_same_bits(trainer.state(), model)
    assert trainer.state().patterns is None


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_correction_stands_between_gradients_and_update(momentum: float) -> None:
    """Of nothing it changes no bit; with v it is weight decay."""
    program, state = described("resnet8")
    numbers = {"lr": 0.05, "momentum": momentum}
    trainers = [Trainer(program, state, batch_size=8) for _ in range(4)]
    names = []

    def decay(values: Mapping[str, Any], gradients: Mapping[str, Any]) -> None:
        names.append((list(values), list(gradients)))
        for name, gradient in gradients.items():
            np.add(gradient, np.float32(0.01) * values[name], out=gradient)

    for step in range(3):
        batch = samples(8, step)
        results = {
            trainers[0].step(*batch, **numbers, weight_decay=1e-3),
            trainers[1].step(
                *batch, **numbers, weight_decay=1e-3, correct_gradients=lambda *_: None
            ),
        }
        assert len(results) == 1
        trainers[2].step(*batch, **numbers, weight_decay=0.01)
        trainers[3].step(*batch, **numbers, correct_gradients=decay)
    for name, array in trainers[0].state().values.items():
        assert np.array_equal(array, trainers[1].state().values[name]), name
    for name, array in trainers[2].state().values.items():
        np.testing.assert_allclose(
            array, trainers[3].state().values[name], rtol=1e-4, atol=1e-5, err_msg=name
        )
    parameters = [n for n in state.values if not n.endswith(("running_mean", "running_var"))]
    assert sorted(names[0][0]) == sorted(names[0][1]) == sorted(parameters)


def exact_statistics(
    model: nn.Module, images: np.ndarray, batch_size: int
) -> dict[str, np.ndarray]:
    """By hooks on the batch norms of the model in float64, all their inputs put together."""
    model = copy.deepcopy(model).double().train()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in norms}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(
                inputs[0].detach().movedim(1, 0).flatten(1)
            )
        )
    for batch in torch.from_numpy(images).double().split(batch_size):
        model(batch)
    found = {}
    for name, pieces in seen.items():
        whole = torch.cat(pieces, 1)
        found[f"{name}.running_mean"] = whole.mean(1).numpy()
        found[f"{name}.running_var"] = whole.var(1, correction=0).numpy()
    return found


@pytest.mark.parametrize("size", [7, 8, 21])
@pytest.mark.parametrize("name", SHAPES)
def test_batch_norm_statistics_are_those_of_all_samples(name: str, size: int) -> None:
    model, mask = masked(name)
    state = state_of(model, mask)
    trainer = Trainer(program_of(model, SHAPES[name]), state, batch_size=8)
    images, _ = samples(size, 3, SHAPES[name])
    found = trainer.batch_norm_statistics(images)
    expected = exact_statistics(model, images, 8)
    assert found.keys() == expected.keys()
    for key, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected[key], rtol=1e-5, atol=1e-5, err_msg=key)
    for key, array in trainer.state().values.items():
        assert np.array_equal(array, state.values[key]), key


def test_statistics_and_evaluation_make_nothing_for_training() -> None:
    """Their arena is the smaller one, and training bits are the same after them."""
    program, state = described("resnet18")
    trainer, other = (Trainer(program, state, batch_size=16) for _ in range(2))
    images, labels = samples(16)
    trainer.batch_norm_statistics(images)
    trainer.evaluate(images, labels)
    held = trainer.held_bytes()
    assert held["gradients"] == held["momentum"] == held["index"] == 0
    assert 0 < held["arena"] < trainer.arena_bytes() / 2
    for one in (trainer, other):
        one.step(images, labels, **SGD)
    for key, array in trainer.state().values.items():
        assert np.array_equal(array, other.state().values[key]), key
    statistics = [one.batch_norm_statistics(images) for one in (trainer, other)]
    assert all(np.array_equal(a, statistics[1][key]) for key, a in statistics[0].items())


def test_one_value_a_channel_has_no_variance() -> None:
    """In the last stage of planes of 8 x 8 there is one pixel: as in torch, an error."""
    model, mask = masked("resnet18")
    trainer = Trainer(program_of(model, (3, 8, 8)), state_of(model, mask), batch_size=4)
    images, labels = samples(5, shape=(3, 8, 8))
    trainer.batch_norm_statistics(images)  # of five in batches of four: three and two
    with pytest.raises(SparseModelError, match="no variance"):
        trainer.batch_norm_statistics(images[:1])
    with pytest.raises(SparseModelError, match="no variance"):
        trainer.step(images[:1], labels[:1], lr=0.1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        exact_statistics(model, images, 4)
    loss, num_correct = trainer.evaluate(images[:1], labels[:1])  # by running statistics
    logits = model.double().eval()(torch.from_numpy(images[:1]).double())
    expected = functional.cross_entropy(logits, torch.from_numpy(labels[:1])).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert num_correct == int(logits.argmax(1).item() == labels[0])


def test_a_mean_over_all_batches_is_counted() -> None:
    """momentum=None: after two batches the mean of both, after three of all; a load keeps count."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 5))
    program = program_of(model, (4,))
    trainer = Trainer(program, state_of(model, None), batch_size=8)
    for step in range(3):
        images, labels = samples(8, step, (4,))
        model(torch.from_numpy(images))
        if step == 2:
            trainer.load(trainer.state())
        trainer.step(images, labels, lr=0.0)
    values = trainer.state().values
    for name in ("running_mean", "running_var"):
        expected = model[1].get_buffer(name).numpy()
        np.testing.assert_allclose(values[f"1.{name}"], expected, rtol=1e-5, atol=1e-6)


def test_the_number_of_threads_changes_no_bit() -> None:
    program, state = described("resnet18")
    results = []
    for threads in (1, 3):
        trainer = Trainer(program, state, batch_size=64, threads=threads)
        images, labels = samples(64)
        loss = trainer.step(images, labels, **SGD)
        statistics = trainer.batch_norm_statistics(images)
        results.append((loss, trainer.forward(images), trainer.state().values, statistics))
    assert results[0][0] == results[1][0]
    assert np.array_equal(results[0][1], results[1][1])
    for a, b in zip(results[0][2:], results[1][2:], strict=True):
        assert all(np.array_equal(value, b[key]) for key, value in a.items())


def test_bytes_are_normalised_pixels() -> None:
    program, state = described("resnet8")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    trainer = Trainer(program, state, batch_size=8, normalization=(mean, std))
    pixels = np.random.default_rng(0).integers(0, 256, (9, *SHAPE), dtype=np.uint8)
    columns = [np.array(numbers, np.float32).reshape(3, 1, 1) for numbers in (mean, std)]
    floats = (pixels / np.float32(255) - columns[0]) / columns[1]
    np.testing.assert_allclose(
        trainer.forward(pixels), trainer.forward(floats), rtol=1e-4, atol=1e-5
    )


def test_layouts_of_images_do_not_matter() -> None:
    program, state = described("resnet8")
    trainer = Trainer(program, state, batch_size=4)
    images, labels = samples(8)
    strided = np.repeat(images, 2, axis=0)[::2]
    assert np.array_equal(trainer.forward(images), trainer.forward(strided))
    assert trainer.evaluate(images, labels) == trainer.evaluate(strided, np.repeat(labels, 2)[::2])


def other_state(state: SparseState, seed: int = 5) -> SparseState:
    """The same model under a random mask of its own, values doubled."""
    model, _ = masked("resnet8")
    patterns = random_mask(model, 0.15, seed)
    assert state.patterns is not None
    mask = Mask({name: patterns[name] for name in state.patterns})
    new = state_of(model, mask)
    return SparseState({n: 2 * a for n, a in new.values.items()}, new.patterns)


def test_loading_under_the_same_patterns_keeps_momentum() -> None:
    program, state = described("resnet8")
    trainer, fresh = (Trainer(program, state, batch_size=8) for _ in range(2))
    batch = samples(8)
    trainer.step(*batch, **SGD)
    before = trainer.held_bytes()
    trainer.load(state)
    assert trainer.held_bytes() == before
    for name, array in trainer.state().values.items():
        assert np.array_equal(array, state.values[name])
    trainer.reset_momentum()
    assert trainer.step(*batch, **SGD) == fresh.step(*batch, **SGD)
    for one in (trainer, fresh):
        one.load(state)
    trainer.reset_momentum()
    losses = [one.step(*samples(8, 1), **SGD) for one in (trainer, fresh)]
    assert losses[0] == losses[1]
    values = [one.state().values["conv1.weight"] for one in (trainer, fresh)]
    assert not np.array_equal(*values)  # momentum of the first step is in the second one's


def test_loading_under_other_patterns_is_a_new_trainer() -> None:
    program, state = described("resnet8")
    trainer = Trainer(program, state, batch_size=8)
    batch = samples(8)
    trainer.step(*batch, **SGD)
    changed = other_state(state)
    trainer.load(changed)
    assert trainer.held_bytes()["momentum"] == 0
    fresh = Trainer(program, changed, batch_size=8)
    for step in range(2):
        batch = samples(8, step)
        assert trainer.step(*batch, **SGD) == fresh.step(*batch, **SGD)
    assert trainer.state().patterns == changed.patterns
    for name, array in trainer.state().values.items():
        assert np.array_equal(array, fresh.state().values[name]), name
    counts = dict.fromkeys(changed.patterns or (), 4)
    for name, (indices, _) in trainer.growth(counts, *batch).items():
        assert changed.patterns is not None
        assert len(indices) == 4
        assert not np.isin(indices, changed.patterns[name].positions()).any()


def test_candidates_are_bound_to_one_plan_and_give_what_new_trainers_give() -> None:
    """Forward passes of one mask after the other, then a step and growth: the arena stays."""
    program, state = described("resnet8")
    trainer = Trainer(program, state, batch_size=8)
    images, labels = samples(8)
    trainer.evaluate(images, labels)
    arena = trainer.held_bytes()["arena"]
    for candidate in (other_state(state, 6), other_state(state, 7), state):
        trainer.load(candidate)
        assert trainer.held_bytes()["arena"] == arena
        fresh = Trainer(program, candidate, batch_size=8)
        assert trainer.evaluate(images, labels) == fresh.evaluate(images, labels)
        statistics = trainer.batch_norm_statistics(images)
        for name, array in fresh.batch_norm_statistics(images).items():
            assert np.array_equal(array, statistics[name])
        arena = trainer.held_bytes()["arena"]
    counts = dict.fromkeys(state.patterns or (), 4)
    grown, expected = (one.growth(counts, images, labels) for one in (trainer, fresh))
    for name, (indices, gradients) in expected.items():
        assert np.array_equal(grown[name][0], indices)
        assert np.array_equal(grown[name][1], gradients)
    assert trainer.step(images, labels, **SGD) == fresh.step(images, labels, **SGD)


def test_a_state_is_a_copy() -> None:
    program, state = described("resnet8")
    trainer = Trainer(program, state, batch_size=8)
    before = trainer.state()
    kept = {name: array.copy() for name, array in state.values.items()}
    trainer.step(*samples(8), **SGD)
    for name, array in kept.items():
        assert np.array_equal(state.values[name], array)
        assert np.array_equal(before.values[name], array)
    assert list(before.values) == list(program.shapes())


def test_held_bytes_are_those_of_the_arrays() -> None:
    program, state = described("resnet8")
    assert state.patterns is not None
    trainer = Trainer(program, state, batch_size=8)
    values = sum(array.nbytes for array in state.values.values())
    trained = sum(a.nbytes for n, a in state.values.items() if not n.endswith(("_mean", "_var")))
    full = [program.shapes()[n] for n in program.layers() if n not in state.patterns]
    patterns = state.patterns.nbytes() + sum(Pattern.full(shape).nbytes() for shape in full)
    held = trainer.held_bytes()
    assert held == {
        **{"values": values, "gradients": 0, "momentum": 0},
        **{"patterns": patterns, "index": 0, "arena": 0},
    }
    trainer.step(*samples(8), lr=0.1)
    held = trainer.held_bytes()
    assert (held["gradients"], held["momentum"]) == (trained, 0)
    assert held["arena"] - trainer.arena_bytes() in range(4097)
    index = 0  # two numbers an entry, and where each row begins
    for name, number in program.layers().items():
        (_, width, *_), node = program.shapes()[name], program.nodes[number]
        nnz = state.patterns[name].num_active if name in state.patterns else 0
        nnz = nnz or int(np.prod(program.shapes()[name]))
        index += 4 * (2 * nnz + width * node.groups * node.stride[0] * node.stride[1] + 1)
    assert held["index"] == index
    trainer.step(*samples(8), **SGD)
    assert trainer.held_bytes()["momentum"] == trained
    trainer.release()
    held = trainer.held_bytes()
    assert (held["gradients"], held["momentum"], held["arena"]) == (0, trained, 0)
    twin = Trainer(program, trainer.state(), batch_size=8)
    assert trainer.evaluate(*samples(8)) == twin.evaluate(*samples(8))
    trainer.step(*samples(8), **SGD)


def test_equal_patterns_are_held_once() -> None:
    program, state = described("resnet8")
    assert state.patterns is not None
    again = Patterns(
        {n: Pattern(p.shape, p.row_ptr.copy(), p.cols.copy()) for n, p in state.patterns.items()}
    )
    trainers = [Trainer(program, SparseState(state.values, p), batch_size=8)
                for p in (state.patterns, again)]  # fmt: skip
    trainers[0].step(*samples(8), lr=0.1)
    assert trainers[1].held_bytes()["index"] == trainers[0].held_bytes()["index"] > 0


def test_release_gives_scratch_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    program, state = described("resnet8")
    trainer = Trainer(program, state, batch_size=8)
    library, calls = cpu.library(), []
    assert library is not None
    monkeypatch.setattr(library, "release_scratch", lambda: calls.append(1), raising=False)
    trainer.release()
    assert calls == [1]


def test_growth_of_what_is_not_under_a_pattern_is_refused() -> None:
    program, state = described("resnet8")
    trainer = Trainer(program, state, batch_size=8)
    with pytest.raises(MaskError, match=r"no layer 'conv1\.weight' under a pattern"):
        trainer.growth({"conv1.weight": 3}, *samples(8))
    assert state.patterns is not None
    name = next(iter(state.patterns))
    with pytest.raises(MaskError, match="count >= 0, got -1"):
        trainer.growth({name: -1}, *samples(8))
    assert trainer.growth({}, *samples(8)) == {}
    images, labels = samples(8)
    images[3, 1, 2, 2] = np.nan
    with pytest.raises(MaskError, match="is NaN"):
        trainer.growth(dict.fromkeys(state.patterns, 5), images, labels)


ZEROS = np.zeros((2, *SHAPE), np.float32)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((9, *SHAPE), np.float32), np.zeros(9, np.int64), "at most 8"),
        (np.zeros((2, 3, 16, 9), np.float32), np.zeros(2, np.int64), r"\[B, \*\(3, 16, 16\)\]"),
        (ZEROS[:0], np.zeros(0, np.int64), r"\[B, \*\(3, 16, 16\)\]"),
        (ZEROS.astype(np.float64), np.zeros(2, np.int64), "float64"),
        (ZEROS.astype(">f4"), np.zeros(2, np.int64), "float32, got >f4"),
        (ZEROS.astype(np.uint8), np.zeros(2, np.int64), "normalization"),
        (ZEROS.tolist(), np.zeros(2, np.int64), "got list"),
        (ZEROS, np.zeros(3, np.int64), r"int64 \[2\]"),
        (ZEROS, np.zeros(2, np.int32), "int32"),
        (ZEROS, [0, 1], "got list"),
        (ZEROS, np.array([0, 5]), "label 5 of sample 1"),
        (ZEROS, np.array([-1, 0]), "label -1 of sample 0"),
    ],
)
def test_what_a_step_refuses_changes_nothing(images: Any, labels: Any, message: str) -> None:
    program, state = described("resnet8")
    trainer = Trainer(program, state, batch_size=8)
    with pytest.raises(SparseModelError, match=message):
        trainer.step(images, labels, lr=0.1)
    if "at most" not in message:
        with pytest.raises(SparseModelError, match=message):
            trainer.evaluate(images, labels)
    for name, array in trainer.state().values.items():
        assert np.array_equal(array, state.values[name])


@pytest.mark.parametrize(
    "numbers",
    [{"lr": -0.1}, {"lr": float("nan")}, {"lr": 0.1, "momentum": 1.0},
     {"lr": 0.1, "weight_decay": -1.0}],
)  # fmt: skip
def test_numbers_outside_their_range_are_refused(numbers: dict[str, float]) -> None:
    program, state = described("resnet8")
    with pytest.raises(SparseModelError, match="expected lr >= 0"):
        Trainer(program, state, batch_size=8).step(*samples(8), **numbers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size"),
        ({"batch_size": 2**32 + 1}, "batch size"),
        ({"batch_size": 4, "threads": 0}, "threads"),
        ({"batch_size": 4, "normalization": ((0.5,), (0.5,))}, "3 channels"),
        ({"batch_size": 4, "normalization": ((0.5,) * 3, (0.0,) * 3)}, "positive std"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    program, state = described("resnet8")
    with pytest.raises(SparseModelError, match=message):
        Trainer(program, state, **options)


def test_states_that_do_not_fit_are_refused_and_change_nothing() -> None:
    program, state = described("resnet8")
    trainer = Trainer(program, state, batch_size=8)
    values, patterns = dict(state.values), state.patterns
    assert patterns is not None
    name = next(iter(patterns))
    less = {n: a for n, a in values.items() if n != "fc.bias"}
    wrong: list[tuple[SparseState, type[Exception], str]] = [
        (SparseState(less, patterns), SparseModelError, r"lacks \['fc.bias'\]"),
        (SparseState({**values, "x": values["fc.bias"]}, patterns), SparseModelError, r"'x'"),
        (state.replace({name: values[name][1:]}), SparseModelError, "expected float32 of shape"),
        (state.replace({name: values[name].astype(float)}), SparseModelError, "float64"),
        (SparseState(values, None), SparseModelError, "expected float32 of shape"),
        (
            SparseState(values, Patterns({"bn1.weight": Pattern.full((8,))})),
            MaskError, "'bn1.weight' has shape",
        ),
        (SparseState(values, Patterns({"x": Pattern.full((8,))})), MaskError, "'x' has shape"),
    ]  # fmt: skip
    for bad, kind, message in wrong:
        with pytest.raises(kind, match=message):
            trainer.load(bad)
        for key, array in trainer.state().values.items():
            assert np.array_equal(array, state.values[key])
    trainer.step(*samples(8), lr=0.1)


def test_damaged_patterns_are_refused() -> None:
    """The native library cannot see how long arrays are: all is checked before it reads them."""
    program, state = described("resnet8")
    assert state.patterns is not None
    name = next(iter(state.patterns))
    good = state.patterns[name]
    shape, rows, cols = good.shape, good.row_ptr, good.cols
    unsorted, far, falling = cols.copy(), cols.copy(), rows.copy()
    unsorted[[0, 1]] = unsorted[[1, 0]]
    far[-1] = 10**6
    falling[2] = falling[1] - 1
    damaged = {
        "contiguous int32 cols": Pattern(shape, rows, cols.astype(np.int64)),
        "contiguous int32 row_ptr": Pattern(shape, np.repeat(rows, 2)[::2], cols),
        "do not fit shape": Pattern(shape, rows[:-1], cols),
        "and .* cols do not fit": Pattern(shape, rows, cols[:-1]),
        "rising columns": Pattern(shape, rows, unsorted),
        "column 1000000": Pattern(shape, rows, far),
        "row_ptr falls": Pattern(shape, falling, cols),
    }
    for message, pattern in damaged.items():
        patterns = Patterns({**state.patterns, name: pattern})
        with pytest.raises(MaskError, match=message):
            Trainer(program, SparseState(state.values, patterns), batch_size=8)


def test_seconds_name_the_operations() -> None:
    program, state = described("resnet8")
    trainer = Trainer(program, state, batch_size=8)
    trainer.step(*samples(8), lr=0.1)
    timed = trainer.seconds()
    assert [one.kind for one in timed] == [node.kind for node in program.nodes]
    assert sum(one.forward + one.backward for one in timed) > 0


def test_a_parsed_program_trains_as_its_original() -> None:
    for name in NETWORKS:
        program, state = described(name)
        trainers = [
            Trainer(p, state, batch_size=8) for p in (program, Program.parse(program.text()))
        ]
        losses = [one.step(*samples(8), lr=0.1) for one in trainers]
        assert losses[0] == losses[1]
