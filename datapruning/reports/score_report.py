"""The page that shows scores: pictures, histograms, agreement, class balance, provenance.

The page is one file: its styles, charts and pictures are inside, it loads nothing and runs no
script. It is made from the tables (and the data set) alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from datapruning.errors import ScoreError, SelectionError
from datapruning.reports.charts import FEW_METHODS, balance_chart, histogram_chart, matrix_chart
from datapruning.scoring.methods import METHODS
from datapruning.scoring.score import dense_path, processor_seconds
from datapruning.selection.agreement import Agreement, agreement
from datapruning.selection.select import select
from datapruning.selection.table import ScoreTable, Subset
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.errors import PrunelabError
from prunelab.pages.page import (
    Fact,
    Figure,
    Gallery,
    GalleryRow,
    Page,
    Pair,
    Section,
    Strip,
    Table,
    Text,
    settings,
)
from prunelab.pages.pictures import extremes, strip
from prunelab.pages.units import NOTHING, format_seconds, percent, rounded
from prunelab.runs.settings import flattened
from prunelab.runs.version import __version__

KEEP = 0.5
PICTURES = 10
MOST_CLASSES = 20


def report_path(table: Path) -> Path:
    """Where a table's report goes: beside it."""
    return table.with_suffix(".html")


def write_score_report(
    paths: Sequence[Path], target: Path, *, subset: Subset | None = None
) -> Path:
    """Write the report of one or more tables of the same data, and return its path.

    Args:
        paths: parquet files; the first is shown in most detail. A sparse proxy's dense table and
            times are found beside it.
        subset: what was kept; None: the page shows what the hardest half would be.

    Raises:
        ScoreError: not tables, or of different data.
        RunError: the page cannot be written.
    """
    tables = [ScoreTable.read(path) for path in paths]
    for table in tables[1:]:
        if table.fingerprint != tables[0].fingerprint:
            raise ScoreError(
                f"{paths[0]} and the table of {table.method} are of different data "
                f"({tables[0].fingerprint} and {table.fingerprint}); report them apart"
            )
    return _page(tables, paths, subset).write(target)


def proxy_check(path: Path) -> tuple[Agreement, float | None] | None:
    """A sparse proxy's agreement with the dense table beside it, and its share of the time.

    None where there is no dense table of the same samples. The share is of processor time.
    """
    if not dense_path(path).exists():
        return None
    found = agreement(ScoreTable.read(path), ScoreTable.read(dense_path(path)))
    sparse, dense = processor_seconds(path), processor_seconds(dense_path(path))
    return found, None if not sparse or not dense else sparse / dense


def class_counts(table: ScoreTable, kept: Subset) -> tuple[list[int], list[int]]:
    """Samples of each class in the table, and in the subset.

    Raises:
        SelectionError: the table has no labels.
    """
    if table.labels is None:
        raise SelectionError("this table has no labels, so there are no classes to count")
    num_classes = int(table.labels.max()) + 1
    inside = torch.isin(table.ids, kept.ids)
    before = table.labels.bincount(minlength=num_classes).tolist()
    return before, table.labels[inside].bincount(minlength=num_classes).tolist()


def _page(tables: Sequence[ScoreTable], paths: Sequence[Path], subset: Subset | None) -> Page:
    first = tables[0]
    shown, is_example = _kept(first, subset)
    methods = ", ".join(table.method for table in tables)
    heading = f"{methods} on {first.dataset}" if len(tables) < 4 else f"Scores of {first.dataset}"
    notes = [note for table in tables for note in table.provenance.get("notes", [])]
    return Page(
        product="datapruning",
        kind="scores",
        heading=heading,
        subtitle=f"{len(first):,} samples · seed {first.seed} · fingerprint {first.fingerprint}",
        banner=" ".join(notes),
        facts=_facts(first, paths[0], shown, is_example),
        sections=[
            *(_histogram(table, shown, is_example=is_example) for table in tables),
            _balance(first, shown, is_example=is_example),
            _agreement(tables),
            _proxy(first, paths[0]),
            _pictures(first),
            _provenance(tables),
        ],
        footer=f"Made by datapruning {__version__}. Only the training side was looked at; "
        "a high score means keep.",
    )


