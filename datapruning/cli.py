"""The `datapruning` command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from click.core import ParameterSource

from datapruning.errors import ScoreError, SelectionError
from datapruning.recommend.cli import Force
from datapruning.recommend.cli import app as recommend
from prunelab.data.reading import TEST_SHARE, reading, with_target
from prunelab.errors import PrunelabError, RunError
from prunelab.pages.console import (
    errors,
    escaped,
    listed,
    progress_bar,
    run_command,
    say,
    show_list,
    show_table,
    version_of,
    warnings_shown,
)
from sparsemodel.errors import SparseModelError

cli = typer.Typer(
    help="Score training samples, keep the ones worth training on, and train on them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cli.add_typer(recommend, name="recommend")


@cli.callback()
def options(version: Annotated[bool, version_of("datapruning")] = False) -> None:
    """Options of the command itself."""


def main() -> None:
    """Entry point."""
    run_command(cli, expected=(PrunelabError, SparseModelError), go_on=_how_to_go_on)


def _how_to_go_on(arguments: Sequence[str]) -> str:
    if arguments[:1] == ["train"]:
        return "continue with the same command and --resume"
    again = shlex.join(argument for argument in arguments if argument != "--force")
    return f"what was finished is kept; go on with: datapruning {again}"


Dataset = Annotated[
    str,
    typer.Argument(
        help="A data set's name; a folder of class folders, of parquet or of arrays; a table "
        "(.csv, .tsv, .parquet); arrays (.npz); or module:function."
    ),
]
Resize = Annotated[str, typer.Option(help="Bring pictures to N or HxW pixels.")]
ColumnNames = Annotated[
    str, typer.Option("--columns", help="What columns are for: image=picture,label=kind.")
]
Target = Annotated[str, typer.Option(help="The column of a table that is to be predicted.")]
TestShare = Annotated[
    float, typer.Option(help="Set aside for the test where the data have no test side.")
]
Model = Annotated[str, typer.Option(help="A network's name, or module:function.")]
Seed = Annotated[int, typer.Option(help="Decides every random choice.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(help="Of torch; the bits of a result depend on it.")]
Epochs = Annotated[int, typer.Option(help="Passes over the samples.")]
BatchSize = Annotated[int, typer.Option(help="Samples of an optimiser step.")]
Lr = Annotated[float, typer.Option(help="Learning rate of the first step.")]
Precision = Annotated[
    str, typer.Option(help="float32, or bfloat16: faster on processors that compute in it.")
]
Augment = Annotated[bool, typer.Option("--augment", help="Random crops and flips.")]
Keeps = Annotated[str, typer.Option("--keep", help="Kept fractions, with commas between them.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of a method, as name=value; may be repeated."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]


@cli.command()
def score(  # noqa: PLR0917 - the command's options
    dataset: Dataset,
    method: Annotated[str, typer.Option(help="One or more names, with commas between them.")],
    resize: Resize = "",
    columns: ColumnNames = "",
    target: Target = "",
    task: Annotated[
        str, typer.Option(help="What labels are for: classification, regression, multi-label.")
    ] = "",
    test_share: TestShare = TEST_SHARE,
    out: Annotated[Path, typer.Option(help="Parquet file for the scores.")] = Path(
        "scores.parquet"
    ),
    model: Model = "resnet8",
    density: Annotated[
        float | None, typer.Option(help="Score with a sparse model of this density.")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="With --density: score with the dense model too, to compare.")
    ] = True,
    seed: Seed = 0,
    epochs: Epochs = 20,
    batch_size: BatchSize = 64,
    lr: Lr = 0.1,
    precision: Precision = "float32",
    early: Annotated[int | None, typer.Option(help="Epochs after which early scores look.")] = None,
    runs: Annotated[
        int | None,
        typer.Option(help="Models for methods that train several, in place of their own number."),
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer whose output is the embedding.")] = None,
    engine: Annotated[str, typer.Option(help="inline, or ray for a Ray cluster.")] = "inline",
    device: Device = "cpu",
    threads: Threads = 1,
    shard_size: Annotated[int, typer.Option(help="Samples of a part.")] = 4096,
    settings: Options = None,
    streamed: Annotated[
        bool,
        typer.Option("--stream", help="Read the folder's parquet or tar files as they are needed."),
    ] = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Score every training sample; run again after an interruption to go on."""
    from datapruning.reports.score_report import proxy_check, report_path, write_score_report  # noqa: PLC0415
    from datapruning.scoring.score import dense_path, table_paths  # noqa: PLC0415
    from datapruning.scoring.score import score as run_score  # noqa: PLC0415
    from prunelab.data.given import described, load_sample_set  # noqa: PLC0415
    from prunelab.data.sides import SampleSet  # noqa: PLC0415
    from prunelab.data.streamed import stream  # noqa: PLC0415
    from prunelab.training.loop import TrainingConfig  # noqa: PLC0415
    from prunelab.training.task import ImageClassification  # noqa: PLC0415

    how = reading(
        resize=resize, columns=with_target(columns, target), task=task, test_share=test_share
    )
    names = listed(method)
    _check_suffix(out)
    paths, page = table_paths(out, names), report_path(out)
    _check_page(page, has_tables=force or all(path.exists() for path in paths.values()))
    dense = table_paths(dense_path(out), names) if density is not None and check else {}
    is_new = force or not page.exists() or not all(path.exists() for path in dense.values())
    with progress_bar() as progress, warnings_shown():
        data: Any = dataset
        if streamed:
            data = stream(dataset, resize=how.resize, columns=dict(how.columns))
            both = SampleSet(data.name, data, None, class_names=data.class_names)
        else:
            both = load_sample_set(dataset, how=how)
        say(described(both))
        tables = run_score(
            data, method=names, model=model, out=out,
            reading=None if streamed else how,
            task=None if layer is None else ImageClassification(layer=layer),
            training=TrainingConfig(
                epochs=epochs, batch_size=batch_size, lr=lr, precision=precision
            ),
            seed=seed, density=density, check=check, runs=runs, early=early,
            options=_assignments(settings), engine=engine, device=device, threads=threads,
            shard_size=shard_size, force=force, progress=progress,
        )  # fmt: skip
    rows = []
    for name, scores in tables.items():
        known = scores.scores[scores.scores.isfinite()]
        values = (
            [f"{float(v):.4g}" for v in (known.min(), known.median(), known.max())]
            if len(known)
            else ["–"] * 3
        )
        rows.append([name, f"{len(scores):,}", *values])
    show_table(["method", "samples", "lowest", "median", "highest"], rows)
    for name in names:
        say(f"{name}: {paths[name]}")
    if "confident-learning" in tables:
        wrong = int((tables["confident-learning"].scores > 1).sum())
        say(
            f"confident-learning: {wrong:,} labels look wrong; select --policy easiest --keep "
            f"{len(tables['confident-learning']) - wrong} drops them and nothing else"
        )
    for name in names:
        found = proxy_check(paths[name])
        if found is not None:
            share = "" if found[1] is None else f", {100 * found[1]:.0f} % of its processor time"
            say(f"{name}: Spearman {found[0].spearman:.3f} with the dense model's scores{share}")
    if is_new:
        write_score_report(list(paths.values()), page)
    say(f"report: {page}")


