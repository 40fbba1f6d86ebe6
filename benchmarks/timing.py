"""Time several ways of doing one thing, interleaved in one process."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sparsemodel.kernels.cpu import library as cpu

TURN_SECONDS = 0.01
MAX_CALLS = 25

Clock = Callable[[], float]


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of one call of each contender.

    In every round each contender has one turn, so that all share whatever else the machine
    does. A turn of fast calls takes several: an unmeasured one first, because threads of the
    contender before may still spin and its data fill the caches, then as many as go into 10 ms,
    of which the median counts. What is returned is the median over the rounds.

    Args:
        contenders: name -> what to time.
        rounds: turns of each contender, >= 1, after two unmeasured calls of each.
        clock: seconds.
    """

    def seconds(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    expected = {name: min(seconds(call), seconds(call)) for name, call in contenders.items()}
    turns: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            num_calls = min(MAX_CALLS, max(1, round(TURN_SECONDS / expected[name])))
            if num_calls > 1:
                call()
            turns[name].append(statistics.median(seconds(call) for _ in range(num_calls)))
    return {name: statistics.median(times) for name, times in turns.items()}


def use_threads(num_threads: int | None) -> int:
    """Let torch, our kernels and peers loaded from now on use so many threads; None: torch's own.

    Peers with an OpenMP of their own read the environment when they are loaded.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    return torch.get_num_threads()


def clock(*, processor_time: bool) -> Clock:
    """The wall clock, or the processor time of this process, which other processes do not hold up.

    Raises:
        SystemExit: processor time of several threads, which adds up what they do side by side.
    """
    if not processor_time:
        return time.perf_counter
    if torch.get_num_threads() > 1:
        raise SystemExit("--processor-time needs --threads 1: it adds up over threads")
    return time.process_time


def machine(*, native: bool = True) -> str:
    """Processor, threads and versions, for the line above a table.

    Args:
        native: whether the native kernels are what is measured.

    Raises:
        SystemExit: they are, and are missing.
    """
    if native and cpu.isa() is None:
        raise SystemExit("no native kernels in this environment: install fedprune with a compiler")
    return (
        f"{_processor()}, {torch.get_num_threads()} threads, {cpu.isa() or 'no native'} kernels, "
        f"torch {torch.__version__.partition('+')[0]}"
    )


class Neighbours:
    """How much of the machine other processes took since this object was made."""

    def __init__(self) -> None:
        self._start = _processor_seconds()

    def share(self) -> float:
        """Of the processors' time, in [0, 1]; NaN where the system does not tell."""
        own, busy, total = (b - a for a, b in zip(self._start, _processor_seconds(), strict=True))
        return max(0.0, (busy - own) / total) if total else math.nan


def _processor_seconds() -> tuple[float, float, float]:
    """Seconds of processor time: this process and its finished children; all; all and idle."""
    own = sum(os.times()[:4])
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:  # not Linux
        return own, 0.0, 0.0
    ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in line.split()[1:9]]
    return own, sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return "unknown processor"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")
