"""Memory that nobody uses any more goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from sparsemodel.kernels.cpu import library as cpu


def give_back() -> None:
    """Free the native library's scratch memory, and what the heap keeps for later.

    glibc holds on to freed memory, as long as anything lies above it and in arenas as large as a
    model's activations; other systems are left to themselves.
    """
    library = cpu.library()
    if library is not None:
        library.release_scratch()
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    """glibc's malloc_trim, where there is one."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
