"""What the `datapruning` command shows: lines, warnings as lines, and how far it has come."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from datapruning.errors import ScoreWarning, SubsetWarning

console = Console()
errors = Console(stderr=True)


def say(text: str) -> None:
    """One line of plain text."""
    console.print(escaped(text), highlight=False, soft_wrap=True)


def escaped(value: object) -> str:
    """Text in which rich sees no markup."""
    return str(value).replace("[", r"\[")


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
    """Warnings of this package as one line each; others as Python shows them."""
    original = warnings.showwarning

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, ScoreWarning | SubsetWarning):
            errors.print(
                f"[yellow]warning:[/yellow] {escaped(message)}", soft_wrap=True, highlight=False
            )
        else:
            original(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", ScoreWarning)
        warnings.simplefilter("always", SubsetWarning)
        warnings.showwarning = show
        yield
