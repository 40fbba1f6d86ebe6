"""What the commands share: how they start and fail, lines, warnings and progress."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from prunelab.errors import PrunelabWarning

console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)
INTERRUPTED = 130


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
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
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


def listed(text: str) -> list[str]:
    """Names with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def say(text: str) -> None:
    """One line of plain text."""
    console.print(escaped(text), highlight=False, soft_wrap=True)


def escaped(value: object) -> str:
    """Text in which rich sees no markup."""

    # Not rich's own escape, which loses a backslash before a bracket that opens no tag.
    def guarded(bracket: re.Match[str]) -> str:
        opens_tag = bracket[2] is not None
        return bracket[1] * (2 if opens_tag else 1) + r"\["

    return re.sub(r"(\\*)\[(?=([a-z#/@][^[]*?])?)", guarded, str(value))


@contextmanager
def progress_bar() -> Iterator[Any]:
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
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what, total=total)
                if not console.is_terminal:
                    say(f"{what} ...")
            bar.update(tasks[what], completed=done)

        yield show


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Warnings of these packages as one line each; others as Python shows them."""
    original = warnings.showwarning

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, PrunelabWarning):
            errors.print(
                f"[yellow]warning:[/yellow] {escaped(message)}", soft_wrap=True, highlight=False
            )
        else:
            original(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PrunelabWarning)
        warnings.showwarning = show
        yield
