"""Clients trained together do what each does alone; memory that ends halves the cohort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import run_inline, tiny
from little_clients import SHAPE, narrow, random_mask, state_of

from fedprune.config import RunConfig, TrainingConfig
from fedprune.errors import ConfigError
from fedprune.exchange.messages import MODEL, Reply
from fedprune.flower.batched import BatchedGrid
from fedprune.local.cohort import Member, train_cohort, train_in_cohorts
from fedprune.local.model import Sgd
from fedprune.local.torch_models import open_torch_model
from fedprune.local.training import train_epochs
from fedprune.methods import METHODS
from fedprune.rounds import run as runner
from fedprune.rounds.folder import CHECKPOINT, read_metrics
from sparsemodel.masks.mask import Mask
from sparsemodel.runtime.state import Entries, SparseState
from sparsemodel.storage.state_file import load_state

SIZES = (40, 2, 33, 17, 40)  # with batches of 16: 16+16+8, 2, 16+17, 17, 16+16+8


def masks(density: float) -> Mask:
    patterns = dict(random_mask(density))
    patterns["fc.weight"] = torch.ones_like(patterns["fc.weight"])  # one that is full
    return Mask(patterns)


def members(mask: Mask | None) -> list[Member]:
    generator = np.random.default_rng(1)  # of images on which no ReLU is at its kink
    made = []
    for number, size in enumerate(SIZES):
        images = generator.integers(0, 256, (size, *SHAPE), dtype=np.uint8)
        labels = generator.integers(0, 3, size)
        state = state_of(narrow(number), mask)  # every client starts from another place
        growth = None
        if mask is not None and number % 2 == 0:
            counts = {"layer1.0.conv1.weight": 7, "layer3.0.conv2.weight": 20}
            growth = (counts, generator.permutation(size)[:16])
        made.append(Member(state, images, labels, seed=number, growth=growth))
    return made


def sgd_of(config: TrainingConfig) -> Sgd:
    return Sgd(0.02, config.momentum, config.weight_decay)


def alone(
    member: Member, config: TrainingConfig, *, augmented: bool
) -> tuple[float, SparseState, Entries]:
    model = open_torch_model(narrow, member.state, config)
    loss = train_epochs(
        model, member.images, member.labels, sgd=sgd_of(config), epochs=config.local_epochs,
        batch_size=config.batch_size, seed=member.seed, augmented=augmented,
    )  # fmt: skip
    state, growth = model.state(), {}
    if member.growth is not None:
        counts, rows = member.growth
        growth = model.growth(counts, member.images[rows], member.labels[rows])
    return loss, state, growth


@pytest.mark.parametrize(
    ("density", "momentum", "decay", "augmented"),
    [(0.2, 0.9, 1e-2, False), (0.2, 0.0, 0.0, True), (None, 0.9, 1e-2, True), (None, 0, 0, False)],
)
def test_each_member_is_trained_as_it_would_be_alone(
    density: float | None, momentum: float, decay: float, augmented: bool
) -> None:
    mask = None if density is None else masks(density)
    config = TrainingConfig(
        batch_size=16, local_epochs=2, momentum=momentum, weight_decay=decay, execution="masked"
    )
    model, cohort = narrow(9), members(mask)
    replies = train_cohort(model, cohort, config=config, sgd=sgd_of(config), augmented=augmented)
    if mask is not None:  # what the model was left with is the last member
        for name, pattern in mask.items():
            assert not model.get_parameter(name).detach()[~pattern].any()
    for member, reply in zip(cohort, replies, strict=True):
        loss, expected, growth = alone(member, config, augmented=augmented)
        assert reply.fields["loss"] == pytest.approx(loss, rel=1e-3)
        assert reply.num_examples == len(member.labels)
        state = reply.states[MODEL]
        assert state.patterns == member.state.patterns
        assert list(state.values) == list(expected.values)
        for name, value in expected.values.items():
            np.testing.assert_allclose(state.values[name], value, rtol=1e-3, atol=2e-4)
        entries = reply.entries.get(MODEL, {})
        assert entries.keys() == growth.keys()
        for name, (indices, values) in growth.items():
            found, gradients = entries[name]
            assert len(found) == len(indices)
            np.testing.assert_allclose(
                np.sort(abs(gradients)), np.sort(abs(values)), rtol=1e-2, atol=1e-3
            )


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_member_holds_is_its_share(count: int) -> None:
    """Weights, dense gradients, momentum of active values; the indices are held once."""
    mask, config = masks(0.1), TrainingConfig(batch_size=16, local_epochs=1)
    asked = [replace(member, report_resources=True) for member in members(mask)[:count]]
    replies = train_cohort(narrow(9), asked, config=config, sgd=sgd_of(config))
    weights = sum(4 * p.numel() for p in narrow().parameters())
    kept = mask.num_active + sum(
        p.numel() for name, p in narrow().named_parameters() if name not in mask
    )
    indices = 8 * (mask.num_active - mask["fc.weight"].numel())
    held = [reply.resources for reply in replies]
    assert all(entry is not None for entry in held)
    assert {entry.state_bytes for entry in held if entry is not None} == {
        2 * weights + 4 * kept + indices // count
    }


def test_members_that_were_not_asked_do_not_say_what_they_hold() -> None:
    config = TrainingConfig(batch_size=16, local_epochs=1)
    (reply,) = train_cohort(narrow(9), members(None)[:1], config=config, sgd=sgd_of(config))
    assert reply.resources is None


def model_of(folder: Path) -> SparseState:
    return load_state(folder / CHECKPOINT)[0]


@pytest.mark.parametrize("capacity", [1, 2, 3, 5])
def test_a_cohort_that_does_not_fit_is_halved_and_starts_anew(capacity: int) -> None:
    everyone, tried = members(None), []

    def train(cohort: Sequence[Member]) -> list[Reply]:
        tried.append(len(cohort))
        if len(cohort) > capacity:
            raise torch.OutOfMemoryError("no room")
        return [Reply(member.seed) for member in cohort]

    results, size = train_in_cohorts(train, everyone, size=5)
    assert [reply.num_examples for reply in results] == [0, 1, 2, 3, 4]
    assert size <= capacity
    assert tried[0] == 5


def test_a_member_that_does_not_fit_alone_is_an_error() -> None:
    def full(cohort: Sequence[Member]) -> list[Reply]:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        train_in_cohorts(full, members(None), size=4)


@pytest.mark.parametrize("method", list(METHODS))
def test_the_batched_engine_gives_the_rounds_of_inline(method: str, tmp_path: Path) -> None:
    """Ragged clients, growth rounds, the same messages."""
    config = tiny(
        method__name=method, training__execution="masked", training__lr=0.02,
        training__rounds=3, training__cohort=3, data__clients=6, data__alpha=0.1,
        data__num_train=90,
    )  # fmt: skip
    inline = run_inline(config, tmp_path / "inline")
    batched = tmp_path / "batched"
    runner.run(config, batched, engine="batched")
    ours, theirs = read_metrics(batched), read_metrics(inline)
    assert [line.get("clients") for line in ours] == [line.get("clients") for line in theirs]
    assert [line["skipped"] for line in ours] == [line["skipped"] for line in theirs]
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        assert mine["test_loss"] == pytest.approx(other["test_loss"], rel=1e-2)
        assert mine["bytes_up"] == pytest.approx(other["bytes_up"], rel=1e-2)
        assert mine["bytes_down"] == pytest.approx(other["bytes_down"], rel=1e-2)
    mine, other = model_of(batched), model_of(inline)
    assert mine.patterns == other.patterns
    for name, value in other.values.items():
        np.testing.assert_allclose(mine.values[name], value, rtol=2e-2, atol=2e-3)


def test_a_client_with_too_few_samples_is_left_out_of_its_cohort(tmp_path: Path) -> None:
    config = tiny(
        method__name="magnitude", training__execution="masked", training__rounds=2,
        data__num_train=30, data__clients=8, data__partition="iid",
    )  # fmt: skip
    runner.run(config, tmp_path / "batched", engine="batched")
    ours = read_metrics(tmp_path / "batched")[1:]
    theirs = read_metrics(run_inline(config, tmp_path / "inline"))[1:]
    assert [line["skipped"] for line in ours] == [line["skipped"] for line in theirs]
    assert [line["clients"] for line in ours] == [line["clients"] for line in theirs]
    assert any("at least 2" in skip["reason"] for line in ours for skip in line["skipped"])


def test_a_second_batched_run_gives_the_same_bits(tmp_path: Path) -> None:
    config = tiny(training__execution="masked", training__rounds=2)
    for name in ("one", "two"):
        runner.run(config, tmp_path / name, engine="batched")
    first, second = (model_of(tmp_path / name).values for name in ("one", "two"))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_waiting_clients_are_taken_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    waiting = BatchedGrid._train_waiting

    def counted(self: BatchedGrid, first: str) -> None:
        before = len(self._messages)
        waiting(self, first)
        sizes.append(before - len(self._messages))

    monkeypatch.setattr(BatchedGrid, "_train_waiting", counted)
    config = tiny(training__execution="masked", training__rounds=2, training__cohort=3)
    runner.run(config, tmp_path / "run", engine="batched")
    assert sizes == [3, 1, 3, 1]


def test_sparse_execution_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--engine inline"):
        runner.run(tiny(training__execution="sparse"), tmp_path / "run", engine="batched")
    assert not (tmp_path / "run").exists()


def test_how_many_train_at_a_time() -> None:
    def cohort(**changes: object) -> int:
        return RunConfig.parse(
            {"data.clients": 10, **{k.replace("__", "."): v for k, v in changes.items()}}
        ).cohort

    assert cohort(training__device="cuda") == 10
    assert cohort(training__device="cuda", federation__clients_per_round=6) == 6
    assert cohort(training__cohort=7) == 7
    assert cohort(training__cohort=30) == 10
    assert 1 <= cohort() <= 10
