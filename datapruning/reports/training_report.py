"""The page report.html of a training run's folder, made from the files of the folder alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datapruning.reports.charts import balance_chart, class_chart, curve_chart
from datapruning.students.runner import RunSettings
from prunelab.pages.page import Fact, Figure, Page, Section
from prunelab.pages.page import settings as settings_part
from prunelab.pages.plots import takes_a_line
from prunelab.pages.units import NOTHING, format_bytes, format_seconds, percent, rounded
from prunelab.runs import folder as runfolder
from prunelab.runs.settings import flattened
from prunelab.runs.version import __version__


def write_run_report(folder: Path) -> Path:
    """Write report.html of a run folder, finished or not, and return its path.

    Raises:
        RunError: the folder holds no run of `datapruning train`, or cannot be written to.
    """
    settings = RunSettings.read(folder)
    is_finished = (folder / runfolder.SUMMARY).exists()
    summary = runfolder.read_summary(folder) if is_finished else {}
    page = _page(settings, summary, runfolder.read_metrics(folder))
    return page.write(folder / runfolder.REPORT)


def run_facts(summary: Mapping[str, Any]) -> list[Fact]:
    """Each result in a summary.json."""
    kept, total = summary["num_kept"], summary["num_samples"]
    how = " by ".join(part for part in (summary["policy"], summary["method"]) if part)
    share = f"{percent(kept / total)} of {total:,}" + f", {how}" * bool(how)
    epochs = f"{summary['epochs']} epoch" + "s" * (summary["epochs"] != 1)
    facts = [
        Fact("test accuracy", percent(summary["test_accuracy"]), "test data, read once"),
        Fact("test loss", rounded(summary["test_loss"])),
        Fact("samples", f"{kept:,}", share),
        Fact("optimiser steps", f"{summary['steps']:,}", epochs),
    ]
    if summary["alpha"] is not None:
        chosen = "chosen on held-out training samples" if summary["alpha_curve"] else "as given"
        facts.append(Fact("alpha", rounded(summary["alpha"]), chosen))
    facts += [
        Fact("time", format_seconds(summary["seconds"])),
        Fact("peak memory", format_bytes(summary["peak_rss_bytes"]), "resident set"),
    ]
    return facts


def _page(settings: RunSettings, summary: Mapping[str, Any], lines: list[dict[str, Any]]) -> Page:
    name = Path(settings.dataset).name
    banner = ""
    if not summary:
        banner = f"Run not finished: {len(lines)} epochs so far. Continue it with --resume."
    kept = f"{summary['num_kept']:,} samples" if summary else "training"
    configuration = settings_part(_used(settings, summary), top="run")
    return Page(
        product="datapruning",
        kind="training run",
        heading=f"{settings.model} on {name}",
        subtitle=f"{kept} · seed {settings.seed}",
        banner=banner,
        facts=run_facts(summary) if summary else [],
        sections=[
            _curve(lines),
            _alpha(summary),
            _balance(summary),
            _classes(summary),
            Section("Configuration", [configuration], wide=True),
        ],
        footer=f"Made by datapruning {__version__} from the files of this folder. Test data were "
        "read once, after training.",
    )


def _used(settings: RunSettings, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting as it was used: what the file leaves to be worked out is worked out."""
    values = flattened(asdict(settings))
    values["subset"] = settings.subset or "none, all samples"
    values["kept"] = settings.kept or "all"
    values["teacher"] = settings.teacher or "none"
    if not settings.teacher:
        values |= dict.fromkeys(("alpha", "temperature"), "not used")
    if summary:
        values |= {f"training.{key}": summary[key] for key in ("epochs", "steps")}
        if settings.teacher:
            values["alpha"] = rounded(summary["alpha"])
    return values


def _curve(lines: list[dict[str, Any]]) -> Section | None:
    if not lines:
        return None
    epochs = [line["epoch"] for line in lines]
    accuracies = [100 * line["train_accuracy"] for line in lines]
    label = f"Training accuracy by epoch: {accuracies[-1]:.2f} % in epoch {epochs[-1]}"
    chart = curve_chart(
        epochs,
        accuracies,
        name="training accuracy",
        xlabel="epoch",
        ylabel="training accuracy, %",
        label=label,
    )
    note = "On the kept samples, as the model was while it trained on them."
    return Section("Training accuracy by epoch", [Figure(chart, note)])


def _alpha(summary: Mapping[str, Any]) -> Section | None:
    points = summary.get("alpha_curve")
    if not points:
        return None
    alphas = [point["alpha"] for point in points]
    accuracies = [100 * point["accuracy"] for point in points]
    note = (
        f"Accuracy on {summary['num_held_out']} held-out training samples; alpha "
        f"{summary['alpha']:g} was taken. Test data had no part in it."
    )
    chart = curve_chart(
        alphas,
        accuracies,
        name="held-out accuracy",
        xlabel="alpha (weight of the teacher)",
        ylabel="held-out accuracy, %",
        label=f"Choice of alpha: {note}",
        marked=summary["alpha"],
    )
    return Section("Choice of alpha", [Figure(chart, note)])


def _balance(summary: Mapping[str, Any]) -> Section | None:
    if not summary or summary["num_kept"] == summary["num_samples"]:
        return None
    before, after = summary["class_counts"], summary["class_counts_kept"]
    title = "Class balance before and after"
    figure = Figure(balance_chart(before, after, label=title))
    return Section(title, [figure], wide=takes_a_line(len(before)))


def _classes(summary: Mapping[str, Any]) -> Section | None:
    if not summary:
        return None
    values = summary["test_accuracy_by_class"]
    known = [value for value in values if value is not None and math.isfinite(value)]
    lowest = percent(min(known)) if known else NOTHING
    label = f"Test accuracy by class: lowest {lowest}"
    chart = class_chart(values, summary["class_counts_kept"], label=label)
    figure = Figure(chart, f"Lowest: {lowest}.")
    return Section("Test accuracy by class", [figure], wide=takes_a_line(len(values)))
