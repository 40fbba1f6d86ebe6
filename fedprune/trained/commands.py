"""`fedprune predict`, `evaluate` and `export`: what a run left, on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunelab.pages.console import errors, say, show_table

if TYPE_CHECKING:
    from fedprune.trained.evaluation import Evaluation

SHOWN = 20  # rows of predictions without --out

Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Model = Annotated[Path, typer.Argument(help="A run's folder, or its model.safetensors.")]
Network = Annotated[
    str | None,
    typer.Option(
        "--model", help="module:function, where the run was given its network as an object."
    ),
]


def predict(  # noqa: PLR0917 - the command's options
    model: Model,
    data: Annotated[
        str, typer.Argument(help="A picture, a folder of pictures, or any data set as of run.")
    ],
    out: Annotated[Path | None, typer.Option(help="A .csv or .parquet file.")] = None,
    all_classes: Annotated[
        bool, typer.Option("--all", help="The probability of every class.")
    ] = False,
    network: Network = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Say what the model takes each sample for; its own preprocessing is applied."""
    from fedprune.front import load  # noqa: PLC0415
    from fedprune.trained.predictions import check_table  # noqa: PLC0415

    if out is not None:
        check_table(out, force=force)
    predictions = load(model, model=network).predict(data)
    if out is not None:
        predictions.write(out, all_classes=all_classes, force=force)
        say(f"{len(predictions)} predictions: {out}")
        return
    columns = predictions.columns(all_classes=all_classes)
    rows = list(zip(*columns.values(), strict=True))
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows[:SHOWN]]
    show_table(list(columns), cells)
    if len(rows) > SHOWN:
        say(f"{len(rows) - SHOWN} more; --out predictions.csv writes all of them")


def evaluate(  # noqa: PLR0917 - the command's options
    model: Model,
    data: Annotated[
        str | None, typer.Argument(help="Any labelled data set as of run; default: the run's own.")
    ] = None,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Precision, recall and count of each class.")
    ] = False,
    per_client: Annotated[
        bool, typer.Option("--per-client", help="Each client on its own held-out samples.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    network: Network = None,
    debug: Debug = False,
) -> None:
    """Measure the model: loss, accuracy, each class, and, on the run's own data, each client."""
    from fedprune.front import load  # noqa: PLC0415

    found = load(model, model=network).evaluate(data)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    show_table(["", ""], _overview(found), title=found.data)
    if per_class:
        show_table(
            ["class", "samples", "precision", "recall"],
            [[c.name, _count(c.count), _number(c.precision), _number(c.recall)]
             for c in found.classes],
        )  # fmt: skip
    if per_client and not found.clients:
        errors.print("note: other data than the run's are not divided among clients")
    elif per_client:
        show_table(
            ["client", "samples", found.metric_name or "metric", "loss"],
            [[str(c.client), str(c.samples), _number(c.metric), _number(c.loss)]
             for c in found.clients],
        )  # fmt: skip


def export(  # noqa: PLR0917 - the command's options
    model: Model,
    format: Annotated[str, typer.Option(help="dense, torch, onnx or program.")],
    out: Annotated[
        Path | None, typer.Option(help="The file; default: exported.* beside the model.")
    ] = None,
    network: Network = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write the model for other programs, once it computes the same there."""
    from fedprune.front import load  # noqa: PLC0415
    from prunelab.pages.units import format_bytes  # noqa: PLC0415
    from sparsemodel.storage.export import check_free, format_of  # noqa: PLC0415
    from sparsemodel.storage.interchange import FORMATS  # noqa: PLC0415

    folder = model if model.is_dir() else model.parent
    kind = format_of(out or folder, format)
    path = out or folder / f"exported{FORMATS[kind].suffix}"
    check_free(path, force=force)
    done = load(model, model=network).export(path, format=kind, force=force)
    say(f"{kind}: {path} ({format_bytes(done.num_bytes)})")
    say(f"checked: its outputs differ from the model's by {done.difference:.2g} at most")


def _overview(found: Evaluation) -> list[list[str]]:
    rows = [["samples", str(found.samples)]]
    if found.metric is not None:
        rows.append([found.metric_name, _number(found.metric)])
    rows.append(["loss", _number(found.loss)])
    if (fair := found.fairness) is not None:
        known = [client for client in found.clients if client.samples]
        rows += [
            ["clients", f"{len(known)}, on samples set aside for {found.clients_on}"],
            ["worst client", f"{fair.worst_client}: {_number(fair.worst)}"],
            ["10th percentile of clients", _number(fair.percentile_10)],
            ["spread over clients", _number(fair.spread)],
        ]
    return rows


def _count(count: int) -> str:
    return str(count) if count else "none in the data"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
