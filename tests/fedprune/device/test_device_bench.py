"""`fedprune device bench` measures whole processes, and its choice stays within the budget."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from fedprune.device.bench import Fit, bench, best
from prunelab.errors import ModelError


def tried(**more: Any) -> Fit:
    values: dict[str, Any] = {
        "batch_size": 8, "recompute": False, "threads": 1, "peak_bytes": 100, "flower_bytes": 0,
        "step_seconds": 1.0, "fits": True, "fits_flower": False, **more,
    }  # fmt: skip
    return Fit(**values)


def test_the_fastest_that_fits_is_chosen() -> None:
    """Samples a second: 8, 16 and 32; the last does not fit, of equals the smaller is taken."""
    slow, fast = tried(), tried(step_seconds=0.5)
    small = tried(step_seconds=0.5, recompute=True, peak_bytes=60)
    large = tried(batch_size=32, fits=False)
    assert best([slow, fast, small, large], of=lambda fit: fit.fits) is small
    assert best([slow, fast], of=lambda fit: fit.fits_flower) is None


def test_an_unknown_network_is_refused_at_once() -> None:
    with pytest.raises(ModelError, match="did you mean 'resnet18'"):
        next(bench("resnet19", density=0.01, budget=0))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own account")
def test_nothing_fits_a_budget_that_is_too_small() -> None:
    """It stops there; a process without Flower takes what numpy and the library do, one with it
    more; recomputing takes less."""
    command = ["device", "bench", "--model", "resnet20", "--budget", "30MB", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "fedprune", *command, "--density", "0.1", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["alone"] is found["node"] is None
    kept, again = found["tried"]
    assert (kept["batch_size"], kept["recompute"], again["recompute"]) == (8, False, True)
    assert 30 * 10**6 < again["peak_bytes"] < kept["peak_bytes"] < 80 * 10**6
    assert kept["flower_bytes"] - kept["peak_bytes"] > 50 * 10**6
    assert kept["step_seconds"] > 0
