"""What the commands share: how they start and fail, lines, warnings and progress."""

from __future__ import annotations

import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table

from prunelab.errors import PrunelabWarning
from prunelab.runs.version import __version__
from sparsemodel.extras import extras_named

console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)
INTERRUPTED = 130
FRAME = 3  # what a column of a table takes beside its cells
GAP = 2  # between the columns of a list


def run_command(
    cli: typer.Typer,
    *,
    expected: tuple[type[Exception], ...],
    go_on: Callable[[Sequence[str]], str],
) -> None:
    """Run a command line: one clear line for what a user can mend, a trace with --debug.

    Args:
        expected: errors that a user can mend.
        go_on: what to do after an interruption, from the command's arguments.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a letter that the terminal lacks ends no run
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        with extras_named(" ".join([Path(sys.argv[0]).name, *arguments[:1]])), warnings_shown():
            cli(arguments, standalone_mode=True)
    except expected as error:
        if debug:
            raise
        errors.print(f"[red]error:[/red] {escaped(error)}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer makes this of a Ctrl-C
            text = f"interrupted; {escaped(go_on(arguments))}"
            errors.print(text, soft_wrap=True, highlight=False)
        raise


def version_of(command: str) -> Any:
    """The option --version of a command: prints name and version, and ends."""

    def show(asked: bool) -> None:
        if asked:
            print(f"{command} {__version__}")
            raise typer.Exit

    return typer.Option("--version", callback=show, is_eager=True, help="Show the version.")


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """A table whose cells stay whole.

    Where the window is too narrow for all columns, those that do not fit follow below, beside the
    first column again. Only the first column is wrapped, at half the window.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(cell_len, [*name.split(), *cells]), default=0) for name, *cells in columns]
    widths[0] = min(widths[0], console.width // 2)
    room = 0
    parts: list[list[int]] = []
    for place in range(1, len(columns)):
        if not parts or room < widths[place] + FRAME:
            parts.append([0])
            room = console.width - widths[0] - FRAME - 1
        parts[-1].append(place)
        room -= widths[place] + FRAME
    for part in parts or [[0]]:
        table = Table(title=title or None, show_header=any(header))
        for place in part:
            table.add_column(escaped(header[place]), width=widths[place], overflow="fold")
        for row in rows:
            table.add_row(*(escaped(row[place]) for place in part))
        console.print(table)


def show_list(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table without lines, a line a row; the last column ends at the window's edge."""
    widths = [max(map(cell_len, column)) for column in zip(header, *rows, strict=True)][:-1]
    room = max(1, console.width - sum(widths) - GAP * len(widths))
    for row in (header, *rows):
        cells = [set_cell_size(cell, width + GAP) for cell, width in zip(row, widths, strict=False)]
        last = row[-1] if cell_len(row[-1]) <= room else set_cell_size(row[-1], room - 1) + "…"
        say("".join((*cells, last)))


def listed(text: str) -> list[str]:
    """Names with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def say(text: str, *, to: Console = console) -> None:
    """One line of plain text."""
    to.print(escaped(text), highlight=False, soft_wrap=True)


def escaped(value: object) -> str:
    """Text in which rich sees no markup."""

    # Not rich's own escape, which loses a backslash before a bracket that opens no tag.
    def guarded(bracket: re.Match[str]) -> str:
        opens_tag = bracket[2] is not None
        return bracket[1] * (2 if opens_tag else 1) + r"\["

    return re.sub(r"(\\*)\[(?=([a-z#/@][^[]*?])?)", guarded, str(value))


@contextmanager
def progress_bar(console: Console = console) -> Iterator[Any]:
    """A bar for what is under way; on a file or a pipe, a line for each stage."""
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    tasks: dict[str, Any] = {}
    shown = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with shown as bar:

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what, total=total)
                if not console.is_terminal:
                    say(f"{what} ...", to=console)
            bar.update(tasks[what], completed=done)

        yield show


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Warnings of these packages as one line each, and once; others as Python shows them."""
    original = warnings.showwarning
    shown: set[str] = set()

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, PrunelabWarning):
            if str(message) in shown:
                return
            shown.add(str(message))
            errors.print(
                f"[yellow]warning:[/yellow] {escaped(message)}", soft_wrap=True, highlight=False
            )
        else:
            original(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PrunelabWarning)
        warnings.showwarning = show
        yield