@cli.command()
def select(  # noqa: PLR0917 - the command's options
    scores: Annotated[Path, typer.Argument(help="What `datapruning score` wrote.")],
    keep: Annotated[
        str, typer.Option(help="A share with a dot or a % (0.5, 50%), or a number of samples.")
    ],
    out: Annotated[Path, typer.Option(help="Parquet file for the kept ids.")] = Path(
        "kept.parquet"
    ),
    policy: Annotated[str, typer.Option(help="hardest, easiest, random, auto, ...")] = "hardest",
    balance: Annotated[
        bool, typer.Option("--balance", help="Every class keeps half its fair share or more.")
    ] = False,
    seed: Seed = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the policy, as name=value; may be repeated."),
    ] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Choose exactly so many samples of a table of scores."""
    from datapruning.reports.score_report import class_counts, report_path, write_score_report  # noqa: PLC0415
    from datapruning.selection.select import parsed_keep  # noqa: PLC0415
    from datapruning.selection.select import select as run_select  # noqa: PLC0415
    from datapruning.selection.table import ScoreTable, write_once  # noqa: PLC0415

    _check_suffix(out)
    page = report_path(out)
    _check_page(page, has_tables=force or out.exists())
    table = ScoreTable.read(scores)
    subset = run_select(
        table, keep=parsed_keep(keep), policy=policy, seed=seed, class_balanced=balance,
        **_assignments(settings),
    )  # fmt: skip
    is_new = write_once(subset, out, force=force)
    if table.labels is not None:
        rows = []
        for label, (before, after) in enumerate(zip(*class_counts(table, subset), strict=True)):
            share = f"{100 * after / before:.1f} %" if before else "–"
            rows.append([str(label), f"{before:,}", f"{after:,}", share])
        show_table(["class", "samples", "kept", "share"], rows)
    for note in subset.provenance.get("notes", []):
        errors.print(f"[yellow]note:[/yellow] {escaped(note)}", soft_wrap=True, highlight=False)
    say(f"kept: {len(subset):,} of {len(table):,} samples ({subset.policy}) -> {out}")
    if is_new or not page.exists():
        write_score_report([scores], page, subset=subset)
    say(f"report: {page}")


@cli.command()
def train(  # noqa: PLR0917 - the command's options
    context: typer.Context,
    dataset: Dataset,
    resize: Resize = "",
    columns: ColumnNames = "",
    target: Target = "",
    test_share: TestShare = TEST_SHARE,
    subset: Annotated[
        Path | None, typer.Option(help="What `datapruning select` wrote; default: all samples.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Run folder of a teacher to distil from.")
    ] = None,
    alpha: Annotated[
        str, typer.Option(help="Weight of the teacher, 0 to 1, or auto: on held-out samples.")
    ] = "auto",
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = 4.0,
    model: Model = "resnet8",
    epochs: Epochs = 20,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, in place of epochs.")] = None,
    batch_size: BatchSize = 64,
    lr: Lr = 0.1,
    weight_decay: Annotated[float, typer.Option(help="L2 penalty.")] = 5e-4,
    augment: Augment = False,
    precision: Precision = "float32",
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default: a new one under runs/.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    device: Device = "cpu",
    threads: Threads = 1,
    debug: Debug = False,
) -> None:
    """Train one model, on all samples or on a subset, with or without a teacher."""
    from datapruning.reports.training_report import run_facts, write_run_report  # noqa: PLC0415
    from datapruning.students import runner  # noqa: PLC0415
    from prunelab.data.given import described, load_sample_set  # noqa: PLC0415
    from prunelab.training.loop import TrainingConfig  # noqa: PLC0415

    settings = runner.RunSettings(
        dataset=str(Path(dataset).resolve()) if Path(dataset).exists() else dataset,
        resize=resize,
        columns=with_target(columns, target),
        test_share=test_share,
        model=model,
        seed=seed,
        subset="" if subset is None else str(subset),
        teacher="" if teacher is None else str(teacher),
        alpha=_alpha(alpha),
        temperature=temperature,
        device=device,
        threads=threads,
        training=TrainingConfig(
            epochs=epochs, steps=steps, batch_size=batch_size, lr=lr,
            weight_decay=weight_decay, augment=augment, precision=precision,
        ),
    )  # fmt: skip
    folder = out or runner.default_folder(settings, resume=resume)
    if resume:  # the folder knows its own settings; there is no need to repeat them
        given = {
            name: value
            for name, value in {**asdict(settings), **asdict(settings.training)}.items()
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        }
        if target:
            given["columns"] = settings.columns
        settings = runner.RunSettings.read(folder).continued(given)
    with warnings_shown():
        say(described(load_sample_set(settings.dataset, how=settings.reading)))
        summary = runner.run(settings, folder, resume=resume, progress=say)
    page = write_run_report(folder)
    rows = [[fact.label, fact.line] for fact in run_facts(summary)]
    show_table(["", ""], rows, title="result")
    say(f"model:  {folder / 'model.safetensors'}")
    say(f"report: {page}")


@cli.command()
def compare(  # noqa: PLR0917 - the command's options
    tables: Annotated[
        list[Path] | None, typer.Argument(help="Two or more files of scores of the same data.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Train on what these methods keep, instead.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="With --methods: what to train on.")] = "digits",
    keep: Keeps = "0.3,0.5,0.7",
    seeds: Annotated[str, typer.Option(help="With --methods: seeds.")] = "0,1,2",
    policy: Annotated[str, typer.Option(help="With --methods: selection policy.")] = "hardest",
    model: Model = "resnet8",
    epochs: Epochs = 20,
    out: Annotated[Path, typer.Option(help="With --methods: folder of its cells.")] = Path(
        "runs/compare-data"
    ),
    threads: Threads = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Compare tables of scores; or, with --methods, accuracies after training on what they keep."""
    keeps = [_share(part) for part in listed(keep)]
    if methods is not None:
        _compare_training(
            dataset, listed(methods), keeps=keeps, seeds=[_whole(s) for s in listed(seeds)],
            policy=policy, model=model, epochs=epochs, out=out, threads=threads, as_json=as_json,
        )  # fmt: skip
        return
    if not tables or len(tables) < 2:
        raise ScoreError(
            "give two or more files of scores, or --methods to compare trainings on what they keep"
        )
    _compare_tables(tables, keeps, as_json=as_json)


