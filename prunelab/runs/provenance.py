"""Where a result comes from: the code and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

SOURCE = Path(__file__)
# What no result depends on: pages, which are results themselves, and the outcomes behind them.
_RESULTS = (":(top,exclude)*.md", ":(top,exclude)simulations/outcomes")


def commit() -> str:
    """The commit of the checkout that this code runs from; "unknown" where it is installed.

    It ends in "-dirty" where a file differs from it, but for pages and saved outcomes: a command
    that writes its page leaves the next one clean.
    """
    try:
        # An environment may lie inside the checkout of something else.
        if not _git("ls-files", SOURCE.name):
            return "unknown"
        changed = _git("diff", "--name-only", "HEAD", "--", ":(top)", *_RESULTS)
        return _git("describe", "--always") + "-dirty" * bool(changed)
    except FileNotFoundError:  # no git
        return "unknown"


def machine(*, used: str = "") -> str:
    """Processor architecture, cores (and how many were used), Python and torch, for a page."""
    import torch  # noqa: PLC0415

    return (
        f"{platform.machine()}, {os.cpu_count()} cores{used}, Python "
        f"{platform.python_version()}, torch {torch.__version__}"
    )


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=SOURCE.parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
