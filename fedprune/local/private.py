"""A node's own data: a store as it is; anything else is made one when the node joins.

Needs no torch itself: reading pictures or tables is the work of a child process. What goes wrong
is told in full on the node alone: errors travel to the server, and they name files and cells.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from prunelab.data.store import HEADER, SampleStore, open_store
from prunelab.errors import DataError
from prunelab.runs.children import ended_with_parent
from prunelab.runs.imported import IMPORTED
from prunelab.runs.stamps import stamp_of
from prunelab.runs.version import __version__

if TYPE_CHECKING:
    from fedprune.config import RunConfig

REFUSAL = "the node's own data cannot be read or are not what the run's are; its log says why"

UNUSED_SECONDS = 7 * 86400.0
_OWN = "own-"

_log = logging.getLogger(__name__)


def samples_of_run(store: SampleStore) -> dict[str, Any]:
    """What a run's samples are, for nodes that have samples of their own."""
    return {
        "task": store.task,
        "num_classes": store.num_classes,
        "class_names": list(store.class_names),
        "input_shape": list(store.input_shape),
        "feature_names": list(store.feature_names),
    }


def private_store(
    config: RunConfig, path: str, cache: Path, *, expected: Mapping[str, Any] | None = None
) -> Path:
    """The folder of a store of a node's own data.

    Args:
        path: a store, or what `prunelab.data.own_store.write_own_store` takes.
        cache: where a store is made.
        expected: what the run says when a node joins (see `samples_of_run`): the store is made
            then, anew if the files or the run have changed, and always of "module:function", whose
            data may be others each time; None: it was made.

    Raises:
        DataError: no such data, or data that are not what the run's are. Its text, which the server
            reads, is REFUSAL; the node's log has what happened.
    """
    try:
        folder = _store(config, path, cache, expected)
        if folder is not None:
            store = open_store(folder)
            if expected:
                _check_store(store, expected)
            return folder
    except Exception:  # whatever it says, it may hold a cell
        _log.exception("%s: cannot be used as the node's own data", path)
        raise DataError(REFUSAL) from None
    raise DataError(
        "the node's own data have not been read yet: the node has to join the run first"
    )


def _store(
    config: RunConfig, path: str, cache: Path, expected: Mapping[str, Any] | None
) -> Path | None:
    """The folder of the store; None where it is still to be made and nothing is expected."""
    if (Path(path) / HEADER).is_file():
        return Path(path)
    where = str(Path(path).resolve()) if Path(path).exists() else path
    folder = cache / f"{_OWN}{_digest(where, config.digest)}"
    if expected is None:
        return _used(folder) if folder.exists() else None
    stamp = _digest(__version__, dict(expected), stamp_of(path))
    with FileLock(f"{folder}.lock"):
        if not _is_made(folder, stamp) or IMPORTED.fullmatch(path):
            shutil.rmtree(folder, ignore_errors=True)
            _forget_unused(cache)
            _make(config, path, folder, expected, stamp)
    return _used(folder)


def _used(folder: Path) -> Path:
    os.utime(folder)
    return folder


def _forget_unused(cache: Path) -> None:
    """Remove stores of runs that are over: each run with other settings has one of all samples."""
    for folder in cache.glob(f"{_OWN}*"):
        with contextlib.suppress(OSError):  # another process does the same
            if folder.is_dir() and time.time() - folder.stat().st_mtime > UNUSED_SECONDS:
                shutil.rmtree(folder)


def _is_made(folder: Path, stamp: str) -> bool:
    try:
        open_store(folder, made_for=stamp)
    except DataError:
        return False
    return True


def _make(
    config: RunConfig, path: str, folder: Path, expected: Mapping[str, Any], stamp: str
) -> None:
    data = config.data
    options = {
        "resize": data.resize, "columns": data.columns, "task": config.training.task,
        "expected": json.dumps(dict(expected)), "made-for": stamp,
    }  # fmt: skip
    command = [sys.executable, "-m", "prunelab.data.own_store"]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        ended_with_parent(*command, "--", path, str(folder)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DataError(done.stderr.strip() or f"{path}: exit status {done.returncode}")


def _check_store(store: SampleStore, expected: Mapping[str, Any]) -> None:
    found = samples_of_run(store)
    names = found["class_names"], list(expected.get("class_names") or ())
    if all(names) and names[0] != names[1]:
        raise DataError(
            f"{store.folder} numbers the classes {', '.join(names[0])}, the run "
            f"{', '.join(names[1])}; write the store again in the run's order"
        )
    # Texts are of any length.
    compared = (
        "task",
        "num_classes",
        *(() if store.inputs.dtype.kind == "i" else ("input_shape",)),
    )
    for what in compared:
        wanted = expected.get(what)
        if wanted and found[what] != wanted:
            raise DataError(
                f"{store.folder}: its {what} is {found[what]}, the run's {wanted}; write the store "
                "again for this run"
            )


def _digest(*values: Any) -> str:
    return sha256(json.dumps(values).encode()).hexdigest()[:16]
