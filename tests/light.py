"""Processes without torch and what comes with it, as on a device."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MISSING = (
    "torch torchvision datasets pyarrow pandas sklearn scipy matplotlib jinja2 ray flwr_datasets"
)
# Python imports this by itself wherever it starts, so that child processes lack the same.
SITE_CUSTOMIZE = f"""
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run_light(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in an environment that lacks what a device lacks."""
    with tempfile.TemporaryDirectory(prefix="light-") as site:
        (Path(site) / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([site, str(ROOT)]),
                "PYTHONDONTWRITEBYTECODE": "1",
                "COLUMNS": "200",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )


def command_light(
    name: str, *arguments: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The command `fedprune` or `datapruning` there."""
    code = f"import sys; sys.argv[0] = {name!r}; from {name}.cli import main; main()"
    return run_light("-c", code, *arguments, cwd=cwd)
