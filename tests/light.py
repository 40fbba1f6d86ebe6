"""Processes without torch and what comes with it, as on a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SITE = ROOT / "tests" / "light_site"


def run_light(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in an environment that lacks what a device lacks."""
    paths = os.pathsep.join(map(str, (SITE, ROOT)))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd, env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def command_light(
    name: str, *arguments: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The command `fedprune` or `datapruning` there."""
    code = f"import sys; sys.argv[0] = {name!r}; from {name}.cli import main; main()"
    return run_light("-c", code, *arguments, cwd=cwd)
