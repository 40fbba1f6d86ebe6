"""The page report.html of a run folder.

The page is one file: its styles and charts are inside, it loads nothing and runs no script.
It is made from the run folder alone, so the same folder always gives the same bytes.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.config import RunConfig, read_toml
from fedprune.errors import RunError
from fedprune.results import (
    NOTHING,
    comparison_table,
    facts,
    format_bytes,
    format_seconds,
    known_number,
    percent,
    rounded,
    summary_rows,
)
from fedprune.runfolder import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    MODEL,
    REPORT,
    SUMMARY,
    read_metrics,
    read_summary,
)
from sparsemodel.checkpoint import load_sparse
from sparsemodel.mask import Mask

__all__ = ["comparison_table", "format_bytes", "format_seconds", "summary_rows", "write_report"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --muted: #5a6675; --line: #d9dfe6;
  --page: #f5f7f9; --surface: #ffffff; --accent: #1f6f8b; --second: #c2610c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaef; --muted: #9aa7b5;
  --line: #37424f; --page: #12171d; --surface: #1a2129; --accent: #5fb3d0; --second: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
h1 { margin: 0; font-size: 30px; line-height: 1.2; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 18px; }
p { margin: 4px 0 12px; }
.brand { margin: 0 0 6px; color: var(--accent); font-weight: 600; font-size: 14px; }
.subtitle, .note, figcaption, footer { color: var(--muted); font-size: 14px;
  overflow-wrap: anywhere; }
.banner { border-left: 4px solid var(--second); background: var(--surface); padding: 12px 16px;
  border-radius: 4px; margin: 20px 0 0; }
.tiles { display: grid; gap: 12px; margin: 24px 0 8px;
  grid-template-columns: repeat(auto-fit, minmax(186px, 1fr)); }
.tiles div, section { background: var(--surface); border: 1px solid var(--line);
  border-radius: 8px; }
.tiles div { padding: 14px 16px; }
dt { color: var(--muted); font-size: 13px; }
dd { margin: 0; color: var(--muted); font-size: 13px; }
dd.value { color: var(--ink); font-size: 25px; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.grid { display: grid; gap: 16px; margin: 20px 0;
  grid-template-columns: repeat(2, minmax(0, 1fr)); }
section { padding: 18px 20px; min-width: 0; }
.wide { grid-column: 1 / -1; }
.pair { display: grid; gap: 20px; align-items: center;
  grid-template-columns: repeat(2, minmax(0, 1fr)); }
.settings { columns: 3 260px; column-gap: 32px; }
.settings table { break-inside: avoid; table-layout: fixed; margin-bottom: 20px; }
.settings caption { color: var(--ink); font-weight: 600; }
figure { margin: 0; overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }
.wide > figure > svg { min-width: 860px; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.scroll { max-height: 420px; overflow: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: 6px; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--muted); font-weight: 600; overflow-wrap: normal; }
tr.winner td { font-weight: 600; color: var(--accent); }
summary { cursor: pointer; font-weight: 600; font-size: 18px; }
details[open] summary { margin-bottom: 8px; }
footer { padding-bottom: 40px; }
@media (max-width: 760px) { .grid, .pair { grid-template-columns: minmax(0, 1fr); } }
@media print { section, .tiles div { break-inside: avoid; } .scroll { max-height: none; } }
"""


@dataclass(frozen=True)
class _Run:
    """What a run folder holds; `summary` is None while the run is not finished."""

    config: RunConfig
    start: Mapping[str, Any]
    rounds: list[dict[str, Any]]
    skipped: list[tuple[str, Mapping[str, Any]]]
    summary: Mapping[str, Any]
    is_finished: bool
    mask: Mask | None


def write_report(folder: Path) -> Path:
    """Write report.html of a run folder, finished or not, and return its path.

    Raises:
        RunError: the folder holds no run, its metrics are damaged, or it cannot be written to.
        ConfigError: its config.toml is damaged.
        CheckpointError: its model is damaged.
    """
    path = folder / REPORT
    page = _page(_read(folder)).encode("utf-8", "replace")
    temporary = path.with_suffix(".html.part")
    try:
        temporary.write_bytes(page)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}") from None
    return path


