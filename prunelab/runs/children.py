"""Child processes that do not outlive the process that started them, however that ends."""

from __future__ import annotations

import os
import sys

# Linux: prctl(PR_SET_PDEATHSIG, SIGTERM) stays set in what is executed after it; elsewhere the
# command just runs. The first argument is the parent, which may be dead already.
_END_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def ended_with_parent(*command: str) -> list[str]:
    """The command for a child that is ended when the thread that starts it ends."""
    return [sys.executable, "-c", _END_WITH_PARENT, str(os.getpid()), *command]
