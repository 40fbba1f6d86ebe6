"""The page that shows scores: pictures, histograms, agreement, class balance, provenance.

The page is one file: its styles, charts and pictures are inside, it loads nothing and runs no
script. It is made from the tables (and the data set) alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from datapruning.errors import ScoreError, SelectionError
from datapruning.reports.charts import (
    FEW_METHODS,
    LARGEST,
    balance_chart,
    histogram_chart,
    matrix_chart,
)
from datapruning.scoring.methods import METHODS
from datapruning.scoring.score import dense_path, noted_times, processor_seconds
from datapruning.selection.agreement import KEEPS, Agreement, agreement, common_scores
from datapruning.selection.select import select
from datapruning.selection.table import ScoreTable, Subset
from prunelab.data.given import load_sample_set
from prunelab.data.reading import reading
from prunelab.data.samples import ImageSamples, Samples
from prunelab.data.streamed import StreamedImages, stream
from prunelab.errors import PrunelabError
from prunelab.pages.page import (
    Fact,
    Figure,
    Gallery,
    GalleryRow,
    Page,
    Pair,
    Picture,
    Section,
    Table,
    Text,
    settings,
)
from prunelab.pages.pictures import extremes, pictures
from prunelab.pages.plots import takes_a_line
from prunelab.pages.units import NOTHING, format_seconds, percent, rounded
from prunelab.runs.settings import flattened
from prunelab.runs.version import __version__

KEEP = 0.5
PICTURES = 10
"""Samples of a class at either end; a page of several tables shows half as many of each."""
MOST_CLASSES = 20


def report_path(table: Path) -> Path:
    """Where a table's report goes: beside it."""
    return table.with_suffix(".html")


