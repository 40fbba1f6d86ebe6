"""Fixtures shared by the tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation import run_inline, tiny


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished FedTiny run of the small federation, in a path with a space."""
    return run_inline(tiny(), tmp_path_factory.mktemp("finished") / "a run")
