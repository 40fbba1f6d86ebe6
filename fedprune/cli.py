"""The `fedprune` command."""

from __future__ import annotations

import inspect as python_inspect
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedprune.config import (
    METHOD_NAME,
    RunConfig,
    continued,
    for_method,
    own_settings,
    parse_assignments,
    read_toml,
)
from fedprune.device.commands import device
from fedprune.errors import USER_ERRORS, ConfigError
from fedprune.fleet.commands import fleet, server
from fedprune.given import name_dataset
from fedprune.language import command as language
from fedprune.methods import BASELINES, DEFAULT_METHOD, METHODS, TRAITS, method_class
from fedprune.methods.base import Method as FederatedMethod
from fedprune.trained import commands
from fedprune.trained.commands import Debug
from prunelab.data.reading import with_target
from prunelab.errors import RunError, close_names
from prunelab.pages.console import (
    console,
    errors,
    escaped,
    listed,
    progress_bar,
    run_command,
    say,
    show_list,
    show_table,
    version_of,
)
from prunelab.pages.units import NOTHING

cli = typer.Typer(
    help="Federated pruning on Flower: tiny models trained across fleets of small devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point."""
    run_command(cli, expected=USER_ERRORS, go_on=_go_on)


def _go_on(arguments: Sequence[str]) -> str:
    if arguments[0] == "run":
        return "continue with the same command and --resume"
    kept = ": what was finished is kept" if arguments[0] == "compare" else ""
    return f"start it again{kept}"


@cli.callback()
def options(version: Annotated[bool, version_of("fedprune")] = False) -> None:
    """Options of the command itself."""


Method = Annotated[str | None, typer.Option(help=f"{', '.join(METHODS)}.")]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="A data set's name; a folder of class folders, of parquet or of arrays; a table "
        "(.csv, .tsv, .parquet); arrays (.npz); or module:function."
    ),
]
Resize = Annotated[str | None, typer.Option(help="Bring pictures to N or HxW pixels.")]
ColumnNames = Annotated[
    str | None, typer.Option("--columns", help="What columns are for: image=picture,label=kind.")
]
Target = Annotated[str, typer.Option(help="The column of a table that is to be predicted.")]
TestShare = Annotated[
    float | None, typer.Option(help="Set aside for the test where the data have no test side.")
]
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
TrackerName = Annotated[
    str | None,
    typer.Option("--tracker", help="Show rounds on tensorboard, wandb, mlflow or module:Class."),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting, as section.key=value; may be repeated."),
]
for _command in (commands.predict, commands.evaluate, commands.export, language.prune):
    cli.command()(_command)
cli.add_typer(server, name="server")
cli.add_typer(fleet, name="fleet")
cli.add_typer(device, name="device")


