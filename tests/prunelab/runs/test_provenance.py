"""The commit of a result is that of this code, or unknown."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from prunelab.runs import provenance


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x@x"]
    done = subprocess.run(
        ["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_checkout_of_something_else_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "environment" / "provenance.py"
    source.parent.mkdir()
    source.write_text("")
    (tmp_path / "other.py").write_text("")
    monkeypatch.setattr(provenance, "SOURCE", source)
    assert provenance.commit() == "unknown"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "other.py")
    git(tmp_path, "commit", "-q", "-m", "x")
    assert provenance.commit() == "unknown"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "y")
    assert provenance.commit() == git(tmp_path, "rev-parse", "--short", "HEAD")
    # A page that a command writes leaves the next command's commit as it is.
    for name in ("page.md", "simulations/outcomes/all.json"):
        page = tmp_path / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("old")
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-q", "-m", "z")
        page.write_text("new")
        assert provenance.commit() == git(tmp_path, "rev-parse", "--short", "HEAD")
    source.write_text("# changed")
    assert provenance.commit().endswith("-dirty")


def test_machine_without_git_is_unknown_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() == "unknown"
