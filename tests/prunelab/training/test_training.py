"""Training: its updates, schedule, rows, resume to the same bits, sparse models and refusals."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from datapruning.scoring.proxy import sparse_proxy
from prunelab.data.batches import batches, num_batches
from prunelab.data.samples import ImageSamples, TokenSamples
from prunelab.data.tensors import augmented, prepare
from prunelab.errors import RunError
from prunelab.networks import build_model
from prunelab.runs.seeds import rng
from prunelab.training.loop import (
    Evaluation,
    TrainingConfig,
    TrainingResult,
    epoch_rates,
    evaluate,
    predict,
    train,
)
from prunelab.training.task import CausalLM, ImageClassification, Task
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.layers.sparsify import densify, mask_of, sparsify
from sparsemodel.masks.mask import Mask
from sparsemodel.plans.plan import TrainingPlan
from sparsemodel.storage.sealed import BLANK, seal

TASK = ImageClassification()


def image_samples(num: int = 40, *, seed: int = 0) -> ImageSamples:
    """uint8 images of 1×8×8 whose class, of three, brightens one band of rows."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num,), generator=random)
    images = torch.randint(0, 120, (num, 1, 8, 8), generator=random)
    for band in range(3):
        images[labels == band, :, 2 * band : 2 * band + 2] += 120
    return ImageSamples(images.to(torch.uint8), labels)


def small_model(*, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(128, 3),
        )


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(v, w) for (x, v), (y, w) in pairs)


class Watcher:
    """Notes what a callback is told; stops the run after one epoch if asked to."""

    def __init__(self, *, die_at: int | None = None) -> None:
        self.die_at = die_at
        self.batches: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.epochs: list[int] = []

    def on_batch(self, epoch: int, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.batches.append((epoch, rows, logits, labels))

    def on_epoch(self, epoch: int, model: nn.Module) -> None:
        self.epochs.append(epoch)
        model.eval()  # which the next epoch has to undo
        if epoch == self.die_at:
            raise KeyboardInterrupt

    def rows_of(self, epoch: int) -> Tensor:
        return torch.cat([rows for number, rows, _, _ in self.batches if number == epoch])


class Counter(Watcher):
    """A callback with a state: how many samples it saw."""

    def __init__(self, *, die_at: int | None = None) -> None:
        super().__init__(die_at=die_at)
        self.seen = 0

    def on_batch(self, epoch: int, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.seen += len(rows)

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def plain_loop(
    model: nn.Module, samples: ImageSamples, *, config: TrainingConfig, seed: int, rows: Tensor
) -> None:
    """The same training by torch.optim and nothing else; whole epochs, no dropout."""
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(
            model.parameters(), config.lr, weight_decay=config.weight_decay
        )
    model.train()
    step, num_batches = 0, -(-len(rows) // config.batch_size)
    for epoch in range(config.epochs):
        random = rng(seed, 0, epoch)
        for part in batches(len(rows), batch_size=config.batch_size, rng=random):
            chosen = rows[torch.from_numpy(part)]
            images = samples.images[chosen]
            if config.augment:
                images = augmented(images, rng=random)
            share = step / (num_batches * config.epochs)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * (1 + math.cos(math.pi * share)) / 2
            optimizer.zero_grad()
            functional.cross_entropy(model(prepare(images)), samples.labels[chosen]).backward()
            optimizer.step()
            step += 1


@pytest.mark.parametrize(
    "config",
    [
        TrainingConfig(epochs=3, batch_size=8, lr=0.05),
        TrainingConfig(epochs=2, batch_size=16, lr=0.05, momentum=0, weight_decay=0, augment=True),
        TrainingConfig(epochs=2, batch_size=8, lr=0.01, optimizer="adamw", weight_decay=0.1),
    ],
    ids=["sgd", "augmented", "adamw"],
)
def test_equals_a_plain_loop(config: TrainingConfig) -> None:
    samples, rows = image_samples(), torch.arange(0, 40, 2)
    model, expected = small_model(), small_model()
    train(model, samples, TASK, config=config, seed=5, rows=rows)
    plain_loop(expected, samples, config=config, seed=5, rows=rows)
    for (name, value), other in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=name)


def test_learns_and_evaluates() -> None:
    """evaluate() is the share of right answers and the mean cross-entropy, in eval mode."""
    samples, held_out = image_samples(120), image_samples(300, seed=1)
    model = small_model()
    result = train(model, samples, TASK, config=TrainingConfig(epochs=8, lr=0.05), seed=0)
    assert result.losses[-1] < 0.5 * result.losses[0]
    found = evaluate(model, held_out, TASK)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = model(prepare(held_out.images))
    right = (logits.argmax(1) == held_out.labels).float().mean()
    assert found.accuracy == pytest.approx(float(right))
    assert found.accuracy > 0.95
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits, held_out.labels)))
    part = torch.tensor([7, 3])
    predicted, labels = predict(model, held_out, TASK, rows=part)
    torch.testing.assert_close(predicted, logits[part])
    assert torch.equal(labels, held_out.labels[part])


