"""The Markdown page of an experiment: what was run and where, its tables, its settings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunelab.runs.provenance import machine
from prunelab.runs.settings import flattened
from simulations.jobs import FAILED, Outcome


def page(
    title: str,
    *,
    command: str,
    at: str,
    notes: Iterable[str],
    body: Iterable[str],
    settings: Mapping[str, Any],
    used: str = "",
) -> str:
    """A whole page; `notes` are what a reader should know before the `body`.

    Args:
        command: what writes the page again.
        at: commits that the results are of.
        used: how many cores were used, where it was not all.
    """
    lines = [f"# {title}", "", f"Written by `{command}`.", ""]
    lines += [f"- {note}" for note in (f"commit {at}, {machine(used=used)}", *notes)]
    lines += ["", *body, "", "Settings:", ""]
    lines += [f"- `{name} = {value}`" for name, value in flattened(settings).items()]
    return "\n".join([*lines, ""])


def commits_of(outcomes: Iterable[Outcome]) -> str:
    """The commits that outcomes are of."""
    return ", ".join(sorted({one.commit for one in outcomes})) or "unknown"


def without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that mean the same on another machine."""
    return {name: value for name, value in settings.items() if "/" not in str(value)}


def publish(
    text: str, saved: Path, outcomes: Iterable[Outcome], *, what: str = "runs", hint: str = ""
) -> None:
    """Write a page, show it, and end with an error where something has failed.

    Args:
        outcomes: of the pieces that it is made of; `what` they are.
        hint: where the reasons are.

    Raises:
        SystemExit: one or more failed, and are tried again another time.
    """
    saved.write_text(text, encoding="utf-8")
    print(text)
    print(f"table: {saved}")
    failed = sum(one.status == FAILED for one in outcomes)
    if failed:
        raise SystemExit(f"{failed} {what} failed: {hint}run again, they are retried")


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, words: Collection[int] = (0,)
) -> str:
    """A table; the columns at `words` hold text, the others numbers, which end at the right.

    >>> print(table(["method", "error"], [["a | b", "1.5"]]))
    | method | error |
    | --- | ---: |
    | a \\| b | 1.5 |
    """
    rule = ["---" if column in words else "---:" for column in range(len(header))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))
