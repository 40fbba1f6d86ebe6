"""Clients trained together do what each does alone; memory that ends halves the cohort."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import run_inline, tiny
from fedprune.flower.engine import BatchedGrid

from fedprune.config import RunConfig, TrainingConfig
from fedprune.errors import ConfigError
from fedprune.exchange.messages import State
from fedprune.local.cohort import Member, train_cohort, train_in_cohorts
from fedprune.local.training import GrowthBatch, LocalResult, train_locally
from fedprune.rounds import run as runner
from fedprune.rounds.folder import CHECKPOINT, read_metrics
from prunelab.networks import build_model, float_state, load_float_state_
from sparsemodel.masks.mask import Mask, prunable_parameters
from sparsemodel.storage.checkpoint import load_sparse

SHAPE = (1, 8, 8)
SIZES = (40, 2, 33, 17, 40)  # with batches of 16: 16+16+8, 2, 16+17, 17, 16+16+8


def network(seed: int) -> torch.nn.Module:
    return build_model("resnet8", num_classes=3, input_shape=SHAPE, seed=seed, width=4)


def masks(density: float) -> Mask:
    generator = torch.Generator().manual_seed(5)
    patterns = {
        name: torch.rand(weight.shape, generator=generator) < density
        for name, weight in prunable_parameters(network(0)).items()
    }
    patterns["fc.weight"] = torch.ones_like(patterns["fc.weight"])  # one that is full
    return Mask(patterns)


def members(mask: Mask | None) -> list[Member]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, size in enumerate(SIZES):
        images = torch.randint(0, 256, (size, *SHAPE), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 3, (size,), generator=generator)
        model = network(number)  # every client starts from another place
        growth = None
        if mask is not None and number % 2 == 0:
            counts = {"layer1.0.conv1.weight": 7, "layer3.0.conv2.weight": 20}
            growth = GrowthBatch(counts, torch.randperm(size, generator=generator)[:16])
        made.append(Member(float_state(model), images, labels, seed=number, growth=growth))
    return made


def alone(
    member: Member, mask: Mask | None, config: TrainingConfig, *, augmented: bool
) -> tuple[LocalResult, State]:
    model = network(9)
    load_float_state_(model, member.weights)
    result = train_locally(
        model, member.images, member.labels, mask=mask, config=config, lr=0.02,
        epochs=config.local_epochs, seed=member.seed, augmented=augmented, growth=member.growth,
    )  # fmt: skip
    return result, float_state(model)


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
    cohort = members(mask)
    together = train_cohort(
        network(9), cohort, mask=mask, config=config, lr=0.02, augmented=augmented
    )
    for member, (result, state) in zip(cohort, together, strict=True):
        expected, expected_state = alone(member, mask, config, augmented=augmented)
        assert result.loss == pytest.approx(expected.loss, rel=1e-3)
        assert result.samples_seen == expected.samples_seen == 2 * len(member.labels)
        assert state.keys() == expected_state.keys()
        for name, value in expected_state.items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=2e-4)
        for name in mask or ():
            assert mask is not None
            assert not state[name][~mask[name]].any()
        assert result.growth.keys() == expected.growth.keys()
        for name, (indices, values) in expected.growth.items():
            found, gradients = result.growth[name]
            assert len(found) == len(indices)
            torch.testing.assert_close(
                gradients.abs().sort().values, values.abs().sort().values, rtol=1e-2, atol=1e-3
            )


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_member_holds_is_its_share(count: int) -> None:
    """Weights, dense gradients, momentum of active values; the indices are held once."""
    mask, config = masks(0.1), TrainingConfig(batch_size=16, local_epochs=1)
    results = train_cohort(network(9), members(mask)[:count], mask=mask, config=config, lr=0.1)
    weights = sum(4 * p.numel() for p in network(0).parameters())
    kept = mask.num_active + sum(
        p.numel() for name, p in network(0).named_parameters() if name not in mask
    )
    indices = 8 * (mask.num_active - mask["fc.weight"].numel())
    assert {result.state_bytes for result, _ in results} == {
        2 * weights + 4 * kept + indices // count
    }


@pytest.mark.parametrize("capacity", [1, 2, 3, 5])
def test_a_cohort_that_does_not_fit_is_halved_and_starts_anew(capacity: int) -> None:
    everyone, tried = members(None), []

    def train(cohort: list[Member]) -> list[tuple[LocalResult, State]]:
        tried.append(len(cohort))
        if len(cohort) > capacity:
            raise torch.OutOfMemoryError("no room")
        return [(LocalResult(float(m.seed), 0, 0, {}), m.weights) for m in cohort]

    results, size = train_in_cohorts(train, everyone, size=5)
    assert [result.loss for result, _ in results] == [0, 1, 2, 3, 4]
    assert size <= capacity
    assert tried[0] == 5


def test_a_member_that_does_not_fit_alone_is_an_error() -> None:
    def full(cohort: list[Member]) -> list[tuple[LocalResult, State]]:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        train_in_cohorts(full, members(None), size=4)


@pytest.mark.parametrize(
    "method", ["fedavg", "magnitude", "fedtiny", "fedtiny-vanilla", "fedtiny-fixed", "small-dense"]
)
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
    mine, other = load_sparse(batched / CHECKPOINT), load_sparse(inline / CHECKPOINT)
    assert mine.mask == other.mask
    for name, value in other.state.items():
        torch.testing.assert_close(mine.state[name], value, rtol=2e-2, atol=2e-3)


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
    first, second = (load_sparse(tmp_path / name / CHECKPOINT).state for name in ("one", "two"))
    assert all(torch.equal(first[name], second[name]) for name in first)


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
