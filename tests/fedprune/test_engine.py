"""The engines' own edges; whole runs through them are in test_run.py and test_cli.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from federation import tiny

from fedprune.engine import run_flower
from fedprune.errors import RunError


def test_interpreter_path_with_a_space_is_refused_not_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's workers would never start: "bash: /opt/my: No such file or directory"."""
    monkeypatch.setattr(sys, "executable", "/opt/my env/bin/python")
    with pytest.raises(RunError, match="path holds a space"):
        run_flower(tiny(), tmp_path, resume=False, progress=lambda: None)
