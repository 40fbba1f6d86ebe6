"""What the engines share: how a command tells its apps where to write and read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Progress = Callable[[], None]


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
