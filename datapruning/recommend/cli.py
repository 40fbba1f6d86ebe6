"""The `datapruning recommend` commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunelab.errors import RunError
from prunelab.pages.console import say, show_table

if TYPE_CHECKING:
    from torch import Tensor

    from datapruning.recommend.histories import Histories

app = typer.Typer(
    help="DEALRec: fine-tune a language model as a recommender, on few well-chosen samples.",
    no_args_is_help=True,
)

Data = Annotated[
    str,
    typer.Argument(
        help="Folder with sequential_train.txt and items.tsv, a table of interactions, or hf:NAME."
    ),
]
Titles = Annotated[
    Path | None, typer.Option(help="Table with columns item and title, if the data have none.")
]
Model = Annotated[
    str, typer.Option(help="Name or folder of a causal language model, or scratch:tiny|small.")
]
Template = Annotated[str | None, typer.Option(help="plain or instruction; default: by the model.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of prompt and answer.")]
MaxTitles = Annotated[int, typer.Option(help="Titles of a history, the most recent.")]
Seed = Annotated[int, typer.Option(help="Decides every random choice.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Out = Annotated[Path, typer.Option(help="Folder for what is written.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


@app.command()
def score(  # noqa: PLR0917 - the command's options
    data: Data,
    out: Out = Path("runs/recommend"),
    model: Model = "scratch:tiny",
    titles: Titles = None,
    weight: Annotated[float, typer.Option(help="λ of effort; .3 for Games, else 1.")] = 0.3,
    epochs: Annotated[int, typer.Option(help="Of the surrogate, at most.")] = 200,
    patience: Annotated[int, typer.Option(help="Epochs of the surrogate without a gain.")] = 10,
    negatives: Annotated[
        int, typer.Option(help="Sampled for the surrogate's softmax; 0: all items.")
    ] = 512,
    template: Template = None,
    max_length: MaxLength = 256,
    max_titles: MaxTitles = 10,
    seed: Seed = 0,
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Score every sample by influence and effort; run again after an interruption to go on."""
    from datapruning.recommend import steps  # noqa: PLC0415
    from datapruning.recommend.histories import HistorySamples  # noqa: PLC0415
    from datapruning.recommend.language import check_name  # noqa: PLC0415
    from datapruning.recommend.overall import overall_table  # noqa: PLC0415
    from datapruning.recommend.surrogate import SurrogateConfig  # noqa: PLC0415
    from datapruning.selection.table import write_once  # noqa: PLC0415

    check_name(model)
    histories = _read(data, titles)
    config = SurrogateConfig(epochs=epochs, patience=patience, negatives=negatives or None)
    samples = HistorySamples(histories, max_length=config.max_length)
    influence = steps.influence_table(
        histories, samples, out, config=config, seed=seed, device=device, report=say
    )
    settings = steps.PromptSettings(template, max_length, max_titles)
    language = steps.load_language(
        model, histories, settings=settings, device=device, base=out / "base", report=say
    )
    effort = steps.effort_table(
        histories, samples, out, language_model=language, seed=seed, report=say
    )
    overall = overall_table(influence, effort, weight=weight)
    write_once(overall, out / "scores.parquet", force=force)
    for name in overall.provenance["equal"]:
        say(f"note: all scores of {name} are equal and rank nothing")
    rows = []
    for kind in (influence, effort, overall):
        values = (kind.scores.min(), kind.scores.median(), kind.scores.max())
        seconds = kind.provenance.get("seconds")
        shown = "–" if seconds is None else f"{seconds:.0f}"
        rows.append([kind.method, *[f"{float(v):.4g}" for v in values], shown])
    show_table(["score", "lowest", "median", "highest", "seconds"], rows)
    say(f"scores of {len(overall):,} samples: {out / 'scores.parquet'}")
    if model.startswith("scratch:"):
        say(f"the model that knows the titles: {out / 'base'} (fine-tune with --model this)")