@cli.command()
def run(  # noqa: PLR0917 - the command's options
    method: Method = None,
    dataset: Dataset = None,
    resize: Resize = None,
    columns: ColumnNames = None,
    target: Target = "",
    test_share: TestShare = None,
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
    superlink: Annotated[
        str, typer.Option(help="Submit it to this federation, a connection of Flower's.")
    ] = "",
    wait: Annotated[
        float,
        typer.Option(help="Seconds after which a federation that has gone is given up."),
    ] = 600.0,
    tracker: TrackerName = None,
    baseline: Annotated[
        bool,
        typer.Option("--baseline", help="Then run it without pruning: the page compares them."),
    ] = False,
    config: ConfigFile = None,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Train one federated model and leave it in a run folder."""
    given = {
        METHOD_NAME: method,
        "data.dataset": dataset,
        "data.resize": resize,
        "data.columns": with_target(columns or "", target) or None,
        "data.test_share": test_share,
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
    from fedprune.reports.progress import Watch  # noqa: PLC0415
    from fedprune.reports.results import summary_rows  # noqa: PLC0415
    from fedprune.reports.trackers import tracker_of  # noqa: PLC0415
    from fedprune.rounds import folder as runfolder  # noqa: PLC0415
    from fedprune.rounds import run as runner  # noqa: PLC0415

    values = _values(config, {**parse_assignments(settings or []), **_given(given)})
    if superlink and engine != "flower":
        raise ConfigError(f"--engine {engine} computes here: give it without --superlink")
    if superlink and baseline:
        raise ConfigError("--baseline runs here: give it without --superlink, with an --engine")
    if superlink and not resume and not values.get("data.clients"):
        from fedprune.fleet.submit import count_nodes  # noqa: PLC0415

        values["data.clients"] = count_nodes(superlink)
    folder = out or runfolder.default_folder(_build_config(own_settings(values)), resume=resume)
    if resume:  # the folder knows its own settings; there is no need to repeat them
        values = continued(_stored(folder), values)
    if density is not None and "method.density" not in own_settings(values):
        errors.print("note: --density has no effect: this method has no such setting")
        del values["method.density"]
    run_config = _build_config(values)
    follower = None if tracker is None else tracker_of(tracker)
    missing = _missing_dense(run_config, folder) if baseline else None
    was_complete = resume and (folder / runfolder.SUMMARY).exists()
    watch = Watch(folder, run_config)
    summary = runner.run(
        run_config, folder, engine=engine, resume=resume, progress=watch, say=_say_under(watch),
        tracker=follower, superlink=superlink, wait=wait,
    )  # fmt: skip
    if not summary:
        say(f"complete; its folder is {folder.resolve()} on the machine of {superlink}")
        return
    if was_complete:
        say(f"already complete: {folder}")
    show_table(["", ""], summary_rows(summary), title="result")
    say(f"model:  {folder / runfolder.MODEL}")
    say(f"report: {folder / runfolder.REPORT}")
    if missing is not None:
        from fedprune.reports.page import write_report  # noqa: PLC0415

        _compared([cell for cell, _ in missing], [path for _, path in missing], engine, console)
        write_report(folder)


@cli.command()
def compare(  # noqa: PLR0917 - the command's options
    methods: Annotated[str, typer.Option(help="Comma-separated method names.")] = ",".join(
        [*BASELINES, DEFAULT_METHOD]
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
    options = {**parse_assignments(settings or []), **_given(given)}
    cells = []
    for method in listed(methods):
        for seed in listed(seeds):
            values = {**options, METHOD_NAME: method, "seed": seed}
            cells.append(_build_config(own_settings(_values(config, values))))
    folders = [out / f"{cell.method.name}-s{cell.seed}" for cell in cells]
    summaries = _compared(cells, folders, engine, errors if as_json else console)
    if as_json:
        print(json.dumps(summaries))
        return
    show_table(*comparison_table(summaries))


@cli.command()
def report(folder: Path, debug: Debug = False) -> None:
    """Write report.html of a run folder again."""
    from fedprune.reports.page import write_report  # noqa: PLC0415

    say(f"report: {write_report(folder)}")


@cli.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this one, or module:Class.")] = None,
    criteria: Annotated[
        bool,
        typer.Option(
            "--criteria", help="Of sparsemodel.prune and fedprune prune, in place of the methods."
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """List the methods, or the criteria of pruning; or show one whole."""
    if criteria:
        _show_criteria(name)
        return
    if name is not None:
        kind = method_class(name)
        _show_whole(name, kind.__doc__, TRAITS.get(name))
        settings = (f"{key}={value}" for key, value in kind().settings().items())
        say("\n".join(_paragraphs(f"\nsettings: {', '.join(settings) or 'none'}")))
        say("--set method.NAME=VALUE changes one")
        return
    show_list(["method", "what it is"], [[k, _first_sentence(kind)] for k, kind in METHODS.items()])
    say("")
    show_list(["method", *_TRAITS], [_traits_row(k, traits) for k, traits in TRAITS.items()])
    say("fedprune methods NAME shows one whole; --criteria lists criteria of pruning")


@cli.command()
def demo(
    rounds: Annotated[int, typer.Option(help="Communication rounds.")] = 20,
    seed: Annotated[int, typer.Option(help="Decides every random choice.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="A new folder; default: one under runs/.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show in half a minute what federated pruning does, on eight clients in this process."""
    from fedprune.demo import demo as show  # noqa: PLC0415
    from prunelab.runs.folder import default_path  # noqa: PLC0415

    show(out or default_path("demo", resume=False), rounds=rounds, seed=seed, say=say)


@cli.command()
def new(
    folder: Annotated[Path, typer.Argument(help="A new folder, which names the app: my-app.")],
    debug: Debug = False,
) -> None:
    """Make an app of Flower's with a network, a data set and a method to edit."""
    from fedprune.flower.new import new_app  # noqa: PLC0415

    made = new_app(folder)
    say(f"made {made}; edit {made.name.lower().replace('-', '_')}/ in it, then, in that folder:")
    say("  python run.py        this process")
    say("  flwr run . --stream  Flower's simulation, or a SuperLink")


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
    rows = []
    silent = outputs = dense = 0
    for name, size in state.shapes().items():
        shape, pattern = "x".join(map(str, size)), state.pattern(name)
        dense += 4 * math.prod(size)
        if pattern is not None:
            zeros = _silent_rows(pattern.row_ptr, state.values[name])
            silent, outputs = silent + zeros, outputs + size[0]
            density = f"{pattern.num_active / pattern.num_weights:.4f}"
            silence = f"{zeros} of {size[0]}"
            rows.append([name, shape, f"{pattern.num_active:,}", density, silence])
        else:
            rows.append([name, shape, f"{math.prod(size):,}", "dense", ""])
    show_table(["tensor", "shape", "active", "density", "silent outputs"], rows)
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


_TRAITS = ("when", "units", "looks at", "goes by")
"""When is with respect to training."""


def _traits_row(name: str, traits: Any) -> list[str]:
    units, data = (", ".join(found) or NOTHING for found in (traits.units, traits.data))
    return [name, traits.when, units, data, traits.criterion]


def _show_criteria(name: str | None) -> None:
    from sparsemodel.masks.registry import CRITERIA  # noqa: PLC0415
    from sparsemodel.units.registry import UNIT_CRITERIA  # noqa: PLC0415

    registries: tuple[Mapping[str, Any], ...] = (CRITERIA, UNIT_CRITERIA)
    if name is None:
        rows = [["of weights", *_TRAITS], *(_traits_row(k, e) for k, e in CRITERIA.items())]
        header, *others = [[k, when, *rest] for k, when, _, *rest in rows]  # all have one unit
        show_list(header, others)
        say("")
        show_list(["of units", *_TRAITS], [_traits_row(k, e) for k, e in UNIT_CRITERIA.items()])
        say("fedprune methods --criteria NAME shows one whole; docs/pruning.md has examples")
        return
    found = [registry[name] for registry in registries if name in registry]
    if not found:
        known = list(dict.fromkeys(key for registry in registries for key in registry))
        hint = close_names(name, known)
        raise ConfigError(f"unknown criterion {name!r}; known: {', '.join(known)}{hint}")
    for entry in found:
        _show_whole(name, entry.score.__doc__, entry)


def _show_whole(name: str, doc: str | None, traits: Any) -> None:
    """A docstring, and what kind of pruning it is where that is said."""
    say("\n".join(_paragraphs(f"{name}: {python_inspect.cleandoc(doc or '')}".split("\n\n>>>")[0])))
    if traits is not None:
        _, *values = _traits_row(name, traits)
        said = [f"{key}: {value}" for key, value in zip(_TRAITS, values, strict=True)]
        say("\n".join(_paragraphs("\n" + "; ".join([*said, f"source: {traits.source}"]))))


def _first_sentence(kind: type[FederatedMethod]) -> str:
    return (python_inspect.cleandoc(kind.__doc__ or "")).partition("\n")[0]


def _paragraphs(text: str) -> list[str]:
    """A docstring's lines for the window: those of a paragraph are joined, and cut at words."""
    joined: list[str] = []
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip())
        if joined and joined[-1] and line and (depth > 4 or not depth):
            joined[-1] += f" {line.strip()}"
        else:
            joined.append(line)
    return [
        part
        for line in joined
        for part in textwrap.wrap(
            line, console.width, subsequent_indent="      " * line.startswith(" ")
        )
        or [""]
    ]


