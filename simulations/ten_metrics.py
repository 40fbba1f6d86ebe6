"""The ten metrics of Sorscher et al., GraNd and random: what training on their choice is worth.

    python -m simulations.ten_metrics [--data FOLDER_OF_PARQUET]

Every method keeps its hardest samples, at several fractions, and each kept set is trained on at
equal epochs and at equal optimiser steps. `small` is for one core; `full` wants a GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from datapruning.students.comparison import FULL, Cell, compare_training, result_table
from prunelab.training.loop import TrainingConfig
from simulations.command import parse
from simulations.data_table import Preset, accuracy_page
from simulations.page import table

TEN = (
    "el2n",
    "el2n-20",
    "forgetting",
    "memorization",
    "influence-max",
    "influence-sum-abs",
    "ddd",
    "active-learning",
    "prototypes-supervised",
    "prototypes-ssl",
)
METHODS = (*TEN, "grand", "random")
PRESETS = {
    "small": Preset(
        "digits", "resnet8", 8, 64, 700, None,
        {"kept": (0.2, 0.5, 0.8), "runs": 8, "embedding": "pca"},
    ),
    "full": Preset(
        "cifar10", "resnet18", 100, 128, None, None,
        {"kept": (0.2, 0.5, 0.8), "runs": 20, "embedding": "simclr"},
    ),
}  # fmt: skip


def ranking(results: Mapping[Cell, Mapping[str, Any]], *, budget: str) -> list[list[str]]:
    """Methods by their mean distance to random, paired by seed and fraction, in points."""
    by = {
        (c.method, c.keep, c.seed): result["test_accuracy"]
        for c, result in results.items()
        if c.budget == budget and c.method != FULL and "test_accuracy" in result
    }
    gains: dict[str, list[float]] = {}
    for (method, keep, seed), accuracy in by.items():
        gains.setdefault(method, []).append(100 * (accuracy - by["random", keep, seed]))
    ordered = sorted(gains.items(), key=lambda entry: -statistics.mean(entry[1]))
    return [
        [method, f"{statistics.mean(g):+.2f}", f"{sum(x > 0 for x in g)} of {len(g)}"]
        for method, g in ordered
        if method != "random"
    ]


def main() -> None:
    call = parse("ten_metrics", list(PRESETS))
    preset = PRESETS[call.preset]
    data = call.load(preset.dataset, num_train=preset.num_train, num_test=preset.num_test)
    settings = preset.settings
    training = TrainingConfig(epochs=preset.epochs, batch_size=preset.batch_size)
    results = compare_training(
        data,
        METHODS,
        keeps=settings["kept"],
        seeds=call.seeds,
        out=call.out,
        model=preset.model,
        training=training,
        scoring={
            "training": training,
            "runs": settings["runs"],
            "options": {"embedding": settings["embedding"]},
        },
        progress=lambda line: print(line, flush=True),
    )
    body = [
        "Kept are the hardest samples by each method. `runs` models are trained for every method "
        "that averages over models or compares them, el2n-20 among them; the others train one. "
        "prototypes-ssl works in the space that `embedding` names; pca is a control, nothing "
        "learned.",
    ]
    for budget, meaning in (
        ("epochs", "as many passes as over all data, so fewer optimiser steps"),
        ("steps", "as many optimiser steps as on all data"),
    ):
        header, rows = result_table(results, budget=budget)
        body += ["", f"Equal {budget} ({meaning}):", "", table(header, rows)]
        ranked = ranking(results, budget=budget)
        body += ["", "Against random, paired by seed and fraction:", ""]
        body += [table(["method", "points over random", "pairs won"], ranked)]
    refused = sorted({f"{c.method}: {r['refused']}" for c, r in results.items() if "refused" in r})
    body += ["", *[f"- refused: {reason}" for reason in refused]]
    title = "Ten metrics of data pruning, GraNd and random"
    call.save(accuracy_page(title, call, preset, data, body=body))


if __name__ == "__main__":
    main()