@app.command()
def select(  # noqa: PLR0917 - the command's options
    scores: Annotated[Path, typer.Argument(help="What `recommend score` wrote.")],
    keep: Annotated[
        str, typer.Option(help="A number of samples, or a share with a dot or a % (0.5, 50%).")
    ] = "1024",
    out: Annotated[Path, typer.Option(help="Parquet file for the kept ids.")] = Path(
        "kept.parquet"
    ),
    groups: Annotated[int, typer.Option(help="Groups of equal width.")] = 50,
    cut: Annotated[float, typer.Option(help="Share of the highest scores dropped first.")] = 0.1,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Choose exactly so many samples, covering the range of scores."""
    from datapruning.recommend.overall import select_covering  # noqa: PLC0415
    from datapruning.selection.select import parsed_keep  # noqa: PLC0415
    from datapruning.selection.table import ScoreTable, write_once  # noqa: PLC0415

    table = ScoreTable.read(scores)
    subset = select_covering(table, keep=parsed_keep(keep), seed=seed, num_groups=groups, cut=cut)
    write_once(subset, out, force=force)
    say(f"kept: {len(subset):,} of {len(table):,} samples -> {out}")


@app.command()
def finetune(  # noqa: PLR0917 - the command's options
    data: Data,
    subset: Annotated[
        Path | None, typer.Option(help="What `recommend select` wrote; default: all samples.")
    ] = None,
    out: Out = Path("runs/recommender"),
    model: Model = "scratch:tiny",
    titles: Titles = None,
    epochs: Annotated[int, typer.Option(help="Passes over the samples.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, in place of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples of an optimiser step.")] = 32,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 3e-4,
    template: Template = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and answer.")] = None,
    max_titles: Annotated[int | None, typer.Option(help="Titles of a history.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Fine-tune a language model; the same command again goes on after an interruption."""
    from datapruning.recommend import steps as parts  # noqa: PLC0415
    from datapruning.recommend.finetune import FinetuneConfig, FinetuneResult  # noqa: PLC0415
    from datapruning.recommend.finetune import finetune as run  # noqa: PLC0415
    from datapruning.recommend.histories import HistorySamples  # noqa: PLC0415
    from datapruning.selection.table import Subset  # noqa: PLC0415

    histories = _read(data, titles)
    samples = HistorySamples(histories)
    rows = None if subset is None else Subset.read(subset).rows(samples)
    settings = parts.PromptSettings.of(Path(model)) or parts.PromptSettings()
    given = {"template": template, "max_length": max_length, "max_titles": max_titles}
    settings = settings.changed(**{name: value for name, value in given.items() if value})
    language = parts.load_language(
        model, histories, settings=settings, device=device, base=out / "base", report=say
    )
    adapted = language.adapted(seed=seed)
    config = FinetuneConfig(epochs=epochs, steps=steps, batch_size=batch_size, lr=lr)
    total = config.num_steps(len(samples) if rows is None else len(rows))

    def told(result: FinetuneResult) -> None:
        if result.steps % max(1, total // 20) == 0 or result.steps == total:
            say(f"step {result.steps} of {total}: loss {result.losses[-1]:.3f}")

    run(
        adapted, language.prompts.samples(samples), config=config, seed=seed, rows=rows,
        checkpoint=out / "finetune.ckpt", on_step=told,
    )  # fmt: skip
    language.save(out / "model", adapted)
    say(f"model: {out / 'model'}")


@app.command()
def evaluate(  # noqa: PLR0917 - the command's options
    data: Data,
    model: Annotated[
        str, typer.Option(help="What `recommend finetune` wrote, a name, or popularity.")
    ] = "popularity",
    split: Annotated[str, typer.Option(help="test or valid.")] = "test",
    titles: Titles = None,
    users: Annotated[int | None, typer.Option(help="Draw so many; default: all.")] = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Rank all items for every user with held-out items."""
    import torch  # noqa: PLC0415

    from datapruning.recommend import surrogate  # noqa: PLC0415
    from datapruning.recommend.grounding import language_recommender  # noqa: PLC0415
    from datapruning.recommend.steps import load_language  # noqa: PLC0415
    from prunelab.runs.seeds import generator  # noqa: PLC0415

    histories = _read(data, titles, quiet=as_json)
    question = histories.question(split)
    if len(question) == 0:
        raise RunError(f"{data} has no user with a history and items of {split}")
    if users is not None:
        order = torch.randperm(len(question), generator=generator(0, 1))
        question = question.take(order[:users].sort().values)
    if model == "popularity":
        recommender = surrogate.popularity_recommender(histories)
    else:
        language = load_language(model, histories, device=device)
        recommender = language_recommender(language.model, language.prompts)
    found = surrogate.evaluate(recommender, question)
    if as_json:
        print(json.dumps({name: float(values.mean()) for name, values in found.items()}))
        return
    show_table(["metric", "mean", "±"], _metrics_rows(found))
    say(f"{len(question):,} users, {histories.num_items:,} items, ± the standard error")


def _metrics_rows(found: Mapping[str, Tensor]) -> list[list[str]]:
    rows = []
    for name, values in found.items():
        error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
        rows.append([name, f"{float(values.mean()):.4f}", f"{error:.4f}"])
    return rows


def _read(data: str, titles: Path | None, *, quiet: bool = False) -> Histories:
    from datapruning.recommend.readers import read  # noqa: PLC0415

    histories, report = read(data, titles=titles)
    if not quiet:
        say(
            f"{histories.name}: {report.users:,} users, {report.items:,} items, "
            f"{report.interactions:,} interactions"
        )
        for note in report.notes:
            say(f"note: {note}")
    return histories