def _read(folder: Path) -> _Run:
    if not (folder / CONFIG).is_file():
        raise RunError(f"no run in {folder}: it has no {CONFIG}; give the folder of a run")
    config = RunConfig.parse(read_toml(folder / CONFIG))
    try:
        lines = read_metrics(folder)
    except ValueError as error:
        raise RunError(f"{folder / METRICS} is damaged: {error}") from None
    start = next((line for line in lines if line.get("event") == "start"), {})
    rounds = [line for line in lines if "round" in line and "event" not in line]
    # While a run goes on, its checkpoint stands in for the model that it has not yet left.
    models = [folder / name for name in (MODEL, CHECKPOINT) if (folder / name).is_file()]
    is_finished = (folder / SUMMARY).is_file()
    stored = load_sparse(models[0]) if models else None
    if is_finished:
        summary = read_summary(folder)
    else:
        summary = _summary_so_far(config, start, rounds)
        if stored is not None:
            floats = [t for t in stored.state.values() if t.is_floating_point()]
            summary["bytes_dense_round"] = 4 * sum(t.numel() for t in floats)
    return _Run(
        config=config,
        start=start,
        rounds=rounds,
        skipped=[
            (str(line.get("round", "start")), entry)
            for line in lines
            for entry in line.get("skipped", [])
        ],
        summary=summary,
        is_finished=is_finished,
        mask=stored.mask if stored else None,
    )


