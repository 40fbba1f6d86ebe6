"""The engines' own edges; whole runs through them are in test_run.py and test_cli.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from federation import digest, run_inline, tiny

from fedprune.engine import run_flower
from fedprune.errors import RunError
from fedprune.runfolder import prepare


@pytest.fixture
def spaced_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This environment under a path with a space, as if it had been made there."""
    link = tmp_path / "my env"
    link.symlink_to(sys.prefix, target_is_directory=True)
    executable = link / Path(sys.executable).relative_to(sys.prefix)
    monkeypatch.setattr(sys, "executable", str(executable))
    monkeypatch.setattr(sys, "prefix", str(link))
    return link


@pytest.mark.ray
def test_interpreter_path_with_a_space(spaced_environment: Path, tmp_path: Path) -> None:
    """Ray does not quote it: "bash: /opt/my: No such file or directory", and a run that hangs."""
    config = tiny(training__rounds=1)
    prepare(tmp_path / "run", config, resume=False)
    run_flower(config, tmp_path / "run", resume=False, progress=lambda: None)
    assert digest(tmp_path / "run") == digest(run_inline(config, tmp_path / "inline"))


def test_no_path_without_a_space_is_refused_not_hung(
    spaced_environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(spaced_environment.parent / "a b"))
    (tmp_path / "a b").mkdir()
    with pytest.raises(RunError, match="set TMPDIR"):
        run_flower(tiny(), tmp_path, resume=False, progress=lambda: None)
