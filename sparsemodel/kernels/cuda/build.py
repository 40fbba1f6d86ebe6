"""Compiling the CUDA kernels at run time (NVRTC), with the results kept on disk.

No toolkit is needed: NVRTC comes with torch's own packages, and cuda-core binds it. The folder
of compiled kernels is `$SPARSEMODEL_CACHE`, or `sparsemodel/cuda` in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsemodel.kernels.cuda import source as cuda_source
from sparsemodel.storage.files import write_atomically

ENVIRONMENT = "SPARSEMODEL_CACHE"
_STANDARD = "c++17"
_DIGEST = 32  # bytes of SHA-256 in front of each entry


def compiled(family: str, real: torch.dtype, arch: str) -> bytes:
    """The cubin of a kernel file for one type and architecture, compiled if it is not kept.

    Args:
        family: name of the file, without .cu.
        real: the type of activations.
        arch: such as "sm_90".

    Raises:
        RuntimeError: NVRTC refuses the source, or cannot be loaded.
    """
    text, defines = cuda_source.source(family), cuda_source.REALS[real]
    path = cache_folder() / f"{family}-{arch}-{_key(text, defines, arch)}.cubin"
    kept = read_entry(path)
    if kept is None:
        kept = _compile(family, text, defines, arch)
        write_entry(path, kept)
    return kept


def cache_folder() -> Path:
    """Where compiled kernels are kept; it need not exist."""
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sparsemodel" / "cuda"


def read_entry(path: Path) -> bytes | None:
    """What an entry holds; None where there is none, or it is damaged."""
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    digest, content = entry[:_DIGEST], entry[_DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None


def write_entry(path: Path, content: bytes) -> None:
    """Keep an entry, whole or not at all; a folder that cannot be written keeps nothing."""
    # A folder that cannot be written: every process compiles for itself.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.sha256(content).digest() + content)


def _key(text: str, defines: Sequence[str], arch: str) -> str:
    parts = (text, *defines, _STANDARD, arch, nvrtc_version())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def nvrtc_version() -> str:
    """Of the compiler that is loaded, such as "13.0"."""
    from cuda.bindings import nvrtc  # noqa: PLC0415 - an optional package

    status, major, minor = nvrtc.nvrtcVersion()
    if int(status):
        raise RuntimeError(f"NVRTC does not tell its version: {status}")
    return f"{major}.{minor}"


def _compile(family: str, text: str, defines: Sequence[str], arch: str) -> bytes:
    from cuda.core import Program, ProgramOptions  # noqa: PLC0415 - an optional package

    options = ProgramOptions(
        name=f"{family}.cu", std=_STANDARD, arch=arch, define_macro=list(defines) or None
    )
    code: Any = Program(text, "c++", options).compile("cubin").code
    return bytes(code)
