"""`fedprune prune`: a language model pruned in stages, on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunelab.pages.console import say, show_table

Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]


def prune(  # noqa: PLR0917 - the command's options
    model: Annotated[
        str, typer.Argument(help="A folder of transformers, a .gguf file, or a name on the hub.")
    ],
    data: Annotated[str, typer.Option(help="A text for calibration (.txt, .xz, .gz).")],
    out: Annotated[Path, typer.Option(help="The folder that is written.")],
    test: Annotated[
        str, typer.Option(help="A text for testing; default: the last tenth of --data.")
    ] = "",
    criterion: Annotated[
        str,
        typer.Option(
            help="wanda, gblm, obs, taylor-mixed, dpruner, magnitude or random: what says which "
            "weights matter (fedprune methods --criteria)."
        ),
    ] = "wanda",
    density: Annotated[
        float | None,
        typer.Option(
            help="Share of all weights of the blocks that stays in the end; default 0.5, or with "
            "--units what they leave."
        ),
    ] = None,
    pattern: Annotated[
        str,
        typer.Option(
            help="Weights are ranked within each row, within the layer, or in groups such as 2:4, "
            "which keep two of four neighbours."
        ),
    ] = "row",
    units: Annotated[
        float | None,
        typer.Option(help="Share of heads and channels that stays, before weights are ranked."),
    ] = None,
    unit_criterion: Annotated[
        str,
        typer.Option(
            help="flap, wifv, ifv, wifn, amp, minitron, cfsp, magnitude or random: what says "
            "which units matter."
        ),
    ] = "flap",
    unit_kind: Annotated[str, typer.Option(help="heads, channels or both.")] = "both",
    recover: Annotated[
        list[str] | None,
        typer.Option(help="dsnot, bias or perp, which mend; give it again for another."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences for calibration.")] = 128,
    length: Annotated[
        int, typer.Option(help="Tokens of a sequence; default the model's limit, 512 at most.")
    ] = 0,
    tested: Annotated[int, typer.Option(help="Sequences for testing, at most.")] = 64,
    seed: Annotated[int, typer.Option(help="Draws the sequences for calibration.")] = 0,
    controls: Annotated[
        bool, typer.Option(help="Measure magnitude and random masks beside it.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder with files.")] = False,
    debug: Debug = False,
) -> None:
    """Prune a language model by calibration on a text; write it, and a page about it.

    The same command goes on with a run that was cut, after its last finished stage.
    """
    from fedprune.language.asked import Pruning  # noqa: PLC0415
    from fedprune.language.page import result_rows  # noqa: PLC0415
    from fedprune.language.pruning import prune_language_model  # noqa: PLC0415

    asked = Pruning(
        model, data, test=test, criterion=criterion, pattern=pattern, density=density,
        samples=samples, length=length, tested=tested, seed=seed, controls=controls,
        units=units, unit_criterion=unit_criterion, unit_kind=unit_kind,
        recover=tuple(recover or ()),
    )  # fmt: skip
    summary = prune_language_model(asked, out, force=force, say=say)
    show_table(["mask", "perplexity", "times dense"], result_rows(summary))
    say(f"model and report: {out}")
