"""Flower's long-lived processes: how they are started, watched, started again and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fedprune.flower.simulation import private_environment
from prunelab.errors import RunError
from prunelab.runs.children import ended_with_parent

END_SECONDS = 10.0
START_SECONDS = 120.0
POLL_SECONDS = 0.1


@dataclass
class Kept:
    """A process that is started again whenever it ends.

    It ends with the thread that started it, whatever becomes of that.

    Attributes:
        command: makes the command of each start.
        environment: of the process.
        log: a file that its output is added to; None: the caller's own output.
        pause: seconds from an end to the next start, doubled for each end in a row, up to 30.
    """

    command: Callable[[], list[str]]
    environment: Mapping[str, str]
    log: Path | None = None
    pause: float = 0.5
    process: subprocess.Popen[bytes] | None = None
    _ends: int = 0
    _started: float = field(default=0.0)

    def start(self) -> None:
        """Start it; it must not be running."""
        output: IO[bytes] | None = None if self.log is None else self.log.open("ab")
        try:
            self.process = subprocess.Popen(
                ended_with_parent(*self.command()),
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us, who end it in order
            )
        finally:
            if output is not None:
                output.close()
        self._started = time.monotonic()

    def is_running(self) -> bool:
        """Whether it runs now."""
        return self.process is not None and self.process.poll() is None

    def status(self) -> int | None:
        """How it ended; None while it runs, or where it was never started."""
        return None if self.process is None else self.process.poll()

    def keep(self) -> int | None:
        """Start it again where it has ended and its pause is over; how it had ended, then.

        To be called now and then, always from the same thread.
        """
        if self.process is None or (status := self.process.poll()) is None:
            return None
        lived = time.monotonic() - self._started
        if lived > START_SECONDS:
            self._ends = 0
        if lived < min(30.0, self.pause * 2**self._ends):
            return None
        self._ends += 1
        self.start()
        return status

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to it, and wait until it has ended."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)
            self.process.wait()

    def end(self) -> None:
        """End it and what it started in its session: asked first, killed after some seconds."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=END_SECONDS)
                break
        self.process = None


def flower_environment(state: Path) -> dict[str, str]:
    """What Flower's long-lived processes of one party run in.

    They keep their files under `state`, report nothing to anybody, install nothing, and look for
    work twice a second instead of once.
    """
    return {
        **private_environment(state, commands=Path(sys.executable).parent),
        "TMPDIR": str(state),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        "PYTHONUNBUFFERED": "1",
    }


def check_port(port: int) -> None:
    """Raise RunError where a port of this machine cannot be listened on."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError as error:
            raise RunError(
                f"port {port} cannot be used ({error.strerror}); end what uses it, or "
                "choose another with --port"
            ) from None