def _summary_so_far(
    config: RunConfig, start: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Those keys of summary.json that the metrics of an unfinished run can tell."""
    latest = {**start, **(rounds[-1] if rounds else {})}
    lines = [line for line in (start, *rounds) if line]
    return {
        "method": config.pruning.method,
        "dataset": config.data.dataset,
        "model": config.model_name,
        "seed": config.seed,
        "rounds": len(rounds),
        "density_target": config.pruning.density if start.get("layer_densities") else None,
        "density": latest.get("density"),
        "test_accuracy": latest.get("test_accuracy"),
        "bytes_up": sum(line["bytes_up"] for line in lines) if lines else None,
        "bytes_down": sum(line["bytes_down"] for line in lines) if lines else None,
    }


def _page(run: _Run) -> str:
    config, summary = run.config, run.summary
    title = f"{summary['method']} on {summary['dataset']}"
    subtitle = (
        f"{summary['model']} · seed {summary['seed']} · {config.data.clients} clients · "
        f"{config.training.rounds} rounds"
    )
    banner = ""
    if not run.is_finished:
        banner = (
            f'<p class="banner" role="status">Run not finished: round {len(run.rounds)} of '
            f"{config.training.rounds}. What follows is what there is so far.</p>"
        )
    tiles = "\n".join(
        f'<div><dt>{_text(label)}</dt><dd class="value">{_text(value)}</dd>'
        f"<dd>{_text(note)}</dd></div>"
        for label, value, note in facts(summary)
    )
    sections = "\n".join(
        part
        for part in (
            _accuracy(run),
            _traffic(run),
            _selection(run),
            _densities(run),
            _clients(run),
            _skipped(run),
            _rounds(run),
            _configuration(run),
        )
        if part
    )
    version = f" {summary['version']}" if "version" in summary else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)} – fedprune</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="brand">fedprune run report</p>
<h1>{_text(title)}</h1>
<p class="subtitle">{_text(subtitle)}</p>
{banner}
</header>
<main>
<dl class="tiles">
{tiles}
</dl>
<p class="note">Bytes of a client and round are those of a steady round, which moves values only,
no mask. “Dense” is the same network sent and trained without pruning, in 32-bit floats.</p>
<div class="grid">
{sections}
</div>
</main>
<footer><p>Made by fedprune{_text(version)} from the files of this folder. Test data were used for
the record only.</p></footer>
</body>
</html>
"""


def _accuracy(run: _Run) -> str:
    from fedprune.charts import accuracy_chart  # noqa: PLC0415

    numbers = [line["round"] for line in run.rounds]
    values = [known_number(line.get("test_accuracy")) for line in run.rounds]
    adjusted = [line["round"] for line in run.rounds if line.get("adjusted")]
    if all(value is None for value in values):
        return _section("Accuracy by round", f"<p>{NOTHING} No round has been evaluated yet.</p>")
    label = (
        f"Accuracy by round: {percent(values[0])} after round {numbers[0]}, "
        f"{percent(values[-1])} after round {numbers[-1]}; mask adjustments: {len(adjusted)}"
    )
    chart = accuracy_chart(numbers, _gaps(values), adjusted, label=label)
    note = "Test data."
    if adjusted:
        note += f" The mask was adjusted after {len(adjusted)} of {len(numbers)} rounds."
    return _section("Accuracy by round", _figure(chart, note))


def _traffic(run: _Run) -> str:
    from fedprune.charts import traffic_chart  # noqa: PLC0415

    lines = list(run.rounds)
    if known_number(run.start.get("bytes_up")):
        lines.insert(0, {**run.start, "round": 0})
    if not lines:
        return ""
    numbers = [line["round"] for line in lines]
    up = [known_number(line.get("bytes_up")) for line in lines]
    down = [known_number(line.get("bytes_down")) for line in lines]
    dense = known_number(run.summary.get("bytes_dense_round"))
    reference = None if dense is None else dense * run.config.clients_per_round
    label = (
        f"Bytes by round: up {format_bytes(up[-1])}, down {format_bytes(down[-1])} in round "
        f"{numbers[-1]}; dense, each way: {format_bytes(reference)}"
    )
    chart = traffic_chart(
        numbers,
        _gaps(up),
        _gaps(down),
        dense=reference,
        format_value=format_bytes,
        label=label,
    )
    masks = sum(known_number(line.get("mask_bytes")) or 0 for line in run.rounds)
    note = f"Dense FedAvg would send {format_bytes(reference)} each way in a round."
    if masks:
        note += f" Masks took {format_bytes(masks)} of the rounds' bytes."
    if numbers[0] == 0:
        what = "the candidate selection" if "selection" in run.start else "the start"
        note += f" Round 0 is {what}: up {format_bytes(up[0])}, down {format_bytes(down[0])}."
    return _section("Bytes by round", _figure(chart, note))


def _selection(run: _Run) -> str:
    from fedprune.charts import candidate_chart  # noqa: PLC0415

    account = run.start.get("selection")
    if not account:
        return ""
    losses, winner = account["losses"], account["winner"]
    values = _gaps([known_number(loss) for loss in losses])
    sentence = _why(values, winner)
    if not account.get("adaptive", True):
        sentence += " Batch-norm statistics were not adapted to the clients' data."
    chart = candidate_chart(values, winner, label=f"Candidates: {sentence}")
    rows = [
        [
            f"{place + 1} (winner)" if place == winner else str(place + 1),
            rounded(loss),
            percent(accuracy),
            f"{rounded(min(layers.values()))} – {rounded(max(layers.values()))}",
        ]
        for place, (loss, accuracy, layers) in enumerate(
            zip(losses, account["accuracies"], account["densities"], strict=True)
        )
    ]
    caption = f"On the development data of {len(account['clients'])} clients"
    header = ["candidate", "weighted loss", "accuracy", "layer densities"]
    table = _table(header, rows, caption=caption, marked=winner)
    content = f'<p>{_text(sentence)}</p><div class="pair">{_figure(chart)}{table}</div>'
    return _section("Which candidate won, and why", content, wide=True)


def _why(losses: Sequence[float], winner: int) -> str:
    """One sentence; `losses` may hold NaN."""
    loss = rounded(losses[winner])
    if len(losses) == 1:
        return f"The pool held one candidate; its weighted loss was {loss}."
    others = [x for place, x in enumerate(losses) if place != winner and not math.isnan(x)]
    return (
        f"Candidate {winner + 1} of {len(losses)} had the smallest weighted loss on the clients' "
        f"development data: {loss} against {rounded(min(others, default=None))} of the next."
    )


def _densities(run: _Run) -> str:
    from fedprune.charts import density_chart  # noqa: PLC0415

    before = run.start.get("layer_densities") or {}
    after = run.mask.densities() if run.mask is not None else {}
    names = list(before or after)
    if not names:
        return ""
    later = "final model" if run.is_finished else f"after round {len(run.rounds)}"
    label = f"Layer densities: {len(names)} layers, at the start and {later}"
    chart = density_chart(
        [name.removesuffix(".weight") for name in names],
        [known_number(before.get(name)) for name in names],
        [known_number(after.get(name)) for name in names],
        after_label=later,
        label=label,
    )
    note = "Parameters that are not listed are never pruned."
    return _section("Layer densities", _figure(chart, note), wide=True)


def _clients(run: _Run) -> str:
    from fedprune.charts import label_chart  # noqa: PLC0415

    clients = run.start.get("clients")
    if not clients:
        return ""
    sizes = [entry["num_train"] for entry in clients]
    note = (
        f"{len(clients)} clients hold {sum(sizes):,} training samples "
        f"({min(sizes):,} to {max(sizes):,} each) and "
        f"{sum(entry['num_dev'] for entry in clients):,} development samples."
    )
    chart = label_chart(
        [entry["client"] for entry in clients],
        [entry["labels"] for entry in clients],
        label=f"Labels of the clients: {note}",
    )
    return _section("What the clients hold", _figure(chart, note), wide=True)


def _skipped(run: _Run) -> str:
    if not run.skipped:
        return ""
    rows = [
        # The server gives -1 to a node that never said which client it is.
        [number, str(entry["client"]) if entry["client"] >= 0 else "unknown", entry["reason"]]
        for number, entry in run.skipped
    ]
    table = _table(["round", "client", "reason"], rows, scrolls="Clients left out")
    return _section("Clients left out", table, wide=True)


def _rounds(run: _Run) -> str:
    if not run.rounds:
        return ""
    header = ["round", "test accuracy", "test loss", "train loss", "density", "up", "down"]
    header += ["masks", "layers adjusted"]
    rows = [
        [
            str(line["round"]),
            percent(line.get("test_accuracy")),
            rounded(line.get("test_loss")),
            rounded(line.get("train_loss")),
            rounded(line.get("density")),
            *(format_bytes(line.get(key)) for key in ("bytes_up", "bytes_down", "mask_bytes")),
            str(len(line.get("adjusted", []))),
        ]
        for line in run.rounds
    ]
    table = _table(header, rows, scrolls="All rounds")
    content = f"<details><summary>All rounds</summary>{table}</details>"
    return _section(None, content, wide=True)


def _configuration(run: _Run) -> str:
    tables: dict[str, list[list[str]]] = {}
    for key, value in run.config.flat().items():
        section, _, name = key.rpartition(".")
        tables.setdefault(section or "run", []).append([name, str(value) or NOTHING])
    content = "".join(
        _table(["setting", "value"], rows, caption=section) for section, rows in tables.items()
    )
    return _section("Configuration", f'<div class="settings">{content}</div>', wide=True)


def _section(title: str | None, content: str, *, wide: bool = False) -> str:
    heading = f"<h2>{_text(title)}</h2>" if title else ""
    kind = ' class="wide"' if wide else ""
    return f"<section{kind}>{heading}{content}</section>"


def _figure(chart: str, note: str = "") -> str:
    caption = f"<figcaption>{_text(note)}</figcaption>" if note else ""
    return f"<figure>{chart}{caption}</figure>"


def _table(
    header: Iterable[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    marked: int | None = None,
    scrolls: str = "",
) -> str:
    """An HTML table of plain text; `scrolls` names it and gives it a height of its own."""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = "\n".join(
        ('<tr class="winner">' if place == marked else "<tr>")
        + "".join(f"<td>{_text(cell)}</td>" for cell in row)
        + "</tr>"
        for place, row in enumerate(rows)
    )
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    table = f"<table>{title}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    if not scrolls:
        return table
    name = _text(scrolls)
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">{table}</div>'


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _gaps(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
