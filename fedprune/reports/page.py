"""The page report.html of a run folder.

The page is one file: its styles and charts are inside, it loads nothing and runs no script.
It is made from the run folder, and from the dense run beside it where there is one, so that the
same folders always give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.config import RunConfig
from fedprune.local.model import execution_of
from fedprune.reports.baseline import Beside, runs_beside, verdict
from fedprune.reports.charts import (
    candidate_chart,
    density_chart,
    label_chart,
    largest_share,
    quality_chart,
    traffic_chart,
)
from fedprune.reports.results import TEST_KEYS, Measure, facts
from fedprune.rounds.folder import (
    MODEL,
    REPORT,
    SUMMARY,
    read_checkpoint,
    read_metrics,
    read_model,
    read_summary,
    stored_config,
)
from fedprune.rounds.population import totals
from prunelab.pages.page import Figure, Folded, Page, Pair, Section, Table, Text, settings
from prunelab.pages.plots import takes_a_line
from prunelab.pages.units import NOTHING, format_bytes, known_number, rounded
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import SparseState

NOT_USED = "not used"
SHOWN = 100  # clients whose labels are drawn: more are no rows that one could read


@dataclass(frozen=True)
class _Run:
    """What a run folder holds; of a run that is not finished, what there is so far."""

    name: str
    config: RunConfig
    start: Mapping[str, Any]
    rounds: list[dict[str, Any]]
    skipped: list[tuple[str, Mapping[str, Any]]]
    summary: Mapping[str, Any]
    is_finished: bool
    mask: Patterns | None
    width: str
    task: str
    beside: list[Beside]


def write_report(folder: Path) -> Path:
    """Write report.html of a run folder, finished or not, and return its path.

    Raises:
        RunError: the folder holds no run, a file of it is damaged or of another run, or it cannot
            be written to.
        CheckpointError: its model is damaged.
    """
    return _page(_read(folder)).write(folder / REPORT)


def _read(folder: Path) -> _Run:
    config, lines = stored_config(folder), read_metrics(folder)
    start = next((line for line in lines if line.get("event") == "start"), {})
    rounds = [line for line in lines if "round" in line and "event" not in line]
    # While a run goes on, its checkpoint stands in for the model that it has not yet left.
    stored: SparseState | None
    metadata: Mapping[str, str] = {}
    if (folder / MODEL).exists():
        stored, metadata = read_model(folder)
    else:
        checkpoint = read_checkpoint(folder)
        stored = None if checkpoint is None else checkpoint.state.model
    is_finished = (folder / SUMMARY).is_file()
    if is_finished:
        summary = read_summary(folder)
    else:
        summary = _summary_so_far(config, start, rounds)
        if stored is not None:
            dense = sum(math.prod(shape) for shape in stored.shapes().values())
            summary["bytes_dense_round"] = 4 * dense
    return _Run(
        name=folder.resolve().name,
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
        mask=stored.patterns if stored else None,
        width=metadata.get("width", ""),
        task=metadata.get("task", ""),
        beside=runs_beside(folder, config),
    )


def _summary_so_far(
    config: RunConfig, start: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Those keys of summary.json that the metrics of an unfinished run can tell."""
    latest = {**start, **(rounds[-1] if rounds else {})}
    lines = [line for line in (start, *rounds) if line]
    return {
        "method": config.method.name,
        "dataset": config.data.dataset,
        "model": config.model_name,
        "seed": config.seed,
        "rounds": len(rounds),
        "density_target": config.method.target_density if start.get("layer_densities") else None,
        "density": latest.get("density"),
        **{k: latest[k] for k in ("metric", *TEST_KEYS, "epsilon", "delta") if k in latest},
        "bytes_up": _sum(line.get("bytes_up") for line in lines),
        "bytes_down": _sum(line.get("bytes_down") for line in lines),
    }


def _sum(values: Iterable[Any]) -> float | None:
    """None where nothing is known, or not all of it."""
    known = [known_number(value) for value in values]
    return (
        sum(value for value in known if value is not None) if known and None not in known else None
    )