@cli.command()
def report(
    source: Annotated[Path, typer.Argument(help="A run folder, or a file of scores.")],
    others: Annotated[
        list[Path] | None, typer.Argument(help="More files of scores of the same data.")
    ] = None,
    subset: Annotated[Path | None, typer.Option(help="What was kept by these scores.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page; default: beside the source.")] = None,
    debug: Debug = False,
) -> None:
    """Write the page of a run folder or of scores again."""
    if source.is_dir():
        from datapruning.reports.training_report import write_run_report  # noqa: PLC0415

        say(f"report: {write_run_report(source)}")
        return
    from datapruning.reports.score_report import report_path, write_score_report  # noqa: PLC0415
    from datapruning.selection.table import Subset  # noqa: PLC0415

    kept = None if subset is None else Subset.read(subset)
    target = out or report_path(source)
    say(f"report: {write_score_report([source, *(others or [])], target, subset=kept)}")


@cli.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.")] = None,
) -> None:
    """List the methods, what each trains, and its options."""
    from datapruning.scoring.methods import METHODS, check_method  # noqa: PLC0415

    if name is not None:
        method = check_method(name)
        say(f"{name}: {method.summary}")
        say(f"source: {method.source}")
        say(f"models trained: {method.runs or 'none'}")
        say(f"options: {_listed_options(method.options)}")
        return
    rows = [[key, str(method.runs or "–"), method.summary] for key, method in METHODS.items()]
    show_list(["method", "models", "what a score is"], rows)
    say("datapruning methods NAME shows one whole, with its options and its source")


