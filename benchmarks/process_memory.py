"""What the kernel says of this process's memory (Linux)."""

from __future__ import annotations

import re
from pathlib import Path


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the high-water mark) of this process in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None, "Linux lists it"
    return 1024 * int(found[1])


def reset_high_water() -> None:
    """Let the high-water mark begin anew, at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
