"""The page report.html of a run folder.

The page is one file: its styles and charts are inside, it loads nothing and runs no script.
It is made from the run folder alone, so the same folder always gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.config import RunConfig, read_toml
from fedprune.reports.results import comparison_table, facts, summary_rows
from fedprune.rounds.folder import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    MODEL,
    REPORT,
    SUMMARY,
    read_metrics,
    read_summary,
)
from prunelab.errors import RunError
from prunelab.pages import page
from prunelab.pages.units import (
    NOTHING,
    format_bytes,
    format_seconds,
    known_number,
    percent,
    rounded,
)
from sparsemodel.masks.mask import Mask
from sparsemodel.storage.checkpoint import load_sparse
from sparsemodel.storage.files import write_atomically

__all__ = ["comparison_table", "format_bytes", "format_seconds", "summary_rows", "write_report"]


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
    content = _page(_read(folder)).encode("utf-8", "replace")
    try:
        write_atomically(path, content)
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
            f"Run not finished: round {len(run.rounds)} of {config.training.rounds}. What follows "
            "is what there is so far."
        )
    tiles = page.tiles(facts(summary))
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
    note = (
        "Bytes of a client and round are those of a steady round, which moves values only, no "
        "mask. “Dense” is the same network sent and trained without pruning, in 32-bit floats."
    )
    return page.document(
        f"{title} – fedprune",
        brand="fedprune run report",
        heading=title,
        subtitle=subtitle,
        banner=banner,
        content=f'{tiles}\n<p class="note">{page.text(note)}</p>\n'
        f'<div class="grid">\n{sections}\n</div>',
        footer=f"Made by fedprune{version} from the files of this folder. Test data were used for "
        "the record only.",
    )


def _accuracy(run: _Run) -> str:
    from fedprune.reports.charts import accuracy_chart  # noqa: PLC0415

    numbers = [line["round"] for line in run.rounds]
    values = [known_number(line.get("test_accuracy")) for line in run.rounds]
    adjusted = [line["round"] for line in run.rounds if line.get("adjusted")]
    if all(value is None for value in values):
        return page.section(
            "Accuracy by round", f"<p>{NOTHING} No round has been evaluated yet.</p>"
        )
    label = (
        f"Accuracy by round: {percent(values[0])} after round {numbers[0]}, "
        f"{percent(values[-1])} after round {numbers[-1]}; mask adjustments: {len(adjusted)}"
    )
    chart = accuracy_chart(numbers, _gaps(values), adjusted, label=label)
    note = "Test data."
    if adjusted:
        note += f" The mask was adjusted after {len(adjusted)} of {len(numbers)} rounds."
    return page.section("Accuracy by round", page.figure(chart, note))


def _traffic(run: _Run) -> str:
    from fedprune.reports.charts import traffic_chart  # noqa: PLC0415

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
    return page.section("Bytes by round", page.figure(chart, note))


def _selection(run: _Run) -> str:
    from fedprune.reports.charts import candidate_chart  # noqa: PLC0415

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
    table = page.table(header, rows, caption=caption, marked=winner)
    content = f'<p>{page.text(sentence)}</p><div class="pair">{page.figure(chart)}{table}</div>'
    return page.section("Which candidate won, and why", content, wide=True)


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
    from fedprune.reports.charts import density_chart  # noqa: PLC0415

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
    return page.section("Layer densities", page.figure(chart, note), wide=True)


def _clients(run: _Run) -> str:
    from fedprune.reports.charts import label_chart  # noqa: PLC0415

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
    return page.section("What the clients hold", page.figure(chart, note), wide=True)


def _skipped(run: _Run) -> str:
    if not run.skipped:
        return ""
    rows = [
        # The server gives -1 to a node that never said which client it is.
        [number, str(entry["client"]) if entry["client"] >= 0 else "unknown", entry["reason"]]
        for number, entry in run.skipped
    ]
    table = page.table(["round", "client", "reason"], rows, scrolls="Clients left out")
    return page.section("Clients left out", table, wide=True)


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
    table = page.table(header, rows, scrolls="All rounds")
    content = f"<details><summary>All rounds</summary>{table}</details>"
    return page.section(None, content, wide=True)


def _configuration(run: _Run) -> str:
    tables: dict[str, list[list[str]]] = {}
    for key, value in run.config.flat().items():
        section, _, name = key.rpartition(".")
        tables.setdefault(section or "run", []).append([name, str(value) or NOTHING])
    content = "".join(
        page.table(["setting", "value"], rows, caption=section) for section, rows in tables.items()
    )
    return page.section("Configuration", f'<div class="settings">{content}</div>', wide=True)


def _gaps(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
