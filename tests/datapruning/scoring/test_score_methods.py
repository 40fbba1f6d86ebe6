"""The registry: one contract for every method, options, and runs that methods share."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch

from datapruning.errors import ScoreError, ScoreWarning
from datapruning.scores.error import el2n
from datapruning.scoring.jobs import Recipe
from datapruning.scoring.methods import METHODS, Method, check_method, checked_options
from datapruning.scoring.score import score
from datapruning.scoring.steps import Whole
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.networks import build_model
from prunelab.training.loop import TrainingConfig

NUM_SAMPLES = 90
TRAINING = TrainingConfig(epochs=4, batch_size=30, lr=0.05)
SMALL = {"training": TRAINING, "runs": 4, "options": {"window": 3, "embedding": "pca"}}


def small(seed: int) -> torch.nn.Module:
    return build_model("resnet8", num_classes=10, input_shape=(1, 8, 8), seed=seed, width=4)


@pytest.fixture(scope="module")
def samples() -> ImageSamples:
    data = load_dataset("digits")
    ids = torch.arange(NUM_SAMPLES).flip(0) + 1000
    return ImageSamples(data.train_images[:NUM_SAMPLES], data.train_labels[:NUM_SAMPLES], ids=ids)


@pytest.fixture(scope="module")
def tables(samples: ImageSamples) -> dict[str, torch.Tensor]:
    """Scores of all methods from one call: they share the models that they can."""
    names = list(METHODS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScoreWarning)  # tiny models may agree about everything
        warnings.simplefilter("ignore", FutureWarning)  # kronfluence's
        result = score(samples, method=names, model=small, seed=3, **SMALL)
    return {name: table.scores for name, table in result.items()}


@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, tables: dict[str, torch.Tensor]) -> None:
    """float64, one score a sample, on the CPU, finite, described and sourced."""
    scores, method = tables[name], METHODS[name]
    assert scores.dtype == torch.float64
    assert scores.shape == (NUM_SAMPLES,)
    assert scores.device.type == "cpu"
    assert scores.isfinite().all()
    assert method.summary.endswith(".")
    assert method.source
    assert method.observe is not None or method.finish is not None


@pytest.mark.parametrize("name", ["el2n", "grand", "dual", "memorization", "tracin", "random"])
def test_alone_or_with_others_is_the_same(
    name: str, samples: ImageSamples, tables: dict[str, torch.Tensor]
) -> None:
    """Shared runs change no bit."""
    options = {k: v for k, v in SMALL["options"].items() if k in METHODS[name].options}  # type: ignore[attr-defined]
    alone = score(
        samples, method=name, model=small, seed=3, training=TRAINING, runs=4, options=options
    )
    assert torch.equal(alone.scores, tables[name])
    assert torch.equal(alone.ids, samples.ids)


def test_tracin_weighs_each_checkpoint_by_its_learning_rate(samples: ImageSamples) -> None:
    """Against a plain loop: Σ_k η_k ⟨∇ℓ_i(θ_k), ∇ mean ℓ(θ_k)⟩, η_k the mean rate of epoch k.

    90 samples in batches of 30 are 3 steps an epoch; of 4 epochs half a cosine has
    η_t = .05 (1 + cos(π t / 12)) / 2 in step t.
    """
    from prunelab.runs.seeds import stream_seed  # noqa: PLC0415
    from prunelab.training.loop import train  # noqa: PLC0415
    from prunelab.training.task import ImageClassification  # noqa: PLC0415

    class Copies:
        def on_batch(self, *_: object) -> None:
            pass

        def on_epoch(self, epoch: int, model: torch.nn.Module) -> None:
            models.append(copy.deepcopy(model).eval())

    models: list[torch.nn.Module] = []
    task, seed = ImageClassification(), stream_seed(3, 0, 1000, 0)
    train(small(seed), samples, task, config=TRAINING, seed=seed, callbacks=[Copies()])
    total = torch.zeros(NUM_SAMPLES, dtype=torch.float64)
    for epoch, model in enumerate(models):
        steps = range(3 * epoch, 3 * epoch + 3)
        rate = sum(0.05 * (1 + math.cos(math.pi * t / 12)) / 2 for t in steps) / 3
        losses = task.loss(model, samples.batch(torch.arange(NUM_SAMPLES)))
        parameters = list(model.parameters())
        mean = torch.autograd.grad(losses.mean(), parameters, retain_graph=True)
        for row, loss in enumerate(losses):
            own = torch.autograd.grad(loss, parameters, retain_graph=True)
            dot = sum(
                float((a.double() * b.double()).sum()) for a, b in zip(own, mean, strict=True)
            )
            total[row] += rate * dot
    found = score(samples, method="tracin", model=small, seed=3, training=TRAINING)
    place = {name: row for row, name in enumerate(found.ids.tolist())}
    order = [place[name] for name in samples.ids.tolist()]
    torch.testing.assert_close(found.scores[order], total, rtol=1e-4, atol=1e-6)


def test_rates_are_means_over_the_epochs_between_moments(samples: ImageSamples) -> None:
    """Of 7 epochs models are kept after 1, 3, 4, 6 and 7; 90 samples are 3 steps an epoch."""
    seen: list[float] = []

    def prepare(whole: Whole) -> torch.Tensor:
        seen.extend(whole.rates)
        return torch.zeros(())

    method = Method(
        "Whatever.", "nowhere", runs=1, moments="spread", name="watching", prepare=prepare,
        finish=lambda whole: torch.arange(len(whole.samples)).double(),
    )  # fmt: skip
    training = TrainingConfig(epochs=7, batch_size=30, lr=0.05)
    score(samples, method=method, model=small, seed=3, training=training)
    steps = [0.05 * (1 + math.cos(math.pi * step / 21)) / 2 for step in range(21)]
    bounds = [(0, 1), (1, 3), (3, 4), (4, 6), (6, 7)]
    assert seen == pytest.approx([sum(steps[3 * a : 3 * b]) / (3 * (b - a)) for a, b in bounds])


def test_scores_of_dynamics_come_with_the_confidence_that_dual_draws_by(
    samples: ImageSamples,
) -> None:
    """The mean of p_y over the epochs that the score is of."""
    options = {"window": 2, "epochs": 3}
    names = ["dual", "forgetting", "el2n"]
    both = score(samples, method=names, model=small, seed=3, training=TRAINING, options=options)
    dual, forgetting = both["dual"].confidence, both["forgetting"].confidence
    assert both["el2n"].confidence is None
    assert dual is not None
    assert forgetting is not None
    assert 0 < float(dual.min()) <= float(dual.max()) <= 1
    # Of three epochs and of four: the fourth is what remains, a mean of probabilities.
    fourth = 4 * forgetting - 3 * dual
    assert not torch.allclose(dual, forgetting)
    assert float(fourth.min()) >= -1e-6
    assert float(fourth.max()) <= 1 + 1e-6


def test_mean_over_independent_runs(samples: ImageSamples, tables: dict[str, torch.Tensor]) -> None:
    """EL2N-20 is the mean over models of different seeds, not one called twenty."""
    assert not torch.allclose(tables["el2n"], tables["el2n-20"])
    seeds: list[int] = []

    def watched(seed: int) -> torch.nn.Module:
        seeds.append(seed)
        return small(seed)

    score(samples, method="el2n-20", model=watched, seed=3, training=TRAINING, runs=3)
    assert len(set(seeds)) == 3


def test_el2n_is_of_the_early_checkpoint_in_eval_mode(samples: ImageSamples) -> None:
    """Against a plain loop: train to the early epoch under the whole run's schedule, then look."""
    from prunelab.runs.seeds import stream_seed  # noqa: PLC0415
    from prunelab.training.loop import train  # noqa: PLC0415
    from prunelab.training.task import ImageClassification  # noqa: PLC0415

    class Stop(Exception):  # noqa: N818
        pass

    class AtEpochTwo:
        def on_batch(self, *_: object) -> None:
            pass

        def on_epoch(self, epoch: int, model: torch.nn.Module) -> None:
            if epoch == 1:
                raise Stop

    seed = stream_seed(3, 0, 1000, 0)
    model = small(seed)
    with pytest.raises(Stop):
        train(
            model, samples, ImageClassification(),
            config=TRAINING, seed=seed, callbacks=[AtEpochTwo()],
        )  # fmt: skip
    images, labels = samples.batch(torch.arange(NUM_SAMPLES))
    with torch.no_grad():
        expected = el2n(model.eval()(images), labels)
    table = score(samples, method="el2n", model=small, seed=3, training=TRAINING, early=2)
    torch.testing.assert_close(table.scores, expected, rtol=1e-5, atol=1e-7)