def write_score_report(
    paths: Sequence[Path], target: Path, *, subset: Subset | None = None
) -> Path:
    """Write the report of one or more tables of the same data, and return its path.

    Args:
        paths: parquet files. A sparse proxy's dense table and times are found beside it.
        subset: what was kept; None: the page shows what the hardest half by each table would be.

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


@dataclass(frozen=True)
class _Shown:
    """A table on the page, and the selection that is shown with it."""

    path: Path
    table: ScoreTable
    kept: Subset | None
    is_example: bool

    @property
    def how(self) -> str:
        """By what the samples were kept, in words."""
        if self.is_example or self.kept is None:
            return f"the hardest {100 * KEEP:.0f} % by {self.table.method}"
        return f"{self.kept.policy} by {self.kept.method}" if self.kept.method else self.kept.policy


def _page(tables: Sequence[ScoreTable], paths: Sequence[Path], subset: Subset | None) -> Page:
    first = tables[0]
    shown = [
        _Shown(path, table, *_kept(table, subset))
        for path, table in zip(paths, tables, strict=True)
    ]
    methods = ", ".join(table.method for table in tables)
    heading = f"{methods} on {first.dataset}" if len(tables) < 4 else f"Scores of {first.dataset}"
    notes = [note for table in tables for note in table.provenance.get("notes", [])]
    # A selection is of all the tables, what would be kept is of each.
    balances = shown if subset is None else shown[:1]
    return Page(
        product="datapruning",
        kind="scores",
        heading=heading,
        subtitle=f"{len(first):,} samples · seed {first.seed} · fingerprint {first.fingerprint}",
        banner=" ".join(notes),
        facts=_facts(shown),
        sections=[
            _summaries(shown),
            *map(_histogram, shown),
            *map(_balance, balances),
            _agreement(tables),
            *(_proxy(table, path) for path, table in zip(paths, tables, strict=True)),
            *_galleries(tables),
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


def _facts(shown: Sequence[_Shown]) -> list[Fact]:
    first = shown[0]
    table, kept = first.table, first.kept
    facts = [Fact("samples", f"{len(table):,}", table.dataset)]
    if len(shown) == 1:
        median, spread, missing = _spread(table)
        facts += [
            Fact("method", table.method, _proxy_density(table)),
            Fact("model", table.model or "none"),
            Fact("median score", median, spread),
            Fact("not finite", missing, "scores"),
        ]
    else:
        facts.append(Fact("methods", str(len(shown))))
    facts.append(Fact("processor time", _time(shown), "training and scoring"))
    if kept is not None and not first.is_example:
        share = percent(len(kept) / len(table))
        facts.append(Fact("kept", f"{len(kept):,}", f"{share}, {kept.policy}"))
        drawn = kept.provenance.get("drawn", 0)
        facts.append(Fact("kept by chance", f"{drawn:,}", "drawn among equal scores"))
    return facts


def _spread(table: ScoreTable) -> tuple[str, str, str]:
    """Median, range, and the number of scores that are not finite."""
    known = table.scores[table.scores.isfinite()]
    missing = f"{len(table) - len(known):,}"
    if not len(known):
        return NOTHING, "", missing
    spread = f"{rounded(float(known.min()))} – {rounded(float(known.max()))}"
    return rounded(float(known.median())), spread, missing


def _proxy_density(table: ScoreTable) -> str:
    density = table.provenance.get("settings", {}).get("density")
    return "" if density is None else f"sparse proxy, density {density:g}"


def _time(shown: Sequence[_Shown]) -> str:
    """Processor time; methods that were scored together share it."""
    times = [noted_times(one.path) for one in shown]
    known = {tuple(time["methods"]): float(time["processor_seconds"]) for time in times if time}
    return format_seconds(sum(known.values())) if known and None not in times else NOTHING


def _summaries(shown: Sequence[_Shown]) -> Section | None:
    """A line for each of several tables."""
    if len(shown) < 2:
        return None
    rows = []
    for one in shown:
        model = ", ".join(filter(None, [one.table.model or "none", _proxy_density(one.table)]))
        drawn = NOTHING if one.kept is None else f"{one.kept.provenance.get('drawn', 0):,}"
        rows.append([one.table.method, model, *_spread(one.table), drawn])
    header = ["method", "model", "median", "range", "not finite", "kept by chance"]
    kept = next((one.kept for one in shown if one.kept is not None), None)
    note = (
        f"Kept by chance: of the hardest {100 * KEEP:.0f} %, those drawn among equal scores."
        if shown[0].is_example
        else f"Kept by chance: of the {0 if kept is None else len(kept):,} kept samples, those "
        "drawn among equal scores."
    )
    return Section("Methods", [Table(header, rows), Text(note, is_note=True)], wide=True)


def _histogram(shown: _Shown) -> Section:
    table, kept = shown.table, shown.kept
    title = f"Scores by {table.method}"
    known = table.scores.isfinite()
    if not bool(known.any()):
        return Section(title, [Text("No score is finite.")])
    if float(table.scores[known].abs().max()) > LARGEST:
        return Section(title, [Text(f"No chart: scores beyond ±{LARGEST:g} have no scale.")])
    inside = None
    if kept is not None:
        inside = table.scores[known & torch.isin(table.ids, kept.ids)].numpy()
    known_method = METHODS.get(table.method)
    note = "" if known_method is None else known_method.summary
    if kept is not None:
        note += f" Below: the share of the samples of a bin that is kept, {shown.how}."
        if drawn := kept.provenance.get("drawn", 0):
            note += (
                f" {drawn:,} of the {len(kept):,} were drawn by chance: others that are not kept "
                "have the same scores."
            )
    chart = histogram_chart(
        table.scores[known].numpy(),
        inside,
        name=table.method,
        label=f"{title}: {int(known.sum())} samples",
    )
    return Section(title, [Figure(chart, note.strip())])


def _balance(shown: _Shown) -> Section | None:
    table, kept = shown.table, shown.kept
    if table.labels is None or kept is None:
        return None
    before, after = class_counts(table, kept)
    what = (
        f"What {shown.how} would be."
        if shown.is_example
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
    by = f" by {table.method}" if shown.is_example else ""
    title = f"Class balance before and after{by}"
    chart = balance_chart(before, after, label=f"{title}: {what}")
    return Section(title, [Figure(chart, what)], wide=takes_a_line(len(before)))


def _agreement(tables: Sequence[ScoreTable]) -> Section | None:
    if len(tables) < 2:
        return None
    names = [table.method for table in tables]
    matrix = [[1.0] * len(tables) for _ in tables]
    rows = []
    for i, j in combinations(range(len(tables)), 2):
        rank, shares = math.nan, [NOTHING] * len(KEEPS)
        if len(common_scores(tables[i], tables[j])[0]):
            found = agreement(tables[i], tables[j])
            rank, shares = found.spearman, [percent(share) for share in found.overlap.values()]
        matrix[i][j] = matrix[j][i] = rank
        rows.append([f"{names[i]}, {names[j]}", rounded(rank, ".3f"), *shares])
    header = ["methods", "Spearman", *(f"both keep, at {100 * k:.0f} %" for k in KEEPS)]
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


def _galleries(tables: Sequence[ScoreTable]) -> list[Section]:
    """The most and the least kept samples of each class, by each table."""
    samples, names = _scored(tables[0])
    if samples is None or tables[0].labels is None:
        gone = "No pictures: the data set is not at hand, or is not the one that was scored."
        return [Section("Most and least kept", [Text(gone)], wide=True)]
    count = PICTURES if len(tables) == 1 else PICTURES // 2
    return [_gallery(table, samples, names, count=count) for table in tables]


def _gallery(
    table: ScoreTable, samples: ImageSamples | StreamedImages, names: Sequence[str], *, count: int
) -> Section:
    assert table.labels is not None, "tables of the same data have the same labels"
    classes = table.labels.unique().tolist()
    rows = []
    for label in classes[:MOST_CLASSES]:
        named = f"{label} ({names[label]})" if label < len(names) else str(label)
        groups = [
            _pictures(table, samples, side, named=named)
            for side in extremes(table.scores, table.labels, label, count=count)
        ]
        rows.append(GalleryRow(f"class {named}", groups))
    gallery = Gallery(["least kept, lowest first", "most kept, highest first"], rows)
    what = "Below each picture stands the sample's id."
    if len(classes) > MOST_CLASSES:
        what += f" The first {MOST_CLASSES} of {len(classes)} classes."
    title = f"Most and least kept by {table.method}"
    return Section(title, [Text(what, is_note=True), gallery], wide=True)


def _pictures(
    table: ScoreTable, samples: ImageSamples | StreamedImages, rows: Tensor, *, named: str
) -> list[Picture]:
    ids, scores = table.ids[rows].tolist(), table.scores[rows].tolist()
    alts = [
        f"sample {name}, class {named}, score {score:.3g}"
        for name, score in zip(ids, scores, strict=True)
    ]
    images = samples.images[rows] if isinstance(samples, ImageSamples) else samples.pixels(rows)
    return pictures(images, list(map(str, ids)), alts)


def _scored(table: ScoreTable) -> tuple[ImageSamples | StreamedImages | None, Sequence[str]]:
    """The images that were scored, if they can be loaded and are the same; names of classes."""
    source = table.provenance.get("source")
    if not source:
        return None, ()
    samples: Samples
    try:
        if isinstance(source, dict):
            streamed = stream(**source)
            samples, names = streamed, streamed.class_names
        else:
            how = table.provenance.get("reading")
            dataset = load_sample_set(source, how=reading(**(how or {"test_share": 0})))
            samples, names = dataset.train, dataset.class_names
        if not isinstance(samples, ImageSamples | StreamedImages):
            return None, names
        if isinstance(samples, ImageSamples) and samples.images.dim() != 4:
            return None, names
        is_same = samples.fingerprint == table.fingerprint and torch.equal(samples.ids, table.ids)
    except (PrunelabError, OSError):
        return None, ()
    return (samples if is_same else None), names


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
        method = METHODS.get(table.method)
        trained = 0 if method is None else method.runs
        models = str(values.get("runs") or trained) if trained > 1 else str(trained or NOTHING)
        rows.append([table.method, table.model or "none", models, ", ".join(options) or "none"])
    own = ("method", "options", "seed")
    shared = {key: value for key, value in flat[0].items() if key.partition(".")[0] not in own}
    # What was left to be worked out, as it was: no density is a dense network.
    unset = {"density": "1 (dense)", "runs": "each method's own", "training.steps": "by epochs"}
    shared |= {key: text for key, text in unset.items() if key in shared and shared[key] is None}
    parts = [
        Table(["method", "model", "models trained", "options"], rows),
        Text(
            f"Scored by datapruning {tables[0].provenance.get('version', NOTHING)}.", is_note=True
        ),
        settings({"seed": tables[0].seed, **shared}, top="scores"),
    ]
    return Section("Provenance", parts, wide=True)
