"""What a run of `fedprune prune` that was cut has left in its folder, for the next to go on with.

One file, replaced in one step after every step of the run, and removed when all is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunelab.errors import RunError
from sparsemodel.codec import Limits, decode_mask, encode_mask
from sparsemodel.errors import CheckpointError
from sparsemodel.masks.mask import Mask
from sparsemodel.pipeline.running import Progress
from sparsemodel.storage.checkpoint import load_sparse, save_sparse
from sparsemodel.storage.files import PARTS

STATE = "unfinished.safetensors"
_LIMITS = Limits(max_elements=2**31 - 1)  # the file's checksum is looked at first


def refuse_used(folder: Path, *, force: bool) -> None:
    """Raise RunError unless a run can have the folder: a new one, or one that was cut."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; give a folder")
    if not force and STATE not in names and not all(fnmatch(name, PARTS) for name in names):
        raise RunError(f"{folder} is not empty; give another folder, or --force")


class Unfinished:
    """How far a run is.

    Attributes:
        notes: what it has found, as JSON can hold it.
        progress: of its pipeline.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], notes: dict[str, Any]) -> None:
        self._path, self._settings = folder / STATE, dict(settings)
        self.notes, self.progress = notes, Progress((), {})

    @classmethod
    def begun(
        cls, folder: Path, settings: Mapping[str, Any], notes: dict[str, Any], *, force: bool
    ) -> Unfinished:
        """The state of a run in this folder: as it was left, or else with these notes.

        Args:
            settings: all that the result depends on, as JSON can hold it.
            force: begin anew where the folder has a run of other settings.

        Raises:
            RunError: a run of other settings, or a damaged file.
        """
        state = cls(folder, json.loads(json.dumps(settings)), notes)
        if not state._path.exists():
            return state
        try:
            found = load_sparse(state._path)
        except CheckpointError as error:
            if force:
                return state
            raise RunError(f"{error}; or begin anew: remove it, or give --force") from error
        told = json.loads(found.metadata["settings"])
        other = sorted(
            name
            for name in told.keys() | state._settings.keys()
            if told.get(name) != state._settings.get(name)
        )
        if other and force:
            return state
        if other:
            raise RunError(
                f"{folder} holds a run that was cut, of other settings ({', '.join(other)}); give "
                "the same to go on with it, --force to begin anew, or another folder"
            )
        state.notes = json.loads(found.metadata["notes"])
        masks = [
            Mask.from_csr(decode_mask(_taken(found.state, f"mask.{place}"), limits=_LIMITS))
            for place in range(sum(name.startswith("mask.") for name in found.state))
        ]
        values = {name.removeprefix("value."): value for name, value in found.state.items()}
        state.progress = Progress(masks, values)
        return state

    def save(self, progress: Progress | None = None) -> None:
        """Write it down, on disk when this returns; None: the progress stays.

        Raises:
            RunError: the file cannot be written.
        """
        self.progress = progress or self.progress
        tensors = {f"value.{name}": value for name, value in self.progress.values.items()}
        for place, mask in enumerate(self.progress.masks):
            frame = bytearray(encode_mask(mask.csr()))
            tensors[f"mask.{place}"] = torch.frombuffer(frame, dtype=torch.uint8)
        told = {"settings": json.dumps(self._settings), "notes": json.dumps(self.notes)}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_sparse(self._path, tensors, None, metadata=told)
        except (OSError, CheckpointError) as error:
            raise RunError(f"{self._path}: cannot be written ({error})") from error

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self._path.stat().st_size if self._path.exists() else 0

    def remove(self) -> None:
        """Leave nothing behind: the file, and the folder where there is nothing else in it."""
        self._path.unlink(missing_ok=True)
        folder = self._path.parent
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def digest(tensors: Iterable[Tensor]) -> str:
    """32 hexadecimal digits that name values, in their order."""
    found = sha256()
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        found.update(f"{values.dtype} {tuple(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _taken(tensors: dict[str, Tensor], name: str) -> bytes:
    return tensors.pop(name).numpy().tobytes()