def test_high_is_hard_where_it_should_be() -> None:
    """Forty wrong labels among four hundred: errors and dynamics put them above the others."""
    data = load_dataset("digits")
    labels = data.train_labels[:400].clone()
    planted = torch.arange(0, 400, 10)
    labels[planted] = (labels[planted] + 5) % 10
    noisy = ImageSamples(data.train_images[:400], labels)
    names = ["el2n", "grand", "loss", "margin", "aum", "forgetting"]
    training = TrainingConfig(epochs=8, batch_size=40, lr=0.05)
    found = score(noisy, method=names, model=small, seed=0, training=training, early=6)
    is_planted = torch.zeros(400, dtype=torch.bool)
    is_planted[planted] = True
    for name in names:
        scores = found[name].scores
        above = (scores[is_planted][:, None] > scores[~is_planted]).double().mean()
        assert above > 0.8, name


def test_all_methods_share_one_training_run(samples: ImageSamples) -> None:
    """Six methods of one run train one model; the early one alone stops early."""
    methods = {name: METHODS[name] for name in ("el2n", "aum", "forgetting", "dual")}
    options = {name: checked_options(name, method, {}) for name, method in methods.items()}
    recipe = Recipe(
        parts=None, samples=samples, task=None, model="resnet8", training=TRAINING, seed=0,
        density=None, device="cpu", threads=1, methods=methods, options=options, runs=None,
        early=2, shard_size=10,
    )  # type: ignore[arg-type]  # fmt: skip
    (run,) = recipe.all_runs
    assert run.epochs == (2,)
    assert run.records


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ScoreError, match="unknown method 'magic'; known methods: el2n, el2n-20"):
        check_method("magic")
    with pytest.raises(ScoreError, match="no option 'windw'; it has window"):
        checked_options("dyn-unc", METHODS["dyn-unc"], {"windw": 3})
    with pytest.raises(ScoreError, match="expected int, got 'ten'"):
        checked_options("dyn-unc", METHODS["dyn-unc"], {"window": "ten"})
    with pytest.raises(ScoreError, match="parameters: expected head"):
        score("digits", method="influence-cg", training=TrainingConfig(epochs=1),
              options={"parameters": "tail"}, model=small)  # fmt: skip


