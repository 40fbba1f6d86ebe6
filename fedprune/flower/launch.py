"""What the engines share: how a command tells its apps where to write and read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedprune.config import RunConfig

Progress = Callable[[], None]
Say = Callable[[str], None]
TICKET = ".ticket"
LAUNCH_SECTION = "run."  # keys of Flower's run config that say where to write, not what to compute
SETTING_UP = "setting up: samples, network, first weights"


def joining(config: RunConfig) -> str:
    """What the clients and the method do before the first round, in a line."""
    return f"starting: {config.data.clients} clients join, {config.method.name} begins"


def told_nothing(text: str) -> None:
    """For callers that show no lines."""


def failure_file(setup: Path) -> Path:
    """Where the server leaves the reason why a run failed, for the command that started it."""
    return setup.with_name("failure.txt")


def launch_values(out: Path, *, resume: bool, setup: Path) -> dict[str, Any]:
    """Keys of Flower's run config that say where, not what.

    Args:
        out: the run folder.
        setup: the folder of what the run starts from (rounds/setup.py).
    """
    return {
        "run.out": str(out.resolve()),
        "run.resume": resume,
        "run.launcher-pid": os.getpid(),
        "run.setup": str(setup.resolve()),
    }


def submit_values(out: Path, *, resume: bool, ticket: str) -> dict[str, Any]:
    """Keys of Flower's run config of a run that is submitted to a federation.

    Args:
        out: the run folder, here, or of the same path where the SuperLink is.
        ticket: what the folder's file TICKET holds.
    """
    return {"run.out": str(out.resolve()), "run.resume": resume, "run.ticket": ticket}
