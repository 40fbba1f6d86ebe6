"""Train on what several methods keep, at several fractions and seeds, and compare.

Every cell is one training run with a file of its own: a comparison that was cut off goes on where
it was. Test data are read once a cell, at its end, and decide nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datapruning.errors import SelectionError
from datapruning.scoring.score import score
from datapruning.selection.select import select
from datapruning.selection.table import ScoreTable
from prunelab.data.batches import num_batches
from prunelab.data.datasets import ImageSet
from prunelab.data.samples import ImageSamples
from prunelab.errors import RunError
from prunelab.networks import build_model
from prunelab.pages.units import mean_and_spread
from prunelab.runs.folder import write_file
from prunelab.runs.seeds import stream_seed
from prunelab.runs.threads import computing
from prunelab.training.loop import TrainingConfig, evaluate, train
from prunelab.training.task import ImageClassification
from sparsemodel.storage.sealed import read_sealed_json, sealed_json

FULL = "all data"
BUDGETS = ("epochs", "steps")
_MODEL, _TRAIN = 1, 2  # streams of the seed; scoring uses others


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        keep: fraction of the training side; 1 for FULL.
        budget: "epochs": as many passes as on all data, so fewer optimiser steps; "steps": as
            many optimiser steps as on all data, so more passes.
    """

    method: str
    keep: float
    seed: int
    budget: str

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.method.replace(' ', '-')}-k{self.keep:g}-{self.budget}-s{self.seed}"


def cells(
    methods: Sequence[str], keeps: Sequence[float], seeds: Sequence[int], budgets: Sequence[str]
) -> list[Cell]:
    """The grid, seed by seed, so that an early stop leaves whole seeds."""
    result = []
    for seed in seeds:
        result.append(Cell(FULL, 1.0, seed, "epochs"))
        for keep in keeps:
            for method in methods:
                result += [Cell(method, keep, seed, budget) for budget in budgets]
    return result


def compare_training(
    data: ImageSet,
    methods: Sequence[str],
    *,
    keeps: Sequence[float],
    seeds: Sequence[int],
    out: Path,
    model: str = "resnet8",
    training: TrainingConfig | None = None,
    scoring: Mapping[str, Any] | None = None,
    policy: str = "hardest",
    budgets: Sequence[str] = BUDGETS,
    threads: int = 1,
    progress: Callable[[str], None] = print,
) -> dict[Cell, dict[str, Any]]:
    """Score with each method and seed, select, train and test.

    Args:
        methods: names in METHODS; models for scores are trained with the seed as well.
        keeps: fractions in (0, 1).
        out: folder of tables and cells.
        training: of every cell; None: TrainingConfig().
        scoring: further arguments of `score`.
        policy: how scores become a subset.

    Returns:
        Cell -> test_accuracy, test_loss, steps, num_kept; or `refused`, why a selection was not
        possible.

    Raises:
        RunError: `out` holds cells of other settings.
    """
    config = training or TrainingConfig()
    samples = ImageSamples.of(data)
    grid = cells(methods, keeps, seeds, budgets)
    signature = _signature(samples, model, config, scoring or {}, policy)
    (out / "cells").mkdir(parents=True, exist_ok=True)
    tables: dict[int, dict[str, ScoreTable]] = {}
    results = {}
    for number, cell in enumerate(grid, 1):
        path = out / "cells" / f"{cell.name}.json"
        result = read_cell(path, signature)
        if result is None:
            if cell.method != FULL and cell.seed not in tables:
                progress(f"scoring, seed {cell.seed}")
                tables[cell.seed] = score(
                    samples, method=list(methods), model=model, seed=cell.seed, threads=threads,
                    out=_several(out / f"scores-s{cell.seed}.parquet", methods),
                    **(scoring or {}),
                )  # fmt: skip
            table = None if cell.method == FULL else tables[cell.seed][cell.method]
            with computing(threads):
                result = _run(cell, data, samples, table, model=model, config=config, policy=policy)
            write_cell(path, signature, result)
        results[cell] = result
        accuracy = result.get("test_accuracy")
        shown = f"refused: {result['refused']}" if accuracy is None else f"{100 * accuracy:.2f} %"
        progress(f"{number}/{len(grid)} {cell.name}: {shown}")
    return results


