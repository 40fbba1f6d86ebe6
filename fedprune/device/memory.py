"""What a node holds between messages, on disk: a SuperNode that was killed has lost it.

One file of the last run: a line of JSON that says what is in it, with a checksum, then the bytes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from fedprune.device.home import STATE
from prunelab.errors import RunError
from prunelab.runs.folder import write_file
from sparsemodel.storage.sealed import BLANK, CHECKSUM, read_sealed, seal

SECRET = "secret:"
"""How the names of bytes begin that must not be written down."""
LIMIT = 256 << 20  # bytes of a run's file; more is not kept

Records = Mapping[str, Mapping[str, bytes]]

_log = logging.getLogger(__name__)


def remember(home: Path, run: int, records: Records) -> None:
    """Write what the node holds of a run, in one step; what it held of others goes.

    Args:
        records: name -> name -> bytes; secret ones stay in memory.
    """
    parts: list[tuple[str, str, int]] = []
    content: list[bytes] = []
    for record, items in records.items():
        for name, data in items.items():
            if not name.startswith(SECRET):
                parts.append((record, name, len(data)))
                content.append(data)
    if sum(map(len, content)) > LIMIT:
        _log.warning("what the node holds is above %d bytes and is not kept on disk", LIMIT)
        content, parts = [], []
    folder = home / STATE
    folder.mkdir(exist_ok=True, mode=0o700)
    header = json.dumps({CHECKSUM: BLANK, "parts": parts}).encode()
    path = _file(home, run)
    write_file(path, seal(b"".join([header, b"\n", *content]), _kind(run)))
    for other in folder.iterdir():
        if other != path:
            other.unlink(missing_ok=True)


def recall(home: Path, run: int) -> dict[str, dict[str, bytes]]:
    """What `remember` wrote of a run; nothing where there is none, or it is damaged."""
    path = _file(home, run)
    try:
        data = read_sealed(path, _kind(run), error=RunError, cure="it is asked for again")
    except FileNotFoundError:
        return {}
    except RunError as error:
        _log.warning("%s", error)
        return {}
    header, _, content = data.partition(b"\n")
    records: dict[str, dict[str, bytes]] = {}
    start = 0
    for record, name, length in json.loads(header)["parts"]:
        records.setdefault(record, {})[name] = content[start : start + length]
        start += length
    return records


def _file(home: Path, run: int) -> Path:
    return home / STATE / f"{run}.bin"


def _kind(run: int) -> str:
    return f"state of run {run}"
