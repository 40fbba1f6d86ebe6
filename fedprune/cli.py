"""The `fedprune` command."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedprune.config import (
    METHOD_NAME,
    RunConfig,
    continued,
    own_settings,
    parse_assignments,
    read_toml,
)
from fedprune.errors import USER_ERRORS
from fedprune.methods import DEFAULT_METHOD, METHODS
from prunelab.errors import RunError
from prunelab.pages.console import console, errors, escaped, listed, run_command

cli = typer.Typer(
    help="Federated pruning on Flower: tiny models trained across fleets of small devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point."""
    run_command(cli, expected=USER_ERRORS, go_on=lambda _: "continue with --resume")


Method = Annotated[str | None, typer.Option(help=f"{', '.join(METHODS)}.")]
Dataset = Annotated[str | None, typer.Option(help="A data set's name, or a folder of parquet.")]
Model = Annotated[str | None, typer.Option(help="A network's name, or module:function.")]
Density = Annotated[float | None, typer.Option(help="Share of prunable weights kept, 0 to 1.")]
Clients = Annotated[int | None, typer.Option(help="Number of clients.")]
Alpha = Annotated[float | None, typer.Option(help="Dirichlet concentration of the label split.")]
Rounds = Annotated[int | None, typer.Option(help="Communication rounds.")]
LocalEpochs = Annotated[int | None, typer.Option(help="Epochs of each client in each round.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.")]
Execution = Annotated[
    str | None,
    typer.Option(help="sparse, masked or dense; default: sparse on a CPU, else masked."),
]
Out = Annotated[Path | None, typer.Option(help="Run folder; default: a new one under runs/.")]
Engine = Annotated[
    str,
    typer.Option(
        help="flower: Flower's simulation; inline: this process; batched: this process, the "
        "clients of a round trained together."
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting, as section.key=value; may be repeated."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]


@cli.command()
def run(  # noqa: PLR0917 - the command's options
    method: Method = None,
    dataset: Dataset = None,
    model: Model = None,
    density: Density = None,
    clients: Clients = None,
    alpha: Alpha = None,
    rounds: Rounds = None,
    local_epochs: LocalEpochs = None,
    seed: Annotated[int | None, typer.Option(help="Decides every random choice.")] = None,
    device: Device = None,
    execution: Execution = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    engine: Engine = "flower",
    config: ConfigFile = None,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Train one federated model and leave it in a run folder."""
    given = {
        METHOD_NAME: method,
        "data.dataset": dataset,
        "model.name": model,
        "method.density": density,
        "data.clients": clients,
        "data.alpha": alpha,
        "training.rounds": rounds,
        "training.local_epochs": local_epochs,
        "seed": seed,
        "training.device": device,
        "training.execution": execution,
    }
    from fedprune.rounds.folder import default_folder  # noqa: PLC0415

    values = {
        **(read_toml(config) if config else {}),
        **parse_assignments(settings or []),
        **_given(given),
    }
    folder = out or default_folder(_build_config(own_settings(values)), resume=resume)
    if resume:  # the folder knows its own settings; there is no need to repeat them
        values = continued(_stored(folder), values)
    if density is not None and "method.density" not in own_settings(values):
        errors.print("note: --density has no effect: this method trains the dense network")
        del values["method.density"]
    _execute(_build_config(values), folder, engine=engine, resume=resume)


@cli.command()
def compare(  # noqa: PLR0917 - the command's options
    methods: Annotated[str, typer.Option(help="Comma-separated method names.")] = ",".join(
        [*list(METHODS)[:2], DEFAULT_METHOD]
    ),
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0,1,2",
    dataset: Dataset = None,
    model: Model = None,
    density: Density = None,
    clients: Clients = None,
    alpha: Alpha = None,
    rounds: Rounds = None,
    local_epochs: LocalEpochs = None,
    device: Device = None,
    execution: Execution = None,
    out: Annotated[Path, typer.Option(help="Folder of run folders.")] = Path("runs/compare"),
    engine: Engine = "inline",
    config: ConfigFile = None,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print summaries as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Run several methods with several seeds and print one table; finished runs are reused."""
    from fedprune.reports.results import comparison_table  # noqa: PLC0415
    from fedprune.rounds import folder as runfolder  # noqa: PLC0415

    given = {
        "data.dataset": dataset,
        "model.name": model,
        "method.density": density,
        "data.clients": clients,
        "data.alpha": alpha,
        "training.rounds": rounds,
        "training.local_epochs": local_epochs,
        "training.device": device,
        "training.execution": execution,
    }
    options = {
        **(read_toml(config) if config else {}),
        **parse_assignments(settings or []),
        **_given(given),
    }
    cells = []
    for method in listed(methods):
        for seed in listed(seeds):
            values = {**options, METHOD_NAME: method, "seed": seed}
            cells.append(_build_config(own_settings(values)))
    summaries = []
    for number, cell in enumerate(cells, 1):
        folder = out / f"{cell.method.name}-s{cell.seed}"
        console.print(f"[bold]{number}/{len(cells)}[/bold] {folder}", highlight=False)
        _execute(
            cell, folder, engine=engine, resume=(folder / runfolder.CONFIG).exists(), quiet=True
        )
        summaries.append(runfolder.read_summary(folder))
    if as_json:
        print(json.dumps(summaries))
        return
    header, rows = comparison_table(summaries)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)


@cli.command()
def report(folder: Path, debug: Debug = False) -> None:
    """Write report.html of a run folder again."""
    from fedprune.reports.page import write_report  # noqa: PLC0415

    console.print(f"report: {write_report(folder)}", highlight=False, soft_wrap=True)


@cli.command()
def inspect(model: Path, debug: Debug = False) -> None:
    """Show what a model.safetensors holds: layers, densities, bytes, digest.

    A silent output is a channel or feature whose weights are all zero: it carries nothing.
    """
    import hashlib  # noqa: PLC0415

    from prunelab.pages.units import format_bytes  # noqa: PLC0415
    from sparsemodel.storage.state_file import load_state  # noqa: PLC0415

    state, metadata = load_state(model)
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    table = Table("tensor", "shape", "active", "density", "silent outputs")
    silent = outputs = dense = 0
    for name, size in state.shapes().items():
        shape, pattern = "x".join(map(str, size)), state.pattern(name)
        dense += 4 * math.prod(size)
        if pattern is not None:
            zeros = _silent_rows(pattern.row_ptr, state.values[name])
            silent, outputs = silent + zeros, outputs + size[0]
            density = f"{pattern.num_active / pattern.num_weights:.4f}"
            silence = f"{zeros} of {size[0]}"
            table.add_row(name, shape, f"{pattern.num_active:,}", density, silence)
        else:
            table.add_row(name, shape, f"{math.prod(size):,}", "dense")
    console.print(table)
    for key, value in sorted(metadata.items()):
        console.print(f"{key}: {escaped(value)}", highlight=False)
    on_disk = format_bytes(model.stat().st_size)
    console.print(f"file: {on_disk} ({format_bytes(dense)} as dense fp32)")
    if (patterns := state.patterns) is not None:
        console.print(f"density: {patterns.density:.4g} of {patterns.num_weights:,} prunable")
        console.print(f"silent outputs: {silent} of {outputs}", highlight=False)
        console.print(f"mask digest: {patterns.digest()}", highlight=False)
    console.print(f"sha256: {digest}", highlight=False, soft_wrap=True)


def _silent_rows(row_ptr: Any, values: Any) -> int:
    """How many rows of a pattern hold no value but zero."""
    import numpy as np  # noqa: PLC0415

    nonzero = np.concatenate([[0], np.cumsum(values != 0)])
    return int((np.diff(nonzero[row_ptr]) == 0).sum())


def _execute(
    config: RunConfig, folder: Path, *, engine: str, resume: bool, quiet: bool = False
) -> None:
    """Run or resume one run, show its progress and where its results are."""
    from fedprune.reports.results import summary_rows  # noqa: PLC0415
    from fedprune.rounds import folder as runfolder  # noqa: PLC0415
    from fedprune.rounds import run as runner  # noqa: PLC0415

    was_complete = resume and (folder / runfolder.SUMMARY).exists()
    progress = _progress(folder, config, quiet=quiet)
    summary = runner.run(config, folder, engine=engine, resume=resume, progress=progress)
    if was_complete:
        console.print(f"already complete: {escaped(folder)}", highlight=False, soft_wrap=True)
    if not quiet:
        table = Table(show_header=False, title="result")
        for row in summary_rows(summary):
            table.add_row(*row)
        console.print(table)
        for label, name in (("model: ", runfolder.MODEL), ("report:", runfolder.REPORT)):
            console.print(f"{label} {escaped(folder / name)}", highlight=False, soft_wrap=True)


def _progress(folder: Path, config: RunConfig, *, quiet: bool) -> Callable[[], None]:
    """A function that prints every line of metrics.jsonl that has come since its last call."""
    from fedprune.rounds.folder import read_metrics  # noqa: PLC0415
    from prunelab.pages.units import format_bytes, format_seconds  # noqa: PLC0415

    shown = -1  # nothing yet, not even the heading: the settings may still be refused
    times: list[float] = []

    def show(line: dict[str, Any]) -> None:
        if line.get("event") == "start":
            clients = line["clients"]
            text = f"{len(clients)} clients, density {line['density']:.4g}"
            if "selection" in line:
                selection = line["selection"]
                text += f", candidate {selection['winner'] + 1} of {len(selection['losses'])} won"
            if line.get("no_program"):
                text += f"; clients compute by torch modules: {line['no_program']}"
        elif "round" in line and "event" not in line:
            times.append(_clock())
            recent = times[-6:]
            left = ""
            if len(recent) > 1:
                each = statistics.mean(b - a for a, b in itertools.pairwise(recent))
                left = f"  left {format_seconds(each * (config.training.rounds - line['round']))}"
            text = (
                f"round {line['round']:>3}/{config.training.rounds}"
                f"  accuracy {100 * line['test_accuracy']:5.2f} %"
                f"  density {line['density']:.4g}"
                f"  up {format_bytes(line['bytes_up'])}"
                f"  down {format_bytes(line['bytes_down'])}{left}"
            )
        else:
            return
        console.print(text, highlight=False, soft_wrap=True)

    def heading() -> None:
        console.print(
            f"{config.method.name} on {escaped(config.data.dataset)}, {config.model_name}, "
            f"{config.data.clients} clients, {config.training.rounds} rounds -> {escaped(folder)}",
            highlight=False,
            soft_wrap=True,
        )

    def progress() -> None:
        nonlocal shown
        if shown < 0:
            shown = 0
            if not quiet:
                heading()
        try:
            lines = read_metrics(folder)
        except RunError:  # damaged; the run itself says so
            return
        for line in lines[shown:]:
            if not quiet:
                show(line)
            for skipped in line.get("skipped", []):
                errors.print(
                    f"[yellow]warning:[/yellow] round {line.get('round', 0)}: client "
                    f"{skipped['client']} left out: {escaped(skipped['reason'])}",
                    soft_wrap=True,
                )
        shown = len(lines)

    return progress


def _clock() -> float:
    import time  # noqa: PLC0415

    return time.monotonic()


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _build_config(values: Mapping[str, Any]) -> RunConfig:
    dataset = values.get("data.dataset")
    if isinstance(dataset, str) and os.path.isdir(dataset):
        # Workers of the simulation run elsewhere; a relative path would not mean the same.
        values = {**values, "data.dataset": str(Path(dataset).resolve())}
    return RunConfig.parse(values)


def _stored(out: Path) -> dict[str, Any]:
    from fedprune.rounds.folder import CONFIG, stored_settings  # noqa: PLC0415

    if not (out / CONFIG).exists():
        raise RunError(f"nothing to resume in {out}: it has no {CONFIG}")
    return stored_settings(out)
