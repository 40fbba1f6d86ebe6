"""Where a result comes from: the code and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

SOURCE = Path(__file__)


def commit() -> str:
    """The commit of the checkout that this code runs from; "unknown" where it is installed."""
    try:
        # An environment may lie inside the checkout of something else.
        is_ours = bool(_git("ls-files", SOURCE.name))
        return (is_ours and _git("describe", "--always", "--dirty")) or "unknown"
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