def _kept(table: ScoreTable, subset: Subset | None) -> tuple[Subset | None, bool]:
    """The subset to show, and whether it is only an example."""
    if subset is not None:
        if subset.fingerprint != table.fingerprint:
            raise SelectionError(
                f"the subset is of other data (fingerprint {subset.fingerprint}, the scores' "
                f"{table.fingerprint}); select from these scores"
            )
        return subset, False
    try:
        return select(table, keep=KEEP, seed=0), True
    except SelectionError:
        return None, True


def _facts(table: ScoreTable, path: Path, kept: Subset | None, is_example: bool) -> list[Fact]:
    known = table.scores[table.scores.isfinite()]
    spread = f"{rounded(float(known.min()))} – {rounded(float(known.max()))}" if len(known) else ""
    density = table.provenance.get("settings", {}).get("density")
    proxy = "" if density is None else f"sparse proxy, density {density:g}"
    facts = [
        Fact("samples", f"{len(table):,}", table.dataset),
        Fact("method", table.method, proxy),
        Fact("model", table.model or "none"),
        Fact("median score", rounded(float(known.median())) if len(known) else NOTHING, spread),
        Fact("not finite", f"{len(table) - len(known):,}", "scores"),
        Fact("processor time", format_seconds(processor_seconds(path)), "training and scoring"),
    ]
    if kept is not None and not is_example:
        share = percent(len(kept) / len(table))
        facts.append(Fact("kept", f"{len(kept):,}", f"{share}, {kept.policy}"))
    return facts


def _histogram(table: ScoreTable, kept: Subset | None, *, is_example: bool) -> Section:
    title = f"Scores by {table.method}"
    known = table.scores.isfinite()
    if not bool(known.any()):
        return Section(title, [Text("No score is finite.")])
    inside = None
    if kept is not None:
        inside = table.scores[known & torch.isin(table.ids, kept.ids)].tolist()
    known_method = METHODS.get(table.method)
    summary = "" if known_method is None else known_method.summary
    how = kept and (f"{kept.policy} by {kept.method}" if kept.method else kept.policy)
    chart = histogram_chart(
        table.scores[known].tolist(),
        inside,
        name=table.method,
        kept_by=f"{how}, {100 * KEEP:.0f} %" if is_example else str(how),
        label=f"{title}: {int(known.sum())} samples",
    )
    return Section(title, [Figure(chart, summary)])


def _balance(table: ScoreTable, kept: Subset | None, *, is_example: bool) -> Section | None:
    if table.labels is None or kept is None:
        return None
    before, after = class_counts(table, kept)
    what = (
        f"What the hardest {100 * KEEP:.0f} % by {table.method} would be."
        if is_example
        else f"{len(kept):,} of {len(table):,} samples kept by {kept.policy}."
    )
    empty = [str(c) for c, (b, a) in enumerate(zip(before, after, strict=True)) if b and not a]
    if empty:
        what += f" No sample is left of class {', '.join(empty)}."
    largest = max((c for c in range(len(before)) if before[c]), key=lambda c: after[c] / before[c])
    least = min((c for c in range(len(before)) if before[c]), key=lambda c: after[c] / before[c])
    what += (
        f" Class {largest} keeps {percent(after[largest] / before[largest])} of its samples, "
        f"class {least} {percent(after[least] / before[least])}."
    )
    chart = balance_chart(before, after, label=f"Class balance: {what}")
    is_wide = len(before) > MOST_CLASSES
    return Section("Class balance before and after", [Figure(chart, what)], wide=is_wide)


