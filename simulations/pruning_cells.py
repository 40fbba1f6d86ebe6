"""What experiments on data pruning share: cells kept in files, a training, a page's head."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from prunelab.data.datasets import ImageSet
from prunelab.data.samples import ImageSamples
from prunelab.networks import build_model
from prunelab.pages.units import mean_and_spread
from prunelab.runs.provenance import commit
from prunelab.runs.seeds import stream_seed
from prunelab.training.loop import TrainingConfig, evaluate, train
from prunelab.training.task import ImageClassification
from simulations.command import Call
from simulations.page import page

Result = dict[str, Any]


def run_cells(
    cells: Mapping[str, Callable[[], Result]], out: Path, *, settings: Mapping[str, Any]
) -> dict[str, Result]:
    """Every cell's result; one that has its file is not run again.

    Raises:
        SystemExit: the folder holds cells of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    about, text = out / "settings.json", json.dumps(settings, sort_keys=True)
    if about.exists() and about.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{out} holds results of other settings; give another folder with --out")
    about.write_text(text, encoding="utf-8")
    results, started, run, at = {}, time.monotonic(), 0, commit()
    waiting = sum(not (out / f"{name}.json").exists() for name in cells)
    for name, cell in cells.items():
        path = out / f"{name}.json"
        if not path.exists():
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps({**cell(), "commit": at}), encoding="utf-8")
            partial.replace(path)
            run += 1
            left = (time.monotonic() - started) / run * (waiting - run)
            print(
                f"{run}/{waiting} {name}: {path.read_text()}, {left / 60:.0f} min left", flush=True
            )
        results[name] = json.loads(path.read_text(encoding="utf-8"))
    return results


def test_error(
    data: ImageSet,
    rows: Tensor | None,
    *,
    model: str,
    config: TrainingConfig,
    seed: int,
    device: str,
) -> float:
    """Train on some rows of the training side; the share of wrong answers on the test side."""
    network = build_model(
        model, num_classes=data.num_classes, input_shape=data.input_shape, seed=stream_seed(seed, 0)
    )
    task = ImageClassification()
    train(
        network, ImageSamples.of(data), task,
        config=config, seed=stream_seed(seed, 1), rows=rows, device=device,
    )  # fmt: skip
    test = ImageSamples(data.test_images, data.test_labels)
    return 1 - evaluate(network, test, task).accuracy


def percent(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation, in percent."""
    return mean_and_spread(values, ".1f", scale=100)


def errors_page(
    title: str,
    call: Call,
    data: ImageSet,
    results: Mapping[str, Result],
    *,
    body: Sequence[str],
    settings: Mapping[str, Any],
) -> str:
    """The page of an experiment whose cells' errors on the test side are compared."""
    return page(
        title,
        command=call.command,
        at=", ".join(sorted({result["commit"] for result in results.values()})),
        used=f", {call.threads} used",
        notes=[
            f"data: {data.name}, {len(data.train_labels)} training and {len(data.test_labels)} "
            f"test images, fingerprint {data.fingerprint}",
            "errors in percent, mean ± sample standard deviation over the seeds; a seed decides "
            "scores, subsets, initial weights and order",
            "test data are used once, after the last step, and decide nothing; nothing was tuned",
        ],
        body=body,
        settings=settings,
    )