def test_same_seed_same_bits_and_the_global_generator_is_left_alone() -> None:
    config = TrainingConfig(epochs=2, batch_size=8, lr=0.05, augment=True)
    trained = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        model = small_model(dropout=0.5)
        train(model, image_samples(), TASK, config=config, seed=3)
        assert torch.equal(torch.get_rng_state(), before)
        trained.append(model)
    assert same_bits(*trained)
    other = small_model(dropout=0.5)
    train(other, image_samples(), TASK, config=config, seed=4)
    assert not same_bits(trained[0], other)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("limit", [{"epochs": 4}, {"steps": 17}])
def test_resumes_to_the_same_bits(
    tmp_path: Path, optimizer: str, sparse: bool, limit: dict[str, int]
) -> None:
    """Cut off after epoch 1 and resumed by other objects: parameters, losses and callbacks."""
    config = TrainingConfig(batch_size=8, lr=0.02, augment=True, optimizer=optimizer, **limit)
    samples, file = image_samples(), tmp_path / "run" / "checkpoint.pt"

    def fresh() -> nn.Module:
        model = small_model(dropout=0.3)
        return sparse_proxy(model, samples, TASK, density=0.3) if sparse else model

    def run(model: nn.Module, counter: Counter, checkpoint: Path | None) -> TrainingResult:
        return train(
            model, samples, TASK,
            config=config, seed=3, rows=torch.arange(37), callbacks=[counter],
            checkpoint=checkpoint,
        )  # fmt: skip

    expected, counted = fresh(), Counter()
    result = run(expected, counted, None)
    with pytest.raises(KeyboardInterrupt):
        run(fresh(), Counter(die_at=2), file)
    model, counter = fresh(), Counter()
    assert run(model, counter, file) == result
    assert same_bits(model, expected)
    assert counter.seen == counted.seen == result.samples_seen
    assert counter.epochs == list(range(2, result.epochs))
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    # A finished run has nothing to do but to load its end.
    done, silent = fresh(), Counter()
    assert run(done, silent, file) == result
    assert same_bits(done, expected)
    assert silent.epochs == []


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    file, samples = tmp_path / "checkpoint.pt", image_samples()
    config = TrainingConfig(epochs=1, batch_size=8, lr=0.02)

    def run(**changed: Any) -> None:
        arguments = {"config": config, "seed": 0, "rows": torch.arange(20)} | changed
        used = arguments.pop("samples", samples)
        train(arguments.pop("model", small_model()), used, TASK, checkpoint=file, **arguments)

    run()
    before = file.read_bytes()
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    for changed, what in (
        ({"seed": 1}, "seed is 1, the checkpoint's 0"),
        ({"rows": torch.arange(21)}, "rows is"),
        ({"rows": None}, "rows is 'all'"),
        ({"config": TrainingConfig(epochs=2, batch_size=8, lr=0.02)}, "training.epochs is 2"),
        ({"samples": image_samples(seed=1)}, "data is"),
        ({"model": narrow}, "parameters is"),
        ({"callbacks": [Watcher()]}, "written with 0 callbacks, this run has 1"),
    ):
        with pytest.raises(RunError, match=what):
            run(**changed)
    assert file.read_bytes() == before
    file.write_bytes(before[: len(before) // 2])
    with pytest.raises(RunError, match=r"checkpoint\.pt: damaged.* delete it to start anew"):
        run()


def test_every_kind_of_checkpoint_belongs_to_one_run(tmp_path: Path) -> None:
    """Another teacher, say, changes neither data nor settings."""
    file, config = tmp_path / "checkpoint.pt", TrainingConfig(epochs=1, batch_size=8, lr=0.02)
    for run in ("one", "other"):
        with nullcontext() if run == "one" else pytest.raises(RunError, match="run is 'other'"):
            train(
                small_model(), image_samples(), TASK, config=config, seed=0, checkpoint=file,
                run=run,
            )  # fmt: skip


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return print, ("run",)

    file = tmp_path / "checkpoint.pt"
    content = io.BytesIO()
    torch.save({"version": 3, "signature": {}, "state": Hostile()}, content)
    file.write_bytes(seal(f"checkpoint {BLANK}\n".encode() + content.getvalue(), "checkpoint"))
    with pytest.raises(RunError, match="not a readable checkpoint"):
        train(
            small_model(), image_samples(), TASK,
            config=TrainingConfig(epochs=1), seed=0, checkpoint=file,
        )  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(1, 25))
def test_steps_are_exact(num_rows: int, batch_size: int, steps: int) -> None:
    """As many steps as asked for, over shuffles of the rows, the last of which may be cut."""
    rows = torch.arange(40 - num_rows, 40)
    watcher = Watcher()
    config = TrainingConfig(steps=steps, batch_size=batch_size, lr=0.01)
    result = train(
        small_model(), image_samples(), TASK, config=config, seed=0, rows=rows, callbacks=[watcher]
    )
    assert result.steps == len(watcher.batches) == steps
    assert result.samples_seen == sum(len(batch[1]) for batch in watcher.batches)
    for epoch in range(result.epochs):
        seen = watcher.rows_of(epoch).tolist()
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(rows.tolist())
        assert len(seen) == num_rows or epoch == result.epochs - 1


@pytest.mark.parametrize("limit", [{"epochs": 2}, {"steps": 4}])
def test_the_learning_rate_is_half_a_cosine(limit: dict[str, int]) -> None:
    """A loss of slope 1 shows it: of 4 steps 1, .854, .5, .146 times lr."""
    layer = nn.Linear(64, 3, bias=False)
    weights: list[float] = []

    class Weights(Watcher):
        def on_batch(self, epoch: int, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
            weights.append(float(layer.weight.detach()[0, 0]))

    train(
        nn.Sequential(nn.Flatten(), layer),
        image_samples(),
        TASK,
        config=TrainingConfig(batch_size=8, lr=1.0, momentum=0, weight_decay=0, **limit),
        seed=0,
        rows=torch.arange(16),
        objective=lambda logits, batch, rows: layer.weight.sum(),
        callbacks=[Weights()],
    )
    weights.append(float(layer.weight.detach()[0, 0]))
    rates = [before - after for before, after in pairwise(weights)]
    expected = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx(expected, abs=1e-6)
    means = [(rates[0] + rates[1]) / 2, (rates[2] + rates[3]) / 2]
    config = TrainingConfig(batch_size=8, lr=1.0, **limit)
    assert epoch_rates(config, 16) == pytest.approx(means, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 8, 9, 16, 17, 25, 40])
def test_mean_rates_count_the_batches_that_there_are(size: int) -> None:
    """A last batch of one joins the one before; a last epoch may be cut short."""
    count = len(list(batches(size, batch_size=8, rng=rng(0))))
    assert num_batches(size, batch_size=8) == count
    whole = epoch_rates(TrainingConfig(epochs=3, batch_size=8, lr=1.0), size)
    steps = [(1 + math.cos(math.pi * step / (3 * count))) / 2 for step in range(3 * count)]
    assert sum(whole) / 3 == pytest.approx(sum(steps) / len(steps))
    cut = epoch_rates(TrainingConfig(steps=2 * count + 1, batch_size=8, lr=1.0), size)
    assert len(cut) == (3 if count > 1 else 3 * count)


def test_rows_by_epoch() -> None:
    watcher = Watcher()

    def rows(epoch: int) -> Tensor:
        return torch.arange(10 * epoch, 10 * epoch + 5 + epoch)

    config = TrainingConfig(epochs=3, batch_size=4, lr=0.01)
    result = train(
        small_model(), image_samples(), TASK, config=config, seed=0, rows=rows, callbacks=[watcher]
    )
    for epoch in range(3):
        assert watcher.rows_of(epoch).sort().values.tolist() == rows(epoch).tolist()
    assert result.samples_seen == 5 + 6 + 7
    assert watcher.epochs == [0, 1, 2]


def test_callbacks_see_the_logits_that_were_trained_on() -> None:
    """Before the first step those of the untouched model, in train mode; labels beside."""
    samples, model, watcher = image_samples(), small_model(), Watcher()
    untouched = copy.deepcopy(model)
    config = TrainingConfig(epochs=2, batch_size=8, lr=0.1)
    train(model, samples, TASK, config=config, seed=0, callbacks=[watcher])
    _, rows, logits, labels = watcher.batches[0]
    assert not logits.requires_grad
    torch.testing.assert_close(logits, untouched.train()(prepare(samples.images[rows])).detach())
    assert torch.equal(labels, samples.labels[rows])
    assert model.training  # although the callback left it in eval mode


def test_objective_gets_logits_batch_and_rows() -> None:
    """Halving the loss is halving the learning rate of plain SGD."""
    samples, halved = image_samples(), small_model()

    def half(logits: Tensor, batch: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        assert torch.equal(batch[1], samples.labels[rows])
        return functional.cross_entropy(logits, batch[1]) / 2

    settings_ = {"epochs": 2, "batch_size": 8, "momentum": 0.0, "weight_decay": 0.0}
    config = TrainingConfig(lr=0.1, **settings_)  # type: ignore[arg-type]
    result = train(halved, samples, TASK, config=config, seed=0, objective=half)
    expected = small_model()
    config = TrainingConfig(lr=0.05, **settings_)  # type: ignore[arg-type]
    whole = train(expected, samples, TASK, config=config, seed=0)
    for value, other in zip(halved.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
    assert result.losses == pytest.approx([loss / 2 for loss in whole.losses], rel=1e-4)


def test_a_task_with_its_own_loss_costs_one_forward_pass() -> None:
    class Scaled(ImageClassification):
        calls = 0

        def logits(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            Scaled.calls += 1
            return super().logits(model, batch)

        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return 0 * super().loss(model, batch) + 7

    watcher = Watcher()
    config = TrainingConfig(epochs=1, batch_size=8, lr=0.1)
    result = train(small_model(), image_samples(), Scaled(), config=config, seed=0,
                   callbacks=[watcher])  # fmt: skip
    assert result.losses == (7.0,)
    assert Scaled.calls == len(watcher.batches) == result.steps


def test_sparse_models_stay_sparse_and_follow_the_dense_masked_one() -> None:
    """Sparse training equals dense training with masked weights and masked gradients."""
    samples, model = image_samples(), small_model()
    pattern = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    mask = Mask({"3.weight": pattern})
    mask.apply(model)
    sparse, config = sparsify(model, mask), TrainingConfig(epochs=2, batch_size=8, lr=0.05)
    train(sparse, samples, TASK, config=config, seed=0)
    assert mask_of(sparse) == mask

    model[3].weight.register_hook(lambda grad: grad * pattern)  # type: ignore[index, union-attr]
    train(model, samples, TASK, config=config, seed=0)
    for value, other in zip(
        densify(sparse).state_dict().values(), model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4)


def test_a_plan_takes_the_same_steps_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse network that plans know: by modules if a callback sees batches, else by a plan."""
    if cpu.library() is None:
        pytest.skip("no native kernels here")
    samples, file = image_samples(), tmp_path / "checkpoint.pt"
    config = TrainingConfig(epochs=3, batch_size=13, lr=0.05)  # 40 samples: 13, 13, 14

    class Epochs:
        """Sees epochs alone, and keeps the model of each."""

        def __init__(self) -> None:
            self.kept: list[dict[str, Tensor]] = []

        def on_epoch(self, epoch: int, model: nn.Module) -> None:
            self.kept.append({name: value.clone() for name, value in model.state_dict().items()})

    def run(callbacks: list[Any], checkpoint: Path | None = None) -> nn.Module:
        model = build_model("resnet8", num_classes=3, input_shape=(1, 8, 8), seed=0, width=4)
        model = sparse_proxy(model, samples, TASK, density=0.3)
        train(model, samples, TASK, config=config, seed=0, callbacks=callbacks,
              checkpoint=checkpoint)  # fmt: skip
        return model

    by_modules = run([Watcher()])
    taken = Counter()
    step = TrainingPlan.step

    def counting(*arguments: Any, **keywords: Any) -> tuple[float, int]:
        taken.seen += 1
        if taken.seen == taken.die_at:
            raise KeyboardInterrupt
        return step(*arguments, **keywords)

    monkeypatch.setattr(TrainingPlan, "step", counting)
    epochs = Epochs()
    by_plan = run([epochs])
    assert taken.seen == 9
    for name, value in by_plan.state_dict().items():
        assert torch.equal(epochs.kept[-1][name], value)
    assert not torch.equal(epochs.kept[0]["conv1.weight"], epochs.kept[1]["conv1.weight"])
    for value, other in zip(by_modules.parameters(), by_plan.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4)
    taken.die_at = 9 + 5  # within the second epoch
    with pytest.raises(KeyboardInterrupt):
        run([], file)
    assert same_bits(run([], file), by_plan)


def test_frozen_parameters_are_left_alone() -> None:
    model = small_model()
    model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr, operator]
    before = model[0].weight.clone()  # type: ignore[index, union-attr, operator]
    train(model, image_samples(), TASK, config=TrainingConfig(epochs=1), seed=0)
    assert torch.equal(before, model[0].weight)  # type: ignore[index, union-attr, arg-type]


@pytest.mark.parametrize(("num_rows", "batch_size"), [(1, 8), (5, 64), (6, 1), (9, 4)])
def test_few_samples(num_rows: int, batch_size: int) -> None:
    config = TrainingConfig(epochs=2, batch_size=batch_size, lr=0.01)
    rows = torch.arange(num_rows)
    result = train(small_model(), image_samples(), TASK, config=config, seed=0, rows=rows)
    assert result.samples_seen == 2 * num_rows
    assert evaluate(small_model(), image_samples(), TASK, rows=rows[:1]).accuracy in (0.0, 1.0)


def test_language_models_train_by_their_own_loss() -> None:
    """A task without logits: callbacks hear of epochs alone, accuracy is NaN."""
    transformers = pytest.importorskip("transformers")
    settings_ = transformers.LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(settings_)
    ids = (torch.arange(8)[:, None] + torch.arange(6)) % 10 + 3
    samples = TokenSamples(ids, torch.ones_like(ids), ids.clone())
    watcher, config = Watcher(), TrainingConfig(epochs=30, batch_size=4, lr=0.02, optimizer="adamw")
    before = evaluate(model, samples, CausalLM())
    result = train(model, samples, CausalLM(), config=config, seed=0, callbacks=[watcher])
    after = evaluate(model, samples, CausalLM())
    assert math.isnan(after.accuracy)
    assert after.loss < 0.2 * before.loss
    assert watcher.batches == []
    assert len(watcher.epochs) == result.epochs == 30


def test_refusals() -> None:
    samples, config = image_samples(), TrainingConfig(epochs=2, batch_size=8, lr=0.01)

    def run(model: nn.Module | None = None, task: Task = TASK, **changed: Any) -> None:
        arguments = {"config": config, "seed": 0} | changed
        used = arguments.pop("samples", samples)
        train(model or small_model(), used, task, **arguments)

    with pytest.raises(RunError, match=r"loss became nan in epoch 0; lower the learning rate"):
        run(config=TrainingConfig(epochs=2, batch_size=8, lr=1e30))
    with pytest.raises(RunError, match=r"rows run from 0 to 40; the data have 40 samples"):
        run(rows=torch.arange(41))
    with pytest.raises(RunError, match="rows run from -1"):
        run(rows=torch.tensor([-1, 3]))
    for rows in (torch.arange(0), torch.ones(4), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(RunError, match="rows must be one or more int64"):
            run(rows=rows)
    ids = torch.ones(4, 3, dtype=torch.int64)
    tokens = TokenSamples(ids, ids, ids)
    with pytest.raises(RunError, match="TokenSamples has no augmented_batch"):
        run(samples=tokens, config=TrainingConfig(augment=True))
    with pytest.raises(RunError, match="objective needs logits, and CausalLM gives none"):
        run(task=CausalLM(), objective=lambda logits, batch, rows: logits.sum())
    frozen = small_model().requires_grad_(False)
    with pytest.raises(RunError, match="no parameter with requires_grad"):
        run(frozen)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    with pytest.raises(RunError, match=r"batch norm cannot be trained on a single sample"):
        run(flat, rows=torch.tensor([2]))

    class Silent(ImageClassification):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return model(batch[0]).square().sum(1)

    with pytest.raises(RunError, match=r"Silent\.loss does not call self\.logits"):
        run(task=Silent())


def test_configuration_names_all_problems() -> None:
    with pytest.raises(RunError) as caught:
        TrainingConfig(epochs=0, batch_size=0, lr=-1.0, momentum=1.0, steps=0, optimizer="lion")
    for what in ("epochs", "batch_size", "lr", "momentum", "steps", "sgd, adam, adamw, got 'lion'"):
        assert what in str(caught.value)


def test_evaluations_are_sums() -> None:
    found = Evaluation(loss_sum=3.0, num_correct=1, num_samples=2)
    assert (found.accuracy, found.loss) == (0.5, 1.5)
    assert math.isnan(Evaluation(loss_sum=3.0, num_correct=None, num_samples=2).accuracy)
