"""The outcomes of a grid in one file, which can be kept, sent and added to elsewhere."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simulations.jobs import Outcome, read_outcome, write_outcome
from sparsemodel.storage.files import write_atomically


def add_archive_argument(parser: argparse.ArgumentParser) -> None:
    """What `archived` is given."""
    parser.add_argument(
        "--archive", type=Path, metavar="FILE",
        help="of outcomes: those in it are not run again, and it is brought up to date",
    )  # fmt: skip


@contextmanager
def archived(file: Path | None, out: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Begin with the outcomes that a file holds, and add to it those that are there in the end.

    Args:
        file: None: there is none to keep. One that does not exist is made.
        out: the folder of the pieces; what it has of a piece goes before the file's.
        settings: that all pieces share; where data lie in a folder may differ.

    Raises:
        SystemExit: the file is none of ours, or has outcomes of other settings.
    """
    if file is None:
        yield
        return
    known, shared = _read(file), _shared(settings)
    if known["settings"] not in (None, shared):
        raise SystemExit(f"{file} holds outcomes of other settings; give another --archive")
    for name, outcome in known["outcomes"].items():
        if read_outcome(name, out) is None:
            write_outcome(name, out, outcome)
    try:
        yield
    finally:
        names = sorted(path.stem for path in (out / "outcomes").glob("*.json"))
        found = {name: read_outcome(name, out) for name in names}
        final = {name: one for name, one in found.items() if one is not None and one.is_final}
        _write(file, shared, {**known["outcomes"], **final})


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them, without paths."""
    return {
        key: value
        for key, value in json.loads(json.dumps(settings)).items()
        if not (isinstance(value, str) and Path(value).is_absolute())
    }


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {"settings": None, "outcomes": {}}
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        outcomes = {name: Outcome(**one) for name, one in held["outcomes"].items()}
        return {"settings": held["settings"], "outcomes": outcomes}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SystemExit(f"{file}: expected an archive of outcomes ({error})") from None


def _write(file: Path, settings: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> None:
    """One line for each outcome, so that versions of the file can be compared."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(asdict(outcomes[name]), sort_keys=True)}"
        for name in sorted(outcomes)
    ]
    body = ",\n".join(lines)
    text = f'{{"settings": {json.dumps(settings, sort_keys=True)},\n"outcomes": {{\n{body}\n}}}}\n'
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.encode())