def _missing_dense(config: RunConfig, folder: Path) -> list[tuple[RunConfig, Path]] | None:
    """The same run without pruning, if there is none beside; None where nothing is pruned.

    Raises:
        RunError: its folder holds something else.
    """
    from fedprune.reports.baseline import runs_beside  # noqa: PLC0415
    from fedprune.rounds import folder as runfolder  # noqa: PLC0415

    if config.method.name == FederatedMethod.name:
        errors.print("note: --baseline has no effect: this method prunes nothing")
        return None
    if any(other.is_dense for other in runs_beside(folder, config)):
        return []
    values = for_method(config.flat(), FederatedMethod.name)
    dense = _build_config({**values, METHOD_NAME: FederatedMethod.name})
    named = folder.resolve() if folder.name in {"", ".."} else folder
    path = named.with_name(f"{named.name}-dense")
    runfolder.check_usable(path, dense, resume=(path / runfolder.CONFIG).exists())
    return [(dense, path)]


def _say_under(watch: Any) -> Any:
    """Lines of what is being done, under the run's heading."""
    begun = False

    def show(text: str) -> None:
        nonlocal begun
        if not begun:
            watch.heading()
        begun = True
        say(text)

    return show


def _compared(
    cells: list[RunConfig], folders: list[Path], engine: str, console: Console
) -> list[dict[str, Any]]:
    """The summaries of all runs, in their order; progress goes to the console."""
    from fedprune.reports.progress import Watch, is_round  # noqa: PLC0415
    from fedprune.reports.results import Measure  # noqa: PLC0415
    from fedprune.rounds import folder as runfolder  # noqa: PLC0415
    from fedprune.rounds import run as runner  # noqa: PLC0415
    from prunelab.pages.units import format_seconds  # noqa: PLC0415

    summaries: dict[int, dict[str, Any]] = {}
    # The pages of the others compare themselves with these.
    first = {name: place for place, name in enumerate(BASELINES)}
    order = sorted(range(len(cells)), key=lambda k: first.get(cells[k].method.name, len(first)))
    for number, place in enumerate(order, 1):
        cell, folder = cells[place], folders[place]
        what = f"{number}/{len(cells)} {folder}"
        end = "already complete" if (folder / runfolder.SUMMARY).exists() else ""
        with progress_bar(console) as bar:

            def show(line: Mapping[str, Any], what: str = what, cell: RunConfig = cell) -> None:
                bar(what, line["round"] if is_round(line) else 0, cell.training.rounds)

            show({})
            summary = runner.run(
                cell, folder, engine=engine, resume=(folder / runfolder.CONFIG).exists(),
                progress=Watch(folder, cell, show=show),
            )  # fmt: skip
        end = end or format_seconds(summary["seconds"])
        measure = Measure.of(summary)
        say(f"{what}: {measure.show(summary[measure.key])}, {end}", to=console)
        summaries[place] = summary
    return [summaries[place] for place in range(len(cells))]


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _values(path: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file, if there is one, and in their place those of `options`.

    A file may be of a run of another method than the options name: what only that one knows is
    left out.
    """
    values = read_toml(path) if path else {}
    name = options.get(METHOD_NAME, values.get(METHOD_NAME))
    if name != values.get(METHOD_NAME):
        values = for_method(values, name)
    return {**values, **options}


def _build_config(values: Mapping[str, Any]) -> RunConfig:
    dataset = values.get("data.dataset")
    if isinstance(dataset, str):
        values = {**values, "data.dataset": name_dataset(dataset)}
    return RunConfig.parse(values)


def _stored(out: Path) -> dict[str, Any]:
    from fedprune.rounds.folder import CONFIG, stored_settings  # noqa: PLC0415

    if not (out / CONFIG).exists():
        raise RunError(f"nothing to resume in {out}: it has no {CONFIG}")
    return stored_settings(out)
