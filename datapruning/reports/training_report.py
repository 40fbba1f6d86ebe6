"""The page report.html of a training run's folder, made from the files of the folder alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datapruning.reports.charts import balance_chart, class_chart, curve_chart
from datapruning.students.runner import RunSettings
from prunelab.errors import RunError
from prunelab.pages import page
from prunelab.pages.units import NOTHING, format_bytes, format_seconds, percent, rounded
from prunelab.runs import folder as runfolder
from prunelab.runs.version import __version__
from sparsemodel.storage.files import write_atomically


def write_run_report(folder: Path) -> Path:
    """Write report.html of a run folder, finished or not, and return its path.

    Raises:
        RunError: the folder holds no run of `datapruning train`, or cannot be written to.
    """
    settings = RunSettings.read(folder)
    is_finished = (folder / runfolder.SUMMARY).exists()
    summary = runfolder.read_summary(folder) if is_finished else {}
    lines = runfolder.read_metrics(folder)
    content = _page(settings, summary, lines).encode("utf-8", "replace")
    try:
        write_atomically(folder / runfolder.REPORT, content)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}") from None
    return folder / runfolder.REPORT


def run_facts(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, note) of each result in a summary.json."""
    kept, total = summary["num_kept"], summary["num_samples"]
    how = " by ".join(part for part in (summary["policy"], summary["method"]) if part)
    facts = [
        ("test accuracy", percent(summary["test_accuracy"]), "test data, read once"),
        ("test loss", rounded(summary["test_loss"]), ""),
        ("samples", f"{kept:,}", f"{percent(kept / total)} of {total:,}" + f", {how}" * bool(how)),
        ("optimiser steps", f"{summary['steps']:,}", f"{summary['epochs']} epochs"),
    ]
    if summary["alpha"] is not None:
        chosen = "chosen on held-out training samples" if summary["alpha_curve"] else "as given"
        facts.append(("alpha", rounded(summary["alpha"]), chosen))
    facts += [
        ("time", format_seconds(summary["seconds"]), ""),
        ("peak memory", format_bytes(summary["peak_rss_bytes"]), "resident set"),
    ]
    return facts


def _page(settings: RunSettings, summary: Mapping[str, Any], lines: list[dict[str, Any]]) -> str:
    name = Path(settings.dataset).name
    banner = ""
    if not summary:
        banner = f"Run not finished: {len(lines)} epochs so far. Continue it with --resume."
    sections = [_curve(lines), _alpha(summary), _balance(summary), _classes(summary)]
    sections.append(_settings(settings))
    grid = "\n".join(part for part in sections if part)
    tiles = page.tiles(run_facts(summary)) if summary else ""
    kept = f"{summary['num_kept']:,} samples" if summary else "training"
    return page.document(
        f"{settings.model} on {name} – datapruning",
        brand="datapruning training run",
        heading=f"{settings.model} on {name}",
        subtitle=f"{kept} · seed {settings.seed}",
        banner=banner,
        content=f'{tiles}\n<div class="grid">\n{grid}\n</div>',
        footer=f"Made by datapruning {__version__} from the files of this folder. Test data were "
        "read once, after training.",
    )


def _curve(lines: list[dict[str, Any]]) -> str:
    if not lines:
        return ""
    epochs = [line["epoch"] for line in lines]
    accuracies = [100 * line["train_accuracy"] for line in lines]
    label = f"Training accuracy by epoch: {accuracies[-1]:.2f} % in epoch {epochs[-1]}"
    chart = curve_chart(
        epochs,
        [("training accuracy", accuracies)],
        xlabel="epoch",
        ylabel="training accuracy, %",
        label=label,
    )
    note = "On the kept samples, as the model was while it trained on them."
    return page.section("Training accuracy by epoch", page.figure(chart, note))


def _alpha(summary: Mapping[str, Any]) -> str:
    points = summary.get("alpha_curve")
    if not points:
        return ""
    alphas = [point["alpha"] for point in points]
    accuracies = [100 * point["accuracy"] for point in points]
    note = (
        f"Accuracy on {summary['num_held_out']} held-out training samples; alpha "
        f"{summary['alpha']:g} was taken. Test data had no part in it."
    )
    chart = curve_chart(
        alphas,
        [("held-out accuracy", accuracies)],
        xlabel="alpha (weight of the teacher)",
        ylabel="held-out accuracy, %",
        label=f"Choice of alpha: {note}",
        marked=summary["alpha"],
    )
    return page.section("Choice of alpha", page.figure(chart, note))


def _balance(summary: Mapping[str, Any]) -> str:
    if not summary or summary["num_kept"] == summary["num_samples"]:
        return ""
    before, after = summary["class_counts"], summary["class_counts_kept"]
    chart = balance_chart(before, after, label="Class balance before and after")
    return page.section("Class balance before and after", page.figure(chart))


def _classes(summary: Mapping[str, Any]) -> str:
    if not summary:
        return ""
    values = summary["test_accuracy_by_class"]
    known = [value for value in values if value is not None and math.isfinite(value)]
    lowest = percent(min(known)) if known else NOTHING
    label = f"Test accuracy by class: lowest {lowest}"
    chart = class_chart(values, summary["class_counts_kept"], label=label)
    return page.section("Test accuracy by class", page.figure(chart, f"Lowest: {lowest}."))


def _settings(settings: RunSettings) -> str:
    values = {key: value for key, value in vars(settings).items() if key != "training"}
    tables = [("run", values), ("training", vars(settings.training))]
    parts = [
        page.table(
            ["setting", "value"],
            [[key, NOTHING if v in ("", None) else str(v)] for key, v in part.items()],
            caption=caption,
        )
        for caption, part in tables
    ]
    return page.section("Configuration", f'<div class="settings">{"".join(parts)}</div>', wide=True)
