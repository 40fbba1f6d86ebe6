"""Error against data size, for several fractions kept of a larger set: power law or exponential?

    python -m simulations.scaling_laws                        (scikit-learn's digits)
    python -m simulations.scaling_laws --data FOLDER --out DIR   (CIFAR-10 in parquet)

Source: Sorscher et al., Beyond neural scaling laws (NeurIPS 2022). For each fraction f, pools of
growing size are scored (EL2N, mean of short runs), the hardest f of each is kept, and a network
is trained on it for one number of steps throughout. The first part of the page is the theory's
perceptron, solved and tried (`datapruning.theory.perceptron`).
`small` trains what one core can in a quarter of an hour; `full` is CIFAR-10 and wants a GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from datapruning.scores.error import el2n
from datapruning.selection.select import select
from datapruning.selection.table import ScoreTable
from datapruning.theory.perceptron import learning_point, trial
from datapruning.theory.scaling import LAWS, Law, band, compare, plot
from prunelab.data.datasets import ImageSet
from prunelab.data.samples import ImageSamples
from prunelab.networks import build_model
from prunelab.runs.seeds import generator, stream_seed
from prunelab.training.loop import TrainingConfig, predict, train
from prunelab.training.task import ImageClassification
from simulations.command import Call, parse
from simulations.page import table
from simulations.pruning_cells import Result, errors_page, percent, run_cells, test_error

NAME = "scaling_laws"
DIMENSION, TRIALS = 200, 10  # of the perceptron's trials
ALPHAS, FRACTIONS = (1, 2, 5, 10, 20, 50), (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)


@dataclass(frozen=True)
class Preset:
    """What is trained, and how."""

    data: str
    num_train: int | None
    num_test: int | None
    model: str
    steps: int
    batch_size: int
    lr: float
    augment: bool
    score_steps: int
    score_runs: int = 3
    pools: tuple[float, ...] = (0.12, 0.2, 0.35, 0.6, 1.0)
    fractions: tuple[float, ...] = (1.0, 0.7, 0.4)
    device: str = "cpu"


PRESETS = {
    "small": Preset("digits", None, None, "resnet8", 250, 64, 0.05, False, score_steps=60),
    "full": Preset(
        "cifar10", None, None, "resnet18", 39_000, 128, 0.1, True, score_steps=3_900,
        score_runs=10, pools=(0.1, 0.2, 0.4, 0.6, 0.8, 1.0), fractions=(1.0, 0.8, 0.6, 0.4, 0.2),
        device="cuda",
    ),
}  # fmt: skip
FOLDER: dict[str, Any] = {"num_train": 4000, "num_test": 2000, "augment": True}


def main() -> None:
    """Command line."""
    call = parse(NAME, list(PRESETS))
    preset = PRESETS[call.preset]
    if call.has_folder and call.preset == "small":
        preset = Preset(**{**vars(preset), **FOLDER})
    data = call.load(preset.data, num_train=preset.num_train, num_test=preset.num_test)
    settings = {**asdict(preset), "data": data.fingerprint}
    results = run_cells(cells(preset, data, call.seeds), call.out, settings=settings)
    theory = run_cells(
        {"theory": perceptron_curve, **{f"trial-{a}": partial(trials, a) for a in ALPHAS}},
        call.out / "perceptron",
        settings={"dimension": DIMENSION, "trials": TRIALS},
    )
    body = [*perceptron_table(theory), *network_tables(preset, results, call)]
    cells_run = {**results, **theory}
    title = "Scaling laws of pruned data"
    call.save(errors_page(title, call, data, cells_run, body=body, settings=asdict(preset)))


# --- the perceptron ------------------------------------------------------------------------------


def perceptron_curve() -> Result:
    """Errors of the theory, by inputs per dimension before pruning and fraction kept."""
    curve: Result = {}
    for alpha in ALPHAS:
        # As many inputs to train on, the hardest of a larger set.
        hard = {f: learning_point(alpha / f, fraction=f).error for f in FRACTIONS}
        best = min(hard, key=lambda f: hard[f])
        curve[str(alpha)] = {
            "all": learning_point(alpha).error,
            "hard": learning_point(alpha, fraction=0.3).error,
            "easy": learning_point(alpha, fraction=0.3, keep="easy").error,
            "best": best,
            "at_best": hard[best],
        }
    return curve


def trials(alpha: float) -> Result:
    """Errors of drawn perceptrons, for each column of the table that has a theory."""
    kinds: dict[str, dict[str, Any]] = {
        "all": {}, "hard": {"fraction": 0.3}, "easy": {"fraction": 0.3, "keep": "easy"}
    }  # fmt: skip
    return {
        kind: [
            trial(alpha, dimension=DIMENSION, seed=seed, **options).error for seed in range(TRIALS)
        ]
        for kind, options in kinds.items()
    }


def perceptron_table(results: dict[str, Result]) -> list[str]:
    """Theory beside trials: mean ± standard error."""
    lines = [
        "## The teacher-student perceptron", "",
        f"Error in percent: theory, and trials in {DIMENSION} dimensions (mean ± standard error of "
        f"{TRIALS}); 30 % kept by a perfect probe. The last columns: as many inputs to train on as "
        "the row has, but the hardest of a larger set; the best share of it, of "
        f"{', '.join(map(str, FRACTIONS))}.", "",
    ]  # fmt: skip
    header = [
        "inputs / dimension",
        *("all: theory", "trial", "hard 30 %: theory", "trial", "easy 30 %: theory", "trial"),
        *("as many, hardest: best share", "theory"),
    ]
    rows = []
    for alpha in ALPHAS:
        theory, tried = results["theory"][str(alpha)], results[f"trial-{alpha}"]
        row = [str(alpha)]
        for kind in ("all", "hard", "easy"):
            error = statistics.stdev(tried[kind]) / math.sqrt(len(tried[kind]))
            row += [
                f"{100 * theory[kind]:.2f}",
                f"{100 * statistics.mean(tried[kind]):.2f} ± {100 * error:.2f}",
            ]
        rows.append([*row, f"{theory['best']:g}", f"{100 * theory['at_best']:.2f}"])
    return [*lines, table(header, rows, words=())]


# --- networks ------------------------------------------------------------------------------------


def cells(preset: Preset, data: ImageSet, seeds: Sequence[int]) -> dict[str, Callable[[], Result]]:
    """Seed by seed, so that an early stop leaves whole seeds."""
    scores = lru_cache(partial(pool_scores, preset, data))
    return {
        f"f{fraction:g}-p{pool:g}-s{seed}": partial(
            run_cell, preset, data, scores, fraction=fraction, pool=pool, seed=seed
        )
        for seed in seeds
        for pool in preset.pools
        for fraction in preset.fractions
    }


def pool_scores(preset: Preset, data: ImageSet, pool: float, seed: int) -> ScoreTable:
    """EL2N of a random pool, by runs on that pool alone."""
    samples, task = ImageSamples.of(data), ImageClassification()
    rows = torch.randperm(len(samples), generator=generator(seed))[: round(pool * len(samples))]
    config = TrainingConfig(
        steps=preset.score_steps, batch_size=preset.batch_size, lr=preset.lr, augment=preset.augment
    )
    total = torch.zeros(len(rows), dtype=torch.float64)
    for run in range(preset.score_runs):
        network = build_model(
            preset.model, num_classes=data.num_classes, input_shape=data.input_shape,
            seed=stream_seed(seed, 2, run),
        )  # fmt: skip
        train(
            network, samples, task, config=config, seed=stream_seed(seed, 3, run), rows=rows,
            device=preset.device,
        )  # fmt: skip
        total += el2n(*predict(network, samples, task, rows=rows))
    return ScoreTable(
        samples.ids[rows], total / preset.score_runs, method="el2n", dataset=data.name,
        fingerprint=samples.fingerprint, seed=seed, labels=samples.labels[rows],
    )  # fmt: skip


def run_cell(
    preset: Preset,
    data: ImageSet,
    scores: Callable[[float, int], ScoreTable],
    *,
    fraction: float,
    pool: float,
    seed: int,
) -> Result:
    """Keep the hardest of a pool, train, test."""
    table = scores(pool, seed)
    subset = select(table, keep=fraction, policy="hardest", seed=seed, class_balanced=True)
    config = TrainingConfig(
        steps=preset.steps, batch_size=preset.batch_size, lr=preset.lr, augment=preset.augment
    )
    error = test_error(
        data, subset.rows(ImageSamples.of(data)), model=preset.model, config=config, seed=seed,
        device=preset.device,
    )  # fmt: skip
    return {"error": error, "kept": len(subset)}


def network_tables(preset: Preset, results: dict[str, Result], call: Call) -> list[str]:
    """Errors, fits, and a plot beside the cells."""
    lines = ["", "## Networks", "", f"{preset.steps} steps for every size. Errors:", ""]
    header, rows = ["pool"], []
    curves: dict[str, tuple[list[int], list[list[float]]]] = {}
    for fraction in preset.fractions:
        header += [f"kept {fraction:g}: n", "error"]
        of = {p: [results[f"f{fraction:g}-p{p:g}-s{s}"] for s in call.seeds] for p in preset.pools}
        errors = [[of[p][k]["error"] for p in preset.pools] for k in range(len(call.seeds))]
        curves[f"kept {fraction:g}"] = ([of[p][0]["kept"] for p in preset.pools], errors)
    for column, pool in enumerate(preset.pools):
        row = [f"{pool:g}"]
        for sizes, errors in curves.values():
            row += [str(sizes[column]), percent([errors_of[column] for errors_of in errors])]
        rows.append(row)
    return [*lines, table(header, rows, words=()), *_fits(curves, call)]


def _fits(curves: dict[str, tuple[list[int], list[list[float]]]], call: Call) -> list[str]:
    if any(error <= 0 for _, errors in curves.values() for row in errors for error in row):
        return ["", "Some error is 0: too few test images for a fit of logarithms."]
    lines = [
        "", "Fits of log error. Held out: predicted / measured at the largest size, by a fit to "
        "the others. "
        "The last errors: 90 % of bootstraps over seeds, in percent.", "",
    ]  # fmt: skip
    header = ["curve", "law", "AICc", "held out", "error at the largest size", "decided"]
    rows = []
    for label, (sizes, errors) in curves.items():
        found = compare(sizes, errors)
        fits = {"power": found.power, "exponential": found.exponential}
        for law in LAWS:
            held_out = f"×{math.exp(found.held_out[law]):.2f}"
            largest = _band(sizes, errors, law)
            numbers = [f"{fits[law].aicc:.1f}", held_out, largest]
            rows.append([label, law, *numbers, found.better or "no"])
    lines.append(table(header, rows, words=(0, 1, 5)))
    path = call.out / "curves.png"
    plot(curves, path, title="Test error against training samples kept")
    return [*lines, "", "The script draws the curves into `curves.png` beside its cells."]


def _band(sizes: list[int], errors: list[list[float]], law: Law) -> str:
    if len(errors) < 2:
        return "one seed"
    low, high = band(sizes, errors, law=law, at=[max(sizes)])
    return f"{100 * low[0]:.1f} to {100 * high[0]:.1f}"


if __name__ == "__main__":
    main()
