"""Checkpoints of a training run: written in one step, refused where they belong to another run."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prunelab.errors import RunError
from sparsemodel.storage.files import write_atomically
from sparsemodel.storage.sealed import BLANK, read_sealed, seal

VERSION = 3  # 1: the order of samples was drawn by torch; 2: no checksum
CURE = "delete it to start anew"
KIND = "checkpoint"
_HEAD = f"{KIND} {BLANK}\n".encode()


def save(path: Path, state: Mapping[str, Any], *, signature: Mapping[str, Any]) -> None:
    """Write tensors, numbers and containers of them; a reader meets the old file or the new one.

    Args:
        signature: what decides the run, in numbers, strings and None; `load` compares it.

    Raises:
        RunError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"version": VERSION, "signature": dict(signature), "state": dict(state)}, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, seal(_HEAD + buffer.getvalue(), KIND))
    except OSError as error:
        raise RunError(f"{path}: the checkpoint cannot be written ({error.strerror})") from None


def load(path: Path, *, signature: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state that `save` left, on the CPU, or None where there is no file.

    Only tensors and plain values are read: a file can run no code.

    Raises:
        RunError: a damaged file, or one of a run with another signature.
    """
    try:
        data = read_sealed(path, KIND, error=RunError, cure=CURE)
    except FileNotFoundError:
        return None
    try:
        content = io.BytesIO(data[len(_HEAD) :])
        found = torch.load(content, map_location="cpu", weights_only=True)
        version, theirs, state = found["version"], found["signature"], found["state"]
    except (EOFError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} is not a readable checkpoint ({type(error).__name__}); {CURE}"
        ) from None
    if version != VERSION:
        raise RunError(f"{path} has checkpoint version {version}, this release reads {VERSION}")
    differing = [
        f"{name} is {signature.get(name)!r}, the checkpoint's {theirs.get(name)!r}"
        for name in sorted(signature.keys() | theirs.keys())
        if signature.get(name) != theirs.get(name)
    ]
    if differing:
        raise RunError(
            f"{path} belongs to another run: {'; '.join(differing)}; "
            "delete it, or name another checkpoint"
        )
    loaded: dict[str, Any] = state
    return loaded
