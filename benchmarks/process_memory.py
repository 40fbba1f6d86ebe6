"""What the kernel says of a process's memory (Linux)."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path


def resident(field: str, *, process: int | str = "self") -> int:
    """VmRSS (now) or VmHWM (the high-water mark) of a process in bytes.

    Raises:
        OSError: it is gone.
    """
    return _listed(Path(f"/proc/{process}/status"), field)


def proportional(process: int) -> int:
    """Bytes of a process, what it shares with others by parts: its proportional set size.

    Raises:
        OSError: it is gone.
    """
    return _listed(Path(f"/proc/{process}/smaps_rollup"), "Pss")


def session_of(leader: int) -> Iterator[tuple[int, list[str]]]:
    """The processes of a session, each with its command line."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if folder.name.isdigit() and os.getsid(int(folder.name)) == leader:
                yield int(folder.name), (folder / "cmdline").read_text().split("\0")


def _listed(file: Path, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", file.read_text(), re.M)
    if found is None:  # a process that has ended and was not waited for
        raise ProcessLookupError(file)
    return 1024 * int(found[1])


def reset_high_water() -> None:
    """Let the high-water mark begin anew, at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
