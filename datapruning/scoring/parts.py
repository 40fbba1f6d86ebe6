"""The folder of an unfinished scoring run: settings, trained models and scored shards.

Everything in it is written in one step and belongs to one set of settings, so a run may be
killed at any moment and started again: what is there is used, and what belongs to other settings
is refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prunelab.errors import RunError
from prunelab.runs.folder import LOCK
from prunelab.runs.settings import differences
from prunelab.training import checkpoint
from sparsemodel.storage.files import write_atomically
from sparsemodel.storage.sealed import read_sealed_json, sealed_json

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Parts:
    """A folder of parts; `open_parts` makes one.

    Attributes:
        digest: of the settings; every file carries it.
    """

    path: Path
    digest: str

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Keep tensors, plain values and containers of them under a name."""
        checkpoint.save(self.path / name, state, signature=self._signature(name))

    def load(self, name: str) -> dict[str, Any] | None:
        """What was saved under the name, or None.

        Raises:
            RunError: the file is damaged, or of other settings.
        """
        return checkpoint.load(self.path / name, signature=self._signature(name))

    def _signature(self, name: str) -> dict[str, str]:
        return {"settings": self.digest, "part": name}

    def save_shard(self, number: int, columns: Mapping[str, Tensor]) -> None:
        """Write the observations of a shard: name -> tensor of its samples."""
        self.save(self.shard(number).name, columns)

    def load_shard(self, number: int) -> dict[str, Tensor]:
        """What `save_shard` wrote.

        Raises:
            RunError: the file is missing, damaged, or of other settings.
        """
        columns = self.load(self.shard(number).name)
        if columns is None:
            raise RunError(f"{self.shard(number)} is gone; score again to compute it")
        return columns

    def has_shard(self, number: int) -> bool:
        """Whether the shard is there and belongs to this run; raises as `load` does."""
        return self.load(self.shard(number).name) is not None

    def shard(self, number: int) -> Path:
        """Where a shard is kept."""
        return self.path / f"shard-{number:05d}.pt"

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path)


def open_parts(path: Path, settings: Mapping[str, Any]) -> Parts:
    """The parts under `path`, made if there are none.

    Args:
        settings: all that decides a bit of the result; anything that JSON holds.

    Raises:
        RunError: the folder holds parts of other settings (every difference is named), holds
            something else, or cannot be written.
    """
    text = json.dumps(settings, sort_keys=True)
    stored = path / SETTINGS
    if stored.exists():
        _check_same(path, settings, _stored(path))
    elif path.exists() and (not path.is_dir() or {p.name for p in path.iterdir()} - {LOCK}):
        raise RunError(f"{path} is in the way: it holds no parts of a scoring run; move it")
    else:
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(stored, sealed_json(SETTINGS, settings))
        except OSError as error:
            raise RunError(f"cannot write to {path}: {error.strerror}") from None
    return Parts(path, hashlib.sha256(text.encode()).hexdigest()[:16])


def _stored(path: Path) -> dict[str, Any]:
    cure = f"delete {path}, and its parts are made again"
    return read_sealed_json(path / SETTINGS, of=SETTINGS, error=RunError, cure=cure)


def _check_same(path: Path, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    changed = differences(now, before)
    if changed:
        raise RunError(
            f"{path} holds parts made with other settings: {'; '.join(changed)}; repeat the "
            "command that made them, delete the folder, or name another --out"
        )
