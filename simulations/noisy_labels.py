"""Which scores find wrong labels: planted noise, and the area under the ROC curve of each score.

    python -m simulations.noisy_labels [--data FOLDER_OF_PARQUET]

A share of the training labels is flipped to another class, at random. Every score ranks the
samples of that noisy set, high for suspicious; EL2N and the loss are taken after several epochs as
well; and the label issues of confident learning are counted. `small` is for one core; `fashion` is
6,000 images of Fashion-MNIST.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from datapruning.scores.error import el2n, loss
from datapruning.scoring.methods import METHODS as KNOWN
from datapruning.scoring.score import score
from prunelab.data.samples import ImageSamples
from prunelab.networks import build_model
from prunelab.runs.seeds import generator, stream_seed
from prunelab.training.loop import TrainingConfig, predict, train
from prunelab.training.task import ImageClassification
from simulations.command import parse
from simulations.kept.flipped import flipped
from simulations.page import page, table
from simulations.pruning_cells import Result, run_cells
from simulations.statistics import LEVEL, interval

METHODS = (
    "el2n", "el2n-20", "grand", "loss", "margin", "entropy", "forgetting", "aum", "dyn-unc",
    "dual", "tdds", "ddd", "active-learning", "vog", "memorization", "self-confidence",
    "confident-learning", "prototypes-supervised", "d2", "random",
)  # fmt: skip
WHAT = ("named", "precision", "recall")
RULES = ("noise-rate", "class", "both", "confident-joint")
EARLY = {"el2n": el2n, "loss": loss}


@dataclass(frozen=True)
class Preset:
    """Size of an experiment.

    Attributes:
        dataset: a name, replaced by --data.
        num_train: a stratified subset.
        noise: shares of the labels that are flipped.
        runs: models of each score that trains several.
        epochs_looked_at: after which EL2N and the loss of one model are taken.
    """

    dataset: str
    num_train: int
    model: str = "resnet8"
    epochs: int = 12
    batch_size: int = 64
    noise: tuple[float, ...] = (0.2, 0.4)
    runs: int = 10
    epochs_looked_at: tuple[int, ...] = (1, 2, 4, 8, 12)


PRESETS = {"small": Preset("digits", 700), "fashion": Preset("fashion-mnist", 6000)}
_NOISE, _MODEL, _ORDER = 0, 1, 2  # streams of the seed


def with_noise(samples: ImageSamples, *, noise: float, seed: int) -> tuple[ImageSamples, Tensor]:
    """The samples with a share of their labels flipped, and which those are, bool [N].

    Exactly round(noise · N) labels, chosen uniformly, become each of the other classes alike.
    """
    num_classes = int(samples.labels.max()) + 1
    random = generator(seed, _NOISE)
    labels = flipped(samples.labels, noise, num_classes=num_classes, random=random)
    return ImageSamples(samples.images, labels), labels != samples.labels


class Looking:
    """A callback that ranks all samples by EL2N and loss after some epochs, in eval mode."""

    def __init__(self, samples: ImageSamples, is_noisy: Tensor, epochs: Sequence[int]) -> None:
        self.samples, self.is_noisy, self.epochs = samples, is_noisy, epochs
        self.found: dict[str, dict[str, float]] = {name: {} for name in EARLY}

    def on_batch(self, epoch: int, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        pass

    def on_epoch(self, epoch: int, model: nn.Module) -> None:
        if epoch + 1 in self.epochs:
            logits, labels = predict(model, self.samples, ImageClassification())
            for name, of in EARLY.items():
                self.found[name][str(epoch + 1)] = auc(self.is_noisy, of(logits, labels))


def auc(is_noisy: Tensor, scores: Tensor) -> float:
    """Chance that a wrong label has a higher score than a right one; ties count half."""
    return float(roc_auc_score(is_noisy.numpy(), scores.numpy()))


def found_by(is_noisy: Tensor, issues: Tensor) -> dict[str, float]:
    """Share of samples that are named, of named ones that are noisy, of noisy ones named.

    >>> found_by(Tensor([1, 1, 0]).bool(), Tensor([1, 0, 0]).bool())["recall"]
    0.5
    """
    right = int((is_noisy & issues).sum())
    shares = (
        float(issues.double().mean()),
        right / max(1, int(issues.sum())),
        right / int(is_noisy.sum()),
    )
    return dict(zip(WHAT, shares, strict=True))


def measured(
    clean: ImageSamples,
    preset: Preset,
    *,
    noise: float,
    seed: int,
    out: Path,
    methods: Sequence[str] = METHODS,
) -> Result:
    """One cell: every score of one noisy set; tables stay beside `out`, to be gone on with."""
    started = time.process_time()
    samples, is_noisy = with_noise(clean, noise=noise, seed=seed)
    training = TrainingConfig(epochs=preset.epochs, batch_size=preset.batch_size)
    by_rule = {
        rule: replace(
            KNOWN["confident-learning"], name=f"issues-{rule}", options={"prune_by": rule}
        )
        for rule in RULES
    }
    tables = score(
        samples, method=[*methods, *by_rule.values()], model=preset.model, out=out,
        training=training, seed=stream_seed(seed, _MODEL), runs=preset.runs,
    )  # fmt: skip
    looking = Looking(samples, is_noisy, preset.epochs_looked_at)
    network = build_model(
        preset.model,
        num_classes=int(clean.labels.max()) + 1,
        input_shape=tuple(clean.images.shape[1:]),
        seed=stream_seed(seed, _MODEL),
    )
    train(
        network, samples, ImageClassification(),
        config=training, seed=stream_seed(seed, _ORDER), callbacks=[looking],
    )  # fmt: skip
    return {
        "auc": {name: auc(is_noisy, tables[name].scores) for name in methods},
        "by_epoch": looking.found,
        "issues": {
            rule: found_by(is_noisy, tables[method.name].scores > 1)
            for rule, method in by_rule.items()
        },
        "processor_seconds": time.process_time() - started,
    }


Pick = Callable[[Result], float]


def spread(results: Mapping[float, Sequence[Result]], *picks: Pick, digits: int = 3) -> list[str]:
    """For each noise, and of its cells each that is picked: mean ± half of its interval."""
    found = [
        interval([pick(cell) for cell in cells]) for cells in results.values() for pick in picks
    ]
    return [f"{each.mean:.{digits}f} ± {each.half:.{digits}f}" for each in found]


def body(results: Mapping[float, Sequence[Result]], preset: Preset) -> list[str]:
    """The tables, from the cells of each noise."""
    rates = [f"{100 * noise:g} % noise" for noise in results]
    first = next(iter(results.values()))
    names = sorted(first[0]["auc"], key=lambda name: -sum(cell["auc"][name] for cell in first))
    trained = {name: KNOWN[name].runs for name in names}
    return [
        "Area under the ROC curve of each score for the planted labels: 1 ranks all of them first, "
        ".5 is chance, and below it wrong labels have the lower scores. Models are those trained "
        "for the score, el2n's, el2n-20's and grand's for a tenth of the epochs.",
        "",
        table(
            ["score", "models", *rates],
            [
                [
                    name,
                    str(preset.runs if trained[name] > 1 else trained[name]),
                    *spread(results, lambda cell, name=name: cell["auc"][name]),
                ]
                for name in names
            ],
        ),
        "",
        "The same for EL2N and the loss of one model, after some of its epochs:",
        "",
        table(
            ["epochs", *(f"{name}, {rate}" for rate in rates for name in EARLY)],
            [
                [epoch, *spread(results, *(_at(name, epoch) for name in EARLY))]
                for epoch in first[0]["by_epoch"]["el2n"]
            ],
        ),
        "",
        "Label issues of confident learning by each rule (`prune_by`), in %: the share of the "
        "samples that it names, how many of these are planted (precision), and how many of the "
        "planted it names (recall).",
        "",
        table(
            ["rule", *(f"{what}, {rate}" for rate in rates for what in WHAT)],
            [
                [rule, *spread(results, *(_of_rule(rule, what) for what in WHAT), digits=1)]
                for rule in RULES
            ],
        ),
    ]


def _at(name: str, epoch: str) -> Pick:
    return lambda cell: float(cell["by_epoch"][name][epoch])


def _of_rule(rule: str, what: str) -> Pick:
    return lambda cell: 100 * float(cell["issues"][rule][what])


def main() -> None:
    call = parse("noisy_labels", list(PRESETS))
    preset = PRESETS[call.preset]
    data = call.load(preset.dataset, num_train=preset.num_train, num_test=None)
    clean = ImageSamples.of(data)
    names = {
        (noise, seed): f"noise-{round(100 * noise)}-seed-{seed}"
        for noise in preset.noise
        for seed in call.seeds
    }
    settings = {"fingerprint": data.fingerprint, **asdict(preset)}
    cells = run_cells(
        {
            name: lambda noise=noise, seed=seed, name=name: measured(
                clean, preset, noise=noise, seed=seed, out=call.out / name / "scores.parquet"
            )
            for (noise, seed), name in names.items()
        },
        call.out,
        settings=settings,
    )
    results = {noise: [cells[names[noise, seed]] for seed in call.seeds] for noise in preset.noise}
    minutes = [cell["processor_seconds"] / 60 for cell in cells.values()]
    call.save(
        page(
            "Scores on planted label noise",
            command=call.command,
            at=", ".join(sorted({cell["commit"] for cell in cells.values()})),
            used=f", {call.threads} used",
            notes=[
                f"{data.name}: {len(clean):,} training samples, fingerprint {data.fingerprint}; "
                "test data were not used",
                f"means over seeds {', '.join(map(str, call.seeds))} ± half of Student's "
                f"{100 * LEVEL:g} % interval; a seed decides which labels are flipped and to what, "
                "initial weights, order and subsets",
                f"a cell (one noise, one seed) took {sum(minutes) / len(minutes):.1f} processor "
                "minutes",
            ],
            body=body(results, preset),
            settings=asdict(preset),
        )
    )


if __name__ == "__main__":
    main()
