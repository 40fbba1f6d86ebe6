"""Folders for temporary files that do not outlive their process for long, however it ends."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from prunelab.errors import RunError

PREFIX, LOCK = "fedprune-", ".lock"
YOUNG = 10.0  # seconds in which a folder may not have its lock yet


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder, removed at the end.

    A process that is killed cannot remove its own: the next one does. Which belongs to nobody
    any more is told by a lock that the system lets go of when a process dies.

    Raises:
        RunError: TMPDIR, or whatever stands for it, cannot be written to. Python would take
            another folder without a word; other programs of a run would not.
    """
    chosen = next(filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))), None)
    try:
        if chosen is not None:
            tempfile.TemporaryFile(dir=chosen).close()
        sweep()
        made = tempfile.TemporaryDirectory(prefix=PREFIX)
    except OSError as error:
        raise RunError(
            f"temporary files cannot be written to {chosen or 'any of the usual folders'} "
            f"({error.strerror}); set TMPDIR to a folder that can be written to"
        ) from None
    with made as name:
        folder = Path(name)
        with FileLock(folder / LOCK):
            yield folder


def sweep() -> None:
    """Remove the folders of processes that were killed."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        # What belongs to another user, or is removed at this moment by another process, stays.
        with suppress(OSError, Timeout):
            if time.time() - lock.stat().st_mtime < YOUNG:
                continue
            with FileLock(lock, timeout=0):
                shutil.rmtree(lock.parent, ignore_errors=True)