def _page(run: _Run) -> Page:
    config, summary = run.config, run.summary
    banner = ""
    if not run.is_finished:
        banner = (
            f"Run not finished: round {len(run.rounds)} of {config.training.rounds}. What follows "
            "is what there is so far."
        )
    version = f" {summary['version']}" if "version" in summary else ""
    return Page(
        product="fedprune",
        kind="run report",
        heading=f"{summary['method']} on {summary['dataset']}",
        subtitle=f"{summary['model']} · seed {summary['seed']} · {config.data.clients} clients · "
        f"{config.training.rounds} rounds",
        banner=banner,
        facts=facts(summary),
        note="Bytes of a client and round are those of a steady round, which moves values only, "
        "no mask, and of the client that sent or was sent the most. “Dense” is the same network "
        "sent and trained without pruning, in 32-bit floats.",
        sections=[
            verdict(summary, run.beside, folder=run.name) if run.is_finished else None,
            _quality(run),
            _traffic(run),
            _selection(run),
            _densities(run),
            _clients(run),
            _skipped(run),
            _rounds(run),
            Section("Configuration", [settings(_used(run), top="run")], wide=True),
        ],
        footer=f"Made by fedprune{version} from the files of this folder. Test data were used for "
        "the record only.",
    )


def _used(run: _Run) -> dict[str, Any]:
    """Every setting as it was used: what the file leaves to be worked out is worked out."""
    config, data = run.config, run.config.data
    method = config.method.used(config.training.rounds)
    return {
        **config.flat(),
        **{f"method.{key}": value for key, value in method.items()},
        "model.name": config.model_name,
        "model.width": run.width or config.model.width or "the network's own",
        "model.blocks": config.model.blocks or "found from the modules",
        "training.task": run.task or config.training.task or "what the samples are for",
        "training.clip_norm": config.training.clip_norm or "never",
        **({"data.partition": "iid (no classes)"} if _has_no_classes(run) else {}),
        "data.num_train": data.num_train or "all",
        "data.num_test": data.num_test or "all",
        "data.alpha": data.alpha
        if data.partition == "dirichlet" and not _has_no_classes(run)
        else NOT_USED,
        "data.classes_per_client": data.classes_per_client
        if data.partition == "pathological"
        else NOT_USED,
        "training.execution": run.start.get("execution")
        or execution_of(config.training, pruned=bool(run.start.get("layer_densities"))),
        "training.cohort": f"at most {config.cohort} (batched engine)",
        "federation.clients_per_round": config.clients_per_round,
    }


def _has_no_classes(run: _Run) -> bool:
    """Whether the samples could not be divided by classes, though that was asked for."""
    clients = run.start.get("clients") or []
    without = bool(clients) and max(len(entry["labels"]) for entry in clients) == 1
    return without and run.config.data.partition == "dirichlet"


def _quality(run: _Run) -> Section:
    measure = Measure.of(run.summary)
    title = f"{measure.name.capitalize()} by round"
    numbers = [line["round"] for line in run.rounds]
    values = [known_number(line.get(measure.key)) for line in run.rounds]
    adjusted = [line["round"] for line in run.rounds if line.get("adjusted")]
    if all(value is None for value in values):
        return Section(title, [Text(f"{NOTHING} No round has been evaluated yet.")])
    label = (
        f"{title}: {measure.show(values[0])} after round {numbers[0]}, "
        f"{measure.show(values[-1])} after round {numbers[-1]}; mask adjustments: {len(adjusted)}"
    )
    note = "Test data of the clients." if run.config.federation.clients_test else "Test data."
    if adjusted:
        note += f" The mask was adjusted after {len(adjusted)} of {len(numbers)} rounds."
    scale, unit = (100, ", %") if measure.is_share else (1, "")
    shown = [None if value is None else scale * value for value in values]
    name = f"test {measure.name}{unit}"
    chart = quality_chart(numbers, _gaps(shown), adjusted, name=name, label=label)
    return Section(title, [Figure(chart, note)])


