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
from datapruning.scoring.parts import flattened
from datapruning.scoring.score import dense_path, times_path
from datapruning.selection.agreement import Agreement, agreement
from datapruning.selection.select import select
from datapruning.selection.table import ScoreTable, Subset
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples
from prunelab.errors import PrunelabError, RunError
from prunelab.pages import page
from prunelab.pages.pictures import extremes, strip
from prunelab.pages.units import NOTHING, format_seconds, percent, rounded
from prunelab.runs.version import __version__
from sparsemodel.storage.files import write_atomically

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
    content = _page(tables, paths, subset).encode("utf-8", "replace")
    try:
        write_atomically(target, content)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror}") from None
    return target


def proxy_check(path: Path) -> tuple[Agreement, float | None] | None:
    """A sparse proxy's agreement with the dense table beside it, and its share of the time.

    None where there is no dense table of the same samples. The share is of processor time.
    """
    if not dense_path(path).exists():
        return None
    found = agreement(ScoreTable.read(path), ScoreTable.read(dense_path(path)))
    sparse, dense = _seconds(path), _seconds(dense_path(path))
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


def _page(tables: Sequence[ScoreTable], paths: Sequence[Path], subset: Subset | None) -> str:
    first = tables[0]
    shown, is_example = _kept(first, subset)
    methods = ", ".join(table.method for table in tables)
    heading = f"{methods} on {first.dataset}" if len(tables) < 4 else f"Scores of {first.dataset}"
    notes = [note for table in tables for note in table.provenance.get("notes", [])]
    sections = [
        *(_histogram(table, shown, is_example=is_example) for table in tables),
        _balance(first, shown, is_example=is_example),
        _agreement(tables),
        _proxy(first, paths[0]),
        _pictures(first),
        _settings(tables),
    ]
    grid = "\n".join(part for part in sections if part)
    return page.document(
        f"{heading} – datapruning",
        brand="datapruning scores",
        heading=heading,
        subtitle=f"{len(first):,} samples · seed {first.seed} · fingerprint {first.fingerprint}",
        banner=" ".join(notes),
        content=f'{page.tiles(_facts(first, paths[0], shown, is_example))}\n<div class="grid">\n'
        f"{grid}\n</div>",
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


def _facts(
    table: ScoreTable, path: Path, kept: Subset | None, is_example: bool
) -> list[tuple[str, str, str]]:
    settings = table.provenance.get("settings", {})
    known = table.scores[table.scores.isfinite()]
    spread = f"{rounded(float(known.min()))} – {rounded(float(known.max()))}" if len(known) else ""
    density = settings.get("density")
    facts = [
        ("samples", f"{len(table):,}", table.dataset),
        ("method", table.method, "" if density is None else f"sparse proxy, density {density:g}"),
        ("model", table.model or "none", ""),
        ("median score", rounded(float(known.median())) if len(known) else NOTHING, spread),
        ("not finite", f"{len(table) - len(known):,}", "scores"),
        ("processor time", format_seconds(_seconds(path)), "training and scoring"),
    ]
    if kept is not None and not is_example:
        share = percent(len(kept) / len(table))
        facts.append(("kept", f"{len(kept):,}", f"{share}, {kept.policy}"))
    return facts


def _histogram(table: ScoreTable, kept: Subset | None, *, is_example: bool) -> str:
    known = table.scores.isfinite()
    if not bool(known.any()):
        return page.section(f"Scores by {table.method}", "<p>No score is finite.</p>")
    inside = None
    if kept is not None:
        inside = table.scores[known & torch.isin(table.ids, kept.ids)].tolist()
    known_method = METHODS.get(table.method)
    summary = "" if known_method is None else known_method.summary
    label = f"Scores by {table.method}: {int(known.sum())} samples"
    how = kept and (f"{kept.policy} by {kept.method}" if kept.method else kept.policy)
    chart = histogram_chart(
        table.scores[known].tolist(),
        inside,
        name=table.method,
        kept_by=f"{how}, {100 * KEEP:.0f} %" if is_example else str(how),
        label=label,
    )
    return page.section(f"Scores by {table.method}", page.figure(chart, summary))


def _balance(table: ScoreTable, kept: Subset | None, *, is_example: bool) -> str:
    if table.labels is None or kept is None:
        return ""
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
    return page.section("Class balance before and after", page.figure(chart, what), wide=is_wide)


def _agreement(tables: Sequence[ScoreTable]) -> str:
    if len(tables) < 2:
        return ""
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
    table = page.table(header, rows, scrolls="Agreement of methods")
    note = "Spearman's rank correlation. Unrelated scores share as much as the kept fraction."
    content = page.figure(chart, note) + table
    if len(tables) <= FEW_METHODS:
        content = f'<div class="pair">{content}</div>'
    return page.section("Agreement between methods", content, wide=True)


def _proxy(table: ScoreTable, path: Path) -> str:
    found = proxy_check(path)
    if found is None:
        return ""
    result, share = found
    density = table.provenance.get("settings", {}).get("density")
    rows = [["Spearman with the dense model's scores", rounded(result.spearman, ".3f")]]
    rows += [
        [f"kept by both, at {100 * keep:.0f} %", percent(overlap)]
        for keep, overlap in result.overlap.items()
    ]
    rows.append(["processor time of the dense model's", percent(share)])
    title = f"Sparse proxy (density {rounded(density)}) against the dense model"
    return page.section(title, page.table(["", ""], rows))


def _pictures(table: ScoreTable) -> str:
    samples = _samples(table)
    if samples is None or table.labels is None:
        return page.section(
            "Most and least kept",
            "<p>No pictures: the data set is not at hand, or is not the one that was scored.</p>",
            wide=True,
        )
    cells = ['<span class="head">class</span><span class="head">least kept (lowest first)</span>'
             '<span class="head">most kept (highest first)</span>']  # fmt: skip
    classes = table.labels.unique().tolist()
    for label in classes[:MOST_CLASSES]:
        low, high = extremes(table.scores, table.labels, label, count=PICTURES)
        cells.append(f"<span>{label}</span>")
        cells += [_strip_of(samples.images, rows, table.scores) for rows in (low, high)]
    note = ""
    if len(classes) > MOST_CLASSES:
        note = f"<p>The first {MOST_CLASSES} of {len(classes)} classes.</p>"
    title = f"Most and least kept by {table.method}"
    return page.section(title, f'{note}<div class="pictures">{"".join(cells)}</div>', wide=True)


def _strip_of(images: Tensor, rows: Tensor, scores: Tensor) -> str:
    if not len(rows):
        return f"<span>{NOTHING}</span>"
    listed = ", ".join(f"{score:.3g}" for score in scores[rows].tolist())
    return f'<div title="{page.text("scores " + listed)}">{strip(images[rows])}</div>'


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


def _settings(tables: Sequence[ScoreTable]) -> str:
    """What all tables share, by section, and what each has of its own."""
    flat = [flattened(table.provenance.get("settings", {})) for table in tables]
    own = ("method", "options")
    shared: dict[str, list[list[str]]] = {"scores": [["seed", str(tables[0].seed)]]}
    for key, value in flat[0].items():
        section, _, name = key.rpartition(".")
        if key.partition(".")[0] not in (*own, "seed"):
            text = NOTHING if value is None else str(value)
            shared.setdefault(section or "scores", []).append([name, text])
    parts = [
        page.table(["setting", "value"], rows, caption=caption) for caption, rows in shared.items()
    ]
    methods = [
        [
            table.method,
            table.model or NOTHING,
            ", ".join(
                f"{key.partition('.')[2]} = {json.dumps(value)}"
                for key, value in values.items()
                if key.startswith("options.")
            ),
        ]
        for table, values in zip(tables, flat, strict=True)
    ]
    content = page.table(["method", "model", "options"], methods)
    version = tables[0].provenance.get("version", NOTHING)
    content += f'<p class="note">Scored by datapruning {page.text(version)}.</p>'
    return page.section(
        "Provenance", f'{content}<div class="settings">{"".join(parts)}</div>', wide=True
    )


def _seconds(path: Path) -> float | None:
    try:
        value = json.loads(times_path(path).read_text(encoding="utf-8"))["processor_seconds"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value)
