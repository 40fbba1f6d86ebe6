"""What `run-local` is asked to do, and where it is: settings and checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fedprune.errors import ConfigError
from prunelab.errors import check_settings
from sparsemodel.runtime.state import Array, SparseState
from sparsemodel.storage.state_file import load_state, save_state

CHECKPOINT = "checkpoint.safetensors"
MOMENTUM = "momentum:"


@dataclass(frozen=True)
class LocalRun:
    """What `run-local` is asked to do; what decides its bits, beside the data.

    Attributes:
        data: a store, or what `prunelab.data.own_store` takes.
        model: as of `open_program`; empty: that of `start`, else resnet18.
        start: a sparse model.safetensors to train on from; empty: a random state.
        density: of a random state.
        batch_size: the largest that is tried under the budget; which is taken is kept.

    Raises:
        ConfigError: a number is out of its range.
    """

    data: str
    model: str = ""
    start: str = ""
    density: float = 0.01
    epochs: int = 10
    batch_size: int = 16
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(
            "run-local",
            {
                f"density: expected 0 < density <= 1, got {self.density}": 0 < self.density <= 1,
                f"epochs: expected at least 1, got {self.epochs}": self.epochs >= 1,
                f"batch size: expected at least 2, got {self.batch_size}": self.batch_size >= 2,
                f"lr: expected a positive number, got {self.lr}": self.lr > 0,
            },
            error=ConfigError,
        )


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is: what it trains on which data, and what was said of each epoch."""

    run: LocalRun
    data: str  # digest of the store
    batch_size: int
    state: SparseState
    momentum: dict[str, Array]
    epochs: list[dict[str, float]]

    def write(self, out: Path) -> None:
        """Replace the one before in one step."""
        gathered = {MOMENTUM + name: array for name, array in self.momentum.items()}
        known = {
            "run": asdict(self.run),
            "data": self.data,
            "batch_size": self.batch_size,
            "epochs": self.epochs,
        }
        save_state(
            out / CHECKPOINT,
            SparseState({**self.state.values, **gathered}, self.state.patterns),
            metadata={"local": json.dumps(known)},
        )

    @classmethod
    def read(cls, out: Path) -> Checkpoint:
        """The one in a folder.

        Raises:
            CheckpointError: it is damaged.
        """
        state, metadata = load_state(out / CHECKPOINT)
        known = json.loads(metadata["local"])
        values: dict[str, Array] = {}
        momentum: dict[str, Array] = {}
        for name, array in state.values.items():
            if name.startswith(MOMENTUM):
                momentum[name.removeprefix(MOMENTUM)] = array
            else:
                values[name] = array
        return cls(
            LocalRun(**known["run"]), known["data"], known["batch_size"],
            SparseState(values, state.patterns), momentum, known["epochs"],
        )  # fmt: skip