def _traffic(run: _Run) -> Section | None:
    lines = list(run.rounds)
    if known_number(run.start.get("bytes_up")):
        lines.insert(0, {**run.start, "round": 0})
    if not lines:
        return None
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
    return Section("Bytes by round", [Figure(chart, note)])


def _selection(run: _Run) -> Section | None:
    account = run.start.get("selection")
    if not account or "losses" not in account:  # candidates may be chosen by something else
        return None
    losses, winner = account["losses"], account["winner"]
    measure = Measure.of(run.summary)
    values = _gaps([known_number(loss) for loss in losses])
    sentence = _why(values, winner)
    if not account.get("adaptive", True):
        sentence += " Batch-norm statistics were not adapted to the clients' data."
    chart = candidate_chart(values, winner, label=f"Candidates: {sentence}")
    rows = [
        [
            f"{place + 1} (winner)" if place == winner else str(place + 1),
            rounded(loss),
            measure.show(value),
            f"{rounded(min(layers.values()))} – {rounded(max(layers.values()))}",
        ]
        for place, (loss, value, layers) in enumerate(
            zip(losses, account["metrics"], account["densities"], strict=True)
        )
    ]
    table = Table(
        ["candidate", "weighted loss", measure.name, "layer densities"],
        rows,
        caption=f"On the development data of {len(account['clients'])} clients",
        marked=winner,
    )
    parts = [Text(sentence), Pair(Figure(chart), table)]
    return Section("Which candidate won, and why", parts, wide=True)


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


def _densities(run: _Run) -> Section | None:
    before = run.start.get("layer_densities") or {}
    after = run.mask.densities() if run.mask is not None else {}
    names = list(before or after)
    if not names:
        return None
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
    return Section("Layer densities", [Figure(chart, note)])


def _clients(run: _Run) -> Section | None:
    clients = run.start.get("clients")
    if not clients:
        return None
    every = totals(run.start)
    note = (
        f"{every['count']:,} clients hold {every['num_train']:,} training samples "
        f"({every['smallest']:,} to {every['largest']:,} each) and "
        f"{every['num_dev']:,} development samples."
    )
    if every["count"] > SHOWN:
        clients = clients[:SHOWN]
    labels = [entry["labels"] for entry in clients]
    if max(map(len, labels)) == 0:
        return Section("What the clients hold", [Text(f"{note} Their classes stay with them.")])
    if max(map(len, labels)) == 1:
        return Section("What the clients hold", [Text(f"{note} They have no classes.")])
    if every["count"] > SHOWN:
        note += f" Shown are the first {SHOWN}."
    note += (
        f" Full colour: {100 * largest_share(labels):.0f} % of a client's samples; fainter: fewer."
    )
    chart = label_chart(
        [entry["client"] for entry in clients], labels, label=f"Labels of the clients: {note}"
    )
    is_wide = takes_a_line(max(map(len, labels)))
    return Section("What the clients hold", [Figure(chart, note)], wide=is_wide)


def _skipped(run: _Run) -> Section | None:
    if not run.skipped:
        return None
    rows = [
        # The server gives -1 to a node that never said which client it is.
        [number, str(entry["client"]) if entry["client"] >= 0 else "unknown", entry["reason"]]
        for number, entry in run.skipped
    ]
    title = "Clients left out"
    return Section(title, [Table(["round", "client", "reason"], rows, scrolls=title)], wide=True)


def _rounds(run: _Run) -> Section | None:
    if not run.rounds:
        return None
    measure = Measure.of(run.summary)
    header = ["round", f"test {measure.name}", "test loss", "train loss", "density", "up", "down"]
    header += ["masks", "layers adjusted"]
    rows = [
        [
            str(line["round"]),
            measure.show(line.get(measure.key)),
            rounded(line.get("test_loss")),
            rounded(line.get("train_loss")),
            rounded(line.get("density")),
            *(format_bytes(line.get(key)) for key in ("bytes_up", "bytes_down", "mask_bytes")),
            str(len(line.get("adjusted", []))),
        ]
        for line in run.rounds
    ]
    title = "All rounds"
    return Section("", [Folded(title, Table(header, rows, scrolls=title))], wide=True)


def _gaps(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
