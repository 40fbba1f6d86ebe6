"""A few training steps in a process of its own, for `fedprune device bench`.

    python -m fedprune.device.trial JSON

The argument has the fields of `Trial`; what is printed those of `Measured`, as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np

from fedprune.device.networks import open_program, random_state
from fedprune.local.model import normalization
from sparsemodel.runtime.trainer import Trainer
from sparsemodel.storage.meter import peak_rss_bytes

# What Flower's command imports beside the client app.
_FLOWER = ("flwr.supernode.cli", "fedprune.flower.client")
_WARM_STEPS = 2


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Attributes:
        model: as of `open_program`.
        steps: that are timed; 0: nothing is trained.
        flower: whether the process is a node's, with all that Flower imports.
    """

    model: str
    density: float
    batch_size: int = 1
    recompute: bool = False
    threads: int = 1
    steps: int = 0
    flower: bool = False


@dataclass(frozen=True)
class Measured:
    """What it came to.

    Attributes:
        peak_bytes: of the whole process, by the kernel.
        step_seconds: the fastest; 0: none was made.
    """

    peak_bytes: int
    step_seconds: float


def measure(trial: Trial) -> Measured:
    """Try it in this process."""
    for name in _FLOWER if trial.flower else ():
        importlib.import_module(name)
    program = open_program(trial.model)
    seconds = []
    if trial.steps:
        trainer = Trainer(
            program,
            random_state(program, density=trial.density, seed=0),
            batch_size=trial.batch_size,
            recompute=trial.recompute,
            threads=trial.threads,
            normalization=normalization(program.input_shape[0]),
        )
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (trial.batch_size, *program.input_shape), np.uint8)
        labels = draw.integers(0, program.classes, trial.batch_size)
        for _ in range(_WARM_STEPS + trial.steps):
            started = time.perf_counter()
            trainer.step(images, labels, lr=0.01, momentum=0.9, weight_decay=5e-4)
            seconds.append(time.perf_counter() - started)
    return Measured(peak_rss_bytes(), min(seconds[_WARM_STEPS:], default=0.0))


def main() -> None:
    """The command."""
    print(json.dumps(asdict(measure(Trial(**json.loads(sys.argv[1]))))))


if __name__ == "__main__":
    main()
