"""What nobody uses goes back to the system."""

import ctypes
import re
import sys
from pathlib import Path

import pytest

from sparsemodel.runtime.memory import give_back

MIB = 1 << 20


def resident() -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="the heap of other systems is left to itself",
)
def test_free_memory_below_something_in_use_leaves_the_process() -> None:
    """Ten thousand pieces of 4 KiB, freed but for the last: the heap cannot shrink by itself."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    pieces = [libc.malloc(4096) for _ in range(10_000)]
    for piece in pieces:
        ctypes.memset(piece, 1, 4096)
    last = pieces.pop()
    for piece in pieces:
        libc.free(piece)
    before = resident()
    give_back()
    assert before - resident() > 20 * MIB
    libc.free(last)


def test_it_may_be_called_again() -> None:
    give_back()
    give_back()