def test_nothing_is_left_in_the_folder(samples: ImageSamples, tmp_path: Path) -> None:
    """Parts go when the tables are there, and a second call finds the tables."""
    out = tmp_path / "a b" / "s.parquet"
    table = score(samples, method="el2n", model=small, training=TRAINING, out=out)
    assert sorted(p.name for p in out.parent.iterdir()) == ["s.parquet", "s.times.json"]
    stamp = out.stat().st_mtime_ns
    again = score(samples, method="el2n", model=small, training=TRAINING, out=out)
    assert torch.equal(table.scores, again.scores)
    assert out.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("name", ["el2n-20", "ddd"])
def test_runs_are_averaged_not_summed(name: str, samples: ImageSamples) -> None:
    """Models that are all alike and hardly learn: three of them score as one does."""

    def alike(seed: int) -> torch.nn.Module:
        return build_linear()

    still = TrainingConfig(epochs=1, batch_size=30, lr=1e-12)
    one = score(samples, method=name, model=alike, training=still, runs=1)
    three = score(samples, method=name, model=alike, training=still, runs=3)
    torch.testing.assert_close(one.scores, three.scores, rtol=1e-6, atol=1e-8)


def build_linear() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-1, 1, 640).sin().reshape(10, 64))
        model[1].bias.zero_()
    return model
