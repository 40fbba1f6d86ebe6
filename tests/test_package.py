"""What a wheel holds: the packages whole."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a git checkout"
)
def test_no_file_of_the_project_is_ignored() -> None:
    """Neither the build nor ruff looks at a file that .gitignore names, tracked or not."""
    ignored = subprocess.run(
        ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ignored.stdout.split() == []


def test_every_room_is_a_package() -> None:
    """A folder without __init__.py can be imported from a checkout, but not wherever it goes."""
    rooms = {
        file.parent
        for package in ("sparsemodel", "prunelab", "datapruning", "fedprune")
        for file in (ROOT / package).rglob("*.py")
    }
    assert [str(room) for room in rooms if not (room / "__init__.py").is_file()] == []
