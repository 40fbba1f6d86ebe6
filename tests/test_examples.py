"""The scripts under examples/ do what they say, in an empty folder, by public names alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
PRODUCTS = ("sparsemodel", "prunelab", "datapruning", "fedprune")
MOST_LINES = 40


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_is_short_and_imports_public_names(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        ours = [name for name in names if name.partition(".")[0] in PRODUCTS]
        assert not [name for name in ours if any(p.startswith("_") for p in name.split("."))]


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_runs(script: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip(), "an example shows what came out"
