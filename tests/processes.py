"""Processes of their own, forked from one that has imported what they need.

A command's imports alone take some five seconds of a core; here they are paid once a worker.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

TIMEOUT_SECONDS = 300
# What one command or another imports, late or early.
_PRELOADED = [
    "torch._dynamo",
    "sklearn.datasets",
    "matplotlib.pyplot",
    "pyarrow.parquet",
    "datapruning.cli",
    "datapruning.scoring.score",
    "datapruning.reports.score_report",
    "fedprune.cli",
    "fedprune.rounds.run",
]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(_PRELOADED)


P, R = ParamSpec("P"), TypeVar("R")


def in_a_process(function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
    """What a function of a module returns, or raises, in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=FORKS) as pool:
        return pool.submit(function, *arguments, **named).result()


class Command:
    """A running command, such as `fedprune run`, begun in the folder `cwd`.

    Args:
        columns: of the window that it believes to print to.
        variables: of its environment, beside those of this process.
    """

    def __init__(
        self,
        name: str,
        *arguments: str,
        cwd: Path,
        columns: int = 200,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._arguments = [name, *arguments]
        self._folder = Path(tempfile.mkdtemp(prefix="command-"))
        environment = {**os.environ, "COLUMNS": str(columns), **(variables or {})}
        self._process = FORKS.Process(
            target=_main, args=(self._arguments, cwd, environment, self._folder)
        )
        self._process.start()

    def is_running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when the command has ended."""
        if self._process.is_alive():
            assert self._process.pid is not None
            os.kill(self._process.pid, number)

    def ended(self, *, timeout: float = TIMEOUT_SECONDS) -> subprocess.CompletedProcess[str]:
        """Wait for the end: status (minus the signal that killed it) and what was printed."""
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            raise subprocess.TimeoutExpired(self._arguments, timeout)
        assert self._process.exitcode is not None
        out, err = ((self._folder / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(self._arguments, self._process.exitcode, out, err)


def _main(arguments: list[str], cwd: Path, environment: dict[str, str], folder: Path) -> None:
    """In the new process: be the command."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.stdout.flush()
    sys.stderr.flush()
    for number, name in enumerate(("out", "err"), start=1):
        with (folder / name).open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    sys.argv = list(arguments)
    try:
        importlib.import_module(f"{arguments[0]}.cli").main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
