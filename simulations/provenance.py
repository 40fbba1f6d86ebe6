"""Where a saved table comes from."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit that the working tree is at."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def machine(*, used: str = "") -> str:
    """Processor architecture, cores (and how many were used), Python and torch, for a page."""
    import torch  # noqa: PLC0415

    return (
        f"{platform.machine()}, {os.cpu_count()} cores{used}, Python "
        f"{platform.python_version()}, torch {torch.__version__}"
    )