def _agreement(tables: Sequence[ScoreTable]) -> Section | None:
    if len(tables) < 2:
        return None
    names = [table.method for table in tables]
    matrix = [[1.0] * len(tables) for _ in tables]
    rows = []
    for i, j in combinations(range(len(tables)), 2):
        found = agreement(tables[i], tables[j])
        matrix[i][j] = matrix[j][i] = found.spearman
        shares = [percent(share) for share in found.overlap.values()]
        rows.append([f"{names[i]}, {names[j]}", rounded(found.spearman, ".3f"), *shares])
    keeps = list(found.overlap)
    header = ["methods", "Spearman", *(f"both keep, at {100 * k:.0f} %" for k in keeps)]
    chart = matrix_chart(names, matrix, label="Agreement: rank correlations of the methods")
    table = Table(header, rows, scrolls="Agreement of methods")
    note = "Spearman's rank correlation. Unrelated scores share as much as the kept fraction."
    figure = Figure(chart, note)
    parts = [Pair(figure, table)] if len(tables) <= FEW_METHODS else [figure, table]
    return Section("Agreement between methods", parts, wide=True)


def _proxy(table: ScoreTable, path: Path) -> Section | None:
    found = proxy_check(path)
    if found is None:
        return None
    result, share = found
    density = table.provenance.get("settings", {}).get("density")
    rows = [["Spearman with the dense model's scores", rounded(result.spearman, ".3f")]]
    rows += [
        [f"kept by both, at {100 * keep:.0f} %", percent(overlap)]
        for keep, overlap in result.overlap.items()
    ]
    rows.append(["processor time of the dense model's", percent(share)])
    title = f"Sparse proxy (density {rounded(density)}) against the dense model"
    return Section(title, [Table(["", ""], rows)])


def _pictures(table: ScoreTable) -> Section:
    samples = _samples(table)
    if samples is None or table.labels is None:
        gone = "No pictures: the data set is not at hand, or is not the one that was scored."
        return Section("Most and least kept", [Text(gone)], wide=True)
    classes = table.labels.unique().tolist()
    rows = []
    for label in classes[:MOST_CLASSES]:
        sides = extremes(table.scores, table.labels, label, count=PICTURES)
        strips = [_strip_of(samples.images, side, table.scores) for side in sides]
        rows.append(GalleryRow(str(label), strips))
    gallery = Gallery(["class", "least kept (lowest first)", "most kept (highest first)"], rows)
    cut = [Text(f"The first {MOST_CLASSES} of {len(classes)} classes.")]
    parts = [*(cut if len(classes) > MOST_CLASSES else []), gallery]
    return Section(f"Most and least kept by {table.method}", parts, wide=True)


def _strip_of(images: Tensor, rows: Tensor, scores: Tensor) -> Strip:
    listed = ", ".join(f"{score:.3g}" for score in scores[rows].tolist())
    return strip(images[rows], note=f"scores {listed}")


def _samples(table: ScoreTable) -> ImageSamples | None:
    """The images that were scored, if they can be loaded and are the same."""
    source = table.provenance.get("source")
    if not source:
        return None
    try:
        samples = ImageSamples.of(load_dataset(source))
    except (PrunelabError, OSError):
        return None
    is_same = samples.fingerprint == table.fingerprint and torch.equal(samples.ids, table.ids)
    return samples if is_same else None


def _provenance(tables: Sequence[ScoreTable]) -> Section:
    """What each table has of its own, and what all of them share."""
    flat = [flattened(table.provenance.get("settings", {})) for table in tables]
    rows = []
    for table, values in zip(tables, flat, strict=True):
        options = [
            f"{key.partition('.')[2]} = {json.dumps(value)}"
            for key, value in values.items()
            if key.startswith("options.")
        ]
        rows.append([table.method, table.model or NOTHING, ", ".join(options)])
    own = ("method", "options", "seed")
    shared = {key: value for key, value in flat[0].items() if key.partition(".")[0] not in own}
    parts = [
        Table(["method", "model", "options"], rows),
        Text(
            f"Scored by datapruning {tables[0].provenance.get('version', NOTHING)}.", is_note=True
        ),
        settings({"seed": tables[0].seed, **shared}, top="scores"),
    ]
    return Section("Provenance", parts, wide=True)
