"""A node's own data: a store as it is; anything else is made one when the node joins.

Needs no torch itself: reading pictures or tables is the work of a child process.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from prunelab.data.store import HEADER, SampleStore, open_store
from prunelab.errors import DataError
from prunelab.runs.children import ended_with_parent
from prunelab.runs.version import __version__

if TYPE_CHECKING:
    from fedprune.config import RunConfig

REFUSED = 3  # exit status of the child whose last line is what a user can mend


def described(store: SampleStore) -> dict[str, Any]:
    """What a run's samples are, for nodes that have samples of their own."""
    return {
        "task": store.task,
        "num_classes": store.num_classes,
        "class_names": list(store.class_names),
        "input_shape": list(store.input_shape),
    }


def private_store(
    config: RunConfig, path: str, cache: Path, *, expected: Mapping[str, Any] | None = None
) -> Path:
    """The folder of a store of a node's own data.

    Args:
        path: a store, or what `prunelab.data.own_store.write_own_store` takes.
        cache: where a store is made.
        expected: what the run says when a node joins (see `described`): the store is made then,
            anew if the data or the run have changed; None: it was made.

    Raises:
        DataError: no such data, or data that are not what the run's are.
    """
    if (Path(path) / HEADER).is_file():
        if expected:
            _check_store(open_store(Path(path)), expected)
        return Path(path)
    where = str(Path(path).resolve()) if Path(path).exists() else path
    folder = cache / f"own-{_digest(where, config.digest)}"
    if expected is None:
        if not folder.exists():
            raise DataError(f"{path} has not been read yet: the node has to join the run first")
        return folder
    stamp = _digest(__version__, dict(expected), _files(Path(path)))
    with FileLock(f"{folder}.lock"):
        try:
            open_store(folder, made_for=stamp)
        except DataError:
            shutil.rmtree(folder, ignore_errors=True)
            _make(config, path, folder, expected, stamp)
    return folder


def _make(
    config: RunConfig, path: str, folder: Path, expected: Mapping[str, Any], stamp: str
) -> None:
    data = config.data
    how = {"resize": data.resize, "columns": data.columns, "task": config.training.task}
    task = {"path": path, "folder": str(folder), "how": how, "made_for": stamp}
    command = [sys.executable, "-m", "fedprune.local.make_private"]
    done = subprocess.run(
        ended_with_parent(*command),
        input=json.dumps({**task, "expected": dict(expected)}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise DataError(last[0]) from (
            None if done.returncode == REFUSED else RuntimeError(done.stderr)
        )


def _check_store(store: SampleStore, expected: Mapping[str, Any]) -> None:
    names = tuple(expected.get("class_names", ()))
    if store.class_names and names and store.class_names != names:
        raise DataError(
            f"{store.folder} numbers the classes {', '.join(store.class_names)}, the run "
            f"{', '.join(names)}; write the store again in the run's order"
        )


def _files(path: Path) -> list[list[Any]]:
    """Names, sizes and times of the files, which change when the data do."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(str(file), file.stat()) for file in files if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def _digest(*values: Any) -> str:
    return sha256(json.dumps(values).encode()).hexdigest()[:16]
