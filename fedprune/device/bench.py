"""What fits this device's memory, and how fast it is: measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fedprune.device.networks import open_program
from fedprune.device.trial import Measured, Trial
from prunelab.errors import RunError
from prunelab.runs.children import ended_with_parent

BATCHES = (8, 16, 32, 64)
_STEPS = 3


@dataclass(frozen=True)
class Fit:
    """A way to train, measured.

    Attributes:
        peak_bytes: of a process that trains alone (`fedprune device run-local`).
        flower_bytes: about what a node's process peaks at; 0: Flower is not installed.
        step_seconds: of one batch.
        fits: whether the process that trains alone stays within the budget.
        fits_flower: whether a node's does.
    """

    batch_size: int
    recompute: bool
    threads: int
    peak_bytes: int
    flower_bytes: int
    step_seconds: float
    fits: bool
    fits_flower: bool

    @property
    def speed(self) -> float:
        """Samples a second."""
        return self.batch_size / self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "samples_per_second": self.speed}


def bench(model: str, *, density: float, budget: int, threads: int = 0) -> Iterator[Fit]:
    """Ways to train on this machine, from small batches to the first that do not fit.

    Args:
        model: as of `open_program`.
        budget: bytes; 0: no limit.
        threads: to try beside one; 0: all processors of this process.

    Raises:
        ModelError: no such network.
        RunError: a process failed; says why.
    """
    open_program(model)  # refused here, in words
    most = threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else "1")
    alone = _tried(Trial(model, density)).peak_bytes
    flower = _flower_bytes(model, density, alone)
    for batch_size in BATCHES:
        trials = [
            Trial(model, density, batch_size, recompute, count, _STEPS)
            for recompute in (False, True)
            for count in sorted({1, most})
        ]
        found = [_fit(trial, _tried(trial), flower=flower, budget=budget) for trial in trials]
        yield from found
        if not any(fit.fits for fit in found):
            return


def best(fits: list[Fit], *, of: Callable[[Fit], bool]) -> Fit | None:
    """The fastest of those that fit; of equals the smaller."""
    return max(filter(of, fits), key=lambda fit: (fit.speed, -fit.peak_bytes), default=None)


def _fit(trial: Trial, found: Measured, *, flower: int, budget: int) -> Fit:
    peak = found.peak_bytes
    node = peak + flower if flower else 0
    return Fit(
        trial.batch_size, trial.recompute, trial.threads, peak, node, found.step_seconds,
        fits=not budget or peak <= budget,
        fits_flower=bool(node) and (not budget or node <= budget),
    )  # fmt: skip


def _flower_bytes(model: str, density: float, alone: int) -> int:
    """What Flower's imports add to a process; 0 where it is not installed."""
    try:
        return _tried(Trial(model, density, flower=True)).peak_bytes - alone
    except RunError:
        return 0


def _tried(trial: Trial) -> Measured:
    command = [sys.executable, "-m", "fedprune.device.trial", json.dumps(asdict(trial))]
    done = subprocess.run(ended_with_parent(*command), capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RunError(f"batches of {trial.batch_size}: {last[0]}")
    return Measured(**json.loads(done.stdout))
