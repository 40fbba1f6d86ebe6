"""Files written in one step: a reader, or a crash, meets the old file or the whole new one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

PARTS = f".*.{16 * '[0-9a-f]'}.part"
"""Names of files that were begun and, if nobody is at work, will never be finished."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, on disk when this returns; its folder must exist.

    Raises:
        OSError: the file cannot be written; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # without it a power cut may undo the rename
        finally:
            os.close(folder)
