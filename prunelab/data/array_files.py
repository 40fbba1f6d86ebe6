"""Arrays that numpy wrote: a folder of inputs.npy and targets.npy, or a .npz file of both."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from prunelab.data.arrays import Array
from prunelab.data.store import HEADER, INPUTS, TARGETS
from prunelab.errors import DataError

SUFFIX = ".npz"


def are_arrays(path: Path) -> bool:
    """Whether it is called as such a file is, or is such a folder."""
    return path.suffix.lower() == SUFFIX or (path / f"{INPUTS}.npy").is_file()


def read_arrays(path: Path) -> tuple[Array, Array]:
    """Inputs and targets [N, ...]; of a folder they are memory maps.

    Raises:
        DataError: one of them is missing or cannot be read, or the folder is a sample store.
    """
    if (path / HEADER).is_file():
        raise DataError(f"{path} is a sample store; a node takes it as it is, by data-path")
    try:
        if path.suffix.lower() != SUFFIX:
            inputs, targets = (
                np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in (INPUTS, TARGETS)
            )
            return inputs, targets
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            missing = {INPUTS, TARGETS} - set(arrays.files)
            if missing:
                raise DataError(
                    f"{path} has the arrays {', '.join(arrays.files)}; expected {INPUTS} and "
                    f"{TARGETS}"
                )
            return arrays[INPUTS], arrays[TARGETS]
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: its arrays cannot be read ({error})") from None
