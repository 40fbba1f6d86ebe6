"""How much can be dropped by self-supervised prototypes, without labels, at no loss?

    python -m simulations.ssl_prototypes_cifar10                       (scikit-learn's digits)
    python -m simulations.ssl_prototypes_cifar10 --data FOLDER --out DIR   (CIFAR-10 in parquet)

Source: Sorscher et al., Beyond neural scaling laws (NeurIPS 2022), section 5: about a fifth of
ImageNet dropped without loss. Selections are compared with a random subset of the same size, at
as many optimiser steps as the full data get, and at as many epochs (so with fewer steps).
`small` trains what one core can in a quarter of an hour; `full` is CIFAR-10 and wants a GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datapruning.embeddings.embed import embed
from datapruning.embeddings.simclr import SimclrConfig
from datapruning.scores.prototypes import self_supervised
from datapruning.selection.select import select
from datapruning.selection.table import ScoreTable
from datapruning.students.comparison import full_steps
from prunelab.data.datasets import ImageSet
from prunelab.data.samples import ImageSamples
from prunelab.training.loop import TrainingConfig
from simulations.command import parse
from simulations.page import table
from simulations.pruning_cells import Result, errors_page, percent, run_cells, test_error

NAME = "ssl_prototypes_cifar10"
BUDGETS = ("steps", "epochs")


@dataclass(frozen=True)
class Preset:
    """What is trained, and how."""

    data: str
    num_train: int | None
    num_test: int | None
    model: str
    epochs: int
    batch_size: int
    lr: float
    augment: bool
    simclr: SimclrConfig
    keeps: tuple[float, ...] = (0.9, 0.8, 0.6, 0.4)
    sources: tuple[str, ...] = ("simclr", "pca")
    device: str = "cpu"


PRESETS = {
    "small": Preset(
        "digits", None, None, "resnet8", 10, 64, 0.05, False,
        SimclrConfig(epochs=25, batch_size=128),
    ),
    "full": Preset(
        "cifar10", None, None, "resnet18", 100, 128, 0.1, True,
        SimclrConfig(model="resnet18", epochs=400, batch_size=512, flip=True),
        keeps=(0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3), sources=("simclr", "pca", "pixels"),
        device="cuda",
    ),
}  # fmt: skip
# Coloured folders: CIFAR's augmentation and mirrored views, a subset that a core can train on.
FOLDER: dict[str, Any] = {"num_train": 3000, "num_test": 2000, "augment": True}


def main() -> None:
    """Command line."""
    call = parse(NAME, list(PRESETS))
    preset = PRESETS[call.preset]
    if call.has_folder and call.preset == "small":
        flipped = SimclrConfig(**{**asdict(preset.simclr), "flip": True})
        preset = Preset(**{**vars(preset), **FOLDER, "simclr": flipped})
    data = call.load(preset.data, num_train=preset.num_train, num_test=preset.num_test)
    grid = cells(preset, data, call.seeds, call.out)
    settings = {**asdict(preset), "data": data.fingerprint}
    results = run_cells(grid, call.out, settings=settings)
    title = "Self-supervised prototypes: how much can be dropped"
    body = tables(preset, results, call.seeds)
    call.save(errors_page(title, call, data, results, body=body, settings=asdict(preset)))


def cells(
    preset: Preset, data: ImageSet, seeds: Sequence[int], out: Path
) -> dict[str, Callable[[], Result]]:
    """Seed by seed, so that an early stop leaves whole seeds."""
    scores = lru_cache(partial(prototype_scores, preset, data, out))
    grid: dict[str, Callable[[], Result]] = {}
    for seed in seeds:
        grid[f"full-s{seed}"] = partial(
            run_cell, preset, data, scores, how="", keep=1.0, budget="epochs", seed=seed
        )
        for keep in preset.keeps:
            for how in ("random", *preset.sources):
                for budget in BUDGETS:
                    grid[f"{how}-{keep:g}-{budget}-s{seed}"] = partial(
                        run_cell, preset, data, scores, how=how, keep=keep, budget=budget, seed=seed
                    )
    return grid


def prototype_scores(preset: Preset, data: ImageSet, out: Path, how: str, seed: int) -> Tensor:
    """Distance to the nearest of as many centroids as there are classes."""
    checkpoint = out / f"simclr-s{seed}.pt" if how == "simclr" else None
    embeddings = embed(
        ImageSamples.of(data), how, seed=seed, config=preset.simclr, checkpoint=checkpoint,
        device=preset.device,
    )  # fmt: skip
    return self_supervised(embeddings, num_clusters=data.num_classes, seed=seed)


def run_cell(
    preset: Preset,
    data: ImageSet,
    scores: Callable[[str, int], Tensor],
    *,
    how: str,
    keep: float,
    budget: str,
    seed: int,
) -> Result:
    """Select, train, test."""
    samples = ImageSamples.of(data)
    rows = torch.arange(len(samples))
    if how:
        values = torch.zeros(len(samples)).double() if how == "random" else scores(how, seed)
        table = ScoreTable(
            samples.ids, values, method=how, dataset=data.name, seed=seed,
            fingerprint=samples.fingerprint, labels=samples.labels,
        )  # fmt: skip
        policy = "random" if how == "random" else "hardest"
        subset = select(table, keep=keep, policy=policy, seed=seed, class_balanced=True)
        rows = subset.rows(samples)
    config = TrainingConfig(
        epochs=preset.epochs, batch_size=preset.batch_size, lr=preset.lr, augment=preset.augment
    )
    if budget == "steps":
        config = replace(config, steps=full_steps(len(samples), config))
    error = test_error(
        data, rows, model=preset.model, config=config, seed=seed, device=preset.device
    )
    return {"error": error, "kept": len(rows)}


def tables(preset: Preset, results: dict[str, Result], seeds: Sequence[int]) -> list[str]:
    """A table for each budget, and what they say about dropping at no loss."""
    full = {seed: results[f"full-s{seed}"]["error"] for seed in seeds}
    lines = [
        "- kept: the farthest from their prototype, every class at least half its fair share; "
        "random: the same floor",
        f"- full data: {percent(list(full.values()))}",
    ]
    for budget in BUDGETS:
        lines += ["", f"As many {budget} as the full data get:", ""]
        columns = ("random", *preset.sources)
        rows = []
        for keep in preset.keeps:
            errors = {
                how: [results[f"{how}-{keep:g}-{budget}-s{s}"]["error"] for s in seeds]
                for how in columns
            }
            pairs = [a - b for a, b in zip(errors["simclr"], errors["random"], strict=True)]
            rows.append([f"{keep:g}", *map(percent, errors.values()), percent(pairs)])
        header = ["kept", *columns, "simclr − random"]
        lines += [table(header, rows, words=()), ""]
        lines += [_no_loss(how, budget, preset, results, full=full) for how in columns]
    return lines


def _no_loss(
    how: str, budget: str, preset: Preset, results: dict[str, Result], *, full: dict[int, float]
) -> str:
    """The smallest share kept whose loss against the full data, paired by seed, is within noise."""
    good = []
    for keep in sorted(preset.keeps, reverse=True):
        lost = [
            results[f"{how}-{keep:g}-{budget}-s{seed}"]["error"] - error
            for seed, error in full.items()
        ]
        noise = statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else 0.0
        if statistics.mean(lost) > noise:
            break
        good.append(keep)
    what = f"{100 * (1 - good[-1]):.0f} %" if good else "less than the least tried"
    return (
        f"- {how}: can drop {what} with a mean loss of at most one standard error of the paired "
        "differences."
    )


if __name__ == "__main__":
    main()