def _listed_options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in options.items()) or "none"


def _compare_tables(paths: Sequence[Path], keeps: Sequence[float], *, as_json: bool) -> None:
    from itertools import combinations  # noqa: PLC0415

    from datapruning.selection.agreement import agreement  # noqa: PLC0415
    from datapruning.selection.table import ScoreTable  # noqa: PLC0415

    loaded = [(path, ScoreTable.read(path)) for path in paths]
    header = ["tables", "Spearman", *(f"both keep, at {100 * k:g} %" for k in keeps)]
    # A method's name tells a table, where no other has the same.
    same = len({table.method for _, table in loaded}) < len(loaded)
    rows, records = [], []
    for (path_a, a), (path_b, b) in combinations(loaded, 2):
        found = agreement(a, b, keeps=keeps)
        shares = [f"{100 * share:.1f} %" for share in found.overlap.values()]
        names = [str(path) if same else t.method for t, path in ((a, path_a), (b, path_b))]
        rows.append([", ".join(names), f"{found.spearman:.3f}", *shares])
        overlap = {f"{keep:g}": share for keep, share in found.overlap.items()}
        records.append(
            {"a": str(path_a), "b": str(path_b), "spearman": found.spearman, "overlap": overlap}
        )
    if as_json:
        print(json.dumps(records))
    else:
        show_table(header, rows)


def _compare_training(
    dataset: str,
    names: Sequence[str],
    *,
    keeps: Sequence[float],
    seeds: Sequence[int],
    epochs: int,
    as_json: bool,
    **settings: Any,
) -> None:
    from datapruning.scoring.methods import check_method  # noqa: PLC0415
    from datapruning.students.comparison import BUDGETS, compare_training, result_table  # noqa: PLC0415
    from prunelab.data.datasets import load_dataset  # noqa: PLC0415
    from prunelab.training.loop import TrainingConfig  # noqa: PLC0415

    for name in names:
        check_method(name)
    config = TrainingConfig(epochs=epochs)
    with warnings_shown():
        results = compare_training(
            load_dataset(dataset), names, keeps=keeps, seeds=seeds, training=config,
            scoring={"training": config}, progress=say if not as_json else errors.print,
            **settings,
        )  # fmt: skip
    if as_json:
        print(json.dumps([{**asdict(cell), **result} for cell, result in results.items()]))
        return
    for budget in BUDGETS:
        header, rows = result_table(results, budget=budget)
        say(f"test accuracy, %, at equal {budget}:")
        show_table(header, rows)


def _assignments(entries: Sequence[str] | None) -> dict[str, Any]:
    """["window=5"] -> {"window": 5}: JSON where it is some, else text."""
    values = {}
    for entry in entries or []:
        key, equals, value = entry.partition("=")
        if not equals:
            raise ScoreError(f"--set {entry!r}: expected name=value")
        try:
            values[key.strip()] = json.loads(value)
        except ValueError:
            values[key.strip()] = value.strip()
    return values


def _check_page(page: Path, *, has_tables: bool) -> None:
    """Refuse a page that is there without what it would show: it is of something else."""
    from datapruning.selection.table import OR_FORCE  # noqa: PLC0415

    if page.exists() and not has_tables:
        raise RunError(f"{page} is there and would be overwritten; {OR_FORCE}")


def _check_suffix(path: Path) -> None:
    if path.suffix != ".parquet":
        raise ScoreError(f"--out {path}: expected the name of a parquet file, such as s.parquet")


def _share(text: str) -> float:
    from datapruning.selection.select import parsed_keep  # noqa: PLC0415

    value = parsed_keep(text)
    if not isinstance(value, float) or not 0 < value < 1:
        raise SelectionError(f"--keep {text}: expected a share between 0 and 1, as 0.3 or 30%")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RunError(f"--seeds {text!r}: expected whole numbers with commas between") from None


def _alpha(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