def result_table(
    results: Mapping[Cell, Mapping[str, Any]], *, budget: str
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: test accuracy in % of each method at each fraction.

    Mean over seeds, with the sample standard deviation where there are at least two; a dash
    where a selection was refused for any seed.
    """
    keeps = sorted({cell.keep for cell in results if cell.method != FULL})
    methods = list(dict.fromkeys(cell.method for cell in results if cell.method != FULL))
    header = ["method", *(f"{100 * keep:g} % kept" for keep in keeps)]
    rows = [
        [
            method,
            *(
                mean_and_spread(
                    (
                        r.get("test_accuracy")
                        for c, r in results.items()
                        if (c.method, c.keep, c.budget) == (method, keep, budget)
                    ),
                    scale=100,
                )
                for keep in keeps
            ),
        ]
        for method in methods
    ]
    full = [r["test_accuracy"] for c, r in results.items() if c.method == FULL]
    rows.append([FULL, *([mean_and_spread(full, scale=100)] * len(keeps))])
    return header, rows


def read_cell(path: Path, signature: str) -> dict[str, Any] | None:
    """The result of a cell, or None.

    Raises:
        RunError: the file is of other settings, or damaged.
    """
    cure = "delete it, and it is run again"
    try:
        stored = read_sealed_json(path, of=f"cell {path.name}", error=RunError, cure=cure)
    except FileNotFoundError:
        return None
    if stored["settings"] != signature:
        raise RunError(f"{path} is of other settings; name another --out, or delete the folder")
    result: dict[str, Any] = stored["result"]
    return result


def write_cell(path: Path, signature: str, result: Mapping[str, Any]) -> None:
    """Keep the result of a cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"settings": signature, "result": dict(result)}
    write_file(path, sealed_json(f"cell {path.name}", values))


def _several(path: Path, methods: Sequence[str]) -> Path:
    """One method's table must carry its name too, as those of several do."""
    return path.with_name(f"{path.stem}-{methods[0]}.parquet") if len(methods) == 1 else path


def _signature(
    samples: ImageSamples,
    model: str,
    config: TrainingConfig,
    scoring: Mapping[str, Any],
    policy: str,
) -> str:
    settings = {
        "data": samples.fingerprint,
        "model": model,
        "training": config.signature(),
        "scoring": repr(sorted(scoring.items())),
        "policy": policy,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _run(
    cell: Cell,
    data: ImageSet,
    samples: ImageSamples,
    table: ScoreTable | None,
    *,
    model: str,
    config: TrainingConfig,
    policy: str,
) -> dict[str, Any]:
    rows = None
    if table is not None:
        try:
            kept = select(table, keep=cell.keep, seed=cell.seed, policy=_policy(cell, policy))
        except SelectionError as error:
            return {"refused": str(error)}
        rows = kept.rows(samples)
    if cell.budget == "steps":
        config = replace(config, steps=full_steps(len(samples), config))
    network = build_model(
        model,
        num_classes=data.num_classes,
        input_shape=data.input_shape,
        seed=stream_seed(cell.seed, _MODEL),
    )
    task = ImageClassification()
    result = train(
        network, samples, task, config=config, seed=stream_seed(cell.seed, _TRAIN), rows=rows
    )
    test = ImageSamples(data.test_images, data.test_labels)
    found = evaluate(network, test, task)
    return {
        "test_accuracy": found.accuracy,
        "test_loss": found.loss,
        "steps": result.steps,
        "num_kept": len(samples) if rows is None else len(rows),
    }


def full_steps(num_samples: int, config: TrainingConfig) -> int:
    """Optimiser steps of `config` on all samples."""
    return config.epochs * num_batches(num_samples, batch_size=config.batch_size)


def _policy(cell: Cell, policy: str) -> str:
    return "random" if cell.method == "random" else policy
