"""A cell of the grid: one run, its name, its settings and what became of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedprune
from fedprune import RunConfig
from fedprune.config import Scalar, own_settings
from fedprune.errors import USER_ERRORS
from fedprune.methods import method_class
from fedprune.rounds.folder import CONFIG
from prunelab.errors import DataWarning
from simulations.jobs import DID_DIVERGE, FINISHED, Outcome

Point = tuple[tuple[str, Scalar], ...]
"""What tuning chooses: settings of a run, the learning rate first."""
Pair = tuple[str, float | None]
"""A method and a density; None: it takes none, and runs once for all."""

KEPT = (
    "test_accuracy", "test_loss", "density", "bytes_up", "bytes_down", "client_seconds",
    "train_flops_ratio", "seconds",
)  # fmt: skip
"""What a page may need of a run's summary."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        density: None: the method has no such setting, and runs once for all densities.
        alpha: Dirichlet concentration of the partition; None: IID.
        tuning: whether clients test the model on samples of their own, and nobody reads the
            test set.
    """

    method: str
    density: float | None
    alpha: float | None
    seed: int
    point: Point
    tuning: bool = False

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = ["tune"] if self.tuning else []
        parts += [self.method] if self.density is None else [self.method, f"d{self.density:g}"]
        parts += ["iid" if self.alpha is None else f"a{self.alpha:g}"]
        return "-".join([*parts, point_name(self.point), f"s{self.seed}"])

    def config(self, settings: Mapping[str, Any]) -> RunConfig:
        """The run's configuration.

        Args:
            settings: of the preset; those of other methods are left out.

        Raises:
            ConfigError: it cannot be; says why.
        """
        values = {**settings, "method.name": self.method, "seed": self.seed}
        if self.density is not None:
            values["method.density"] = self.density
        if self.alpha is None:
            values["data.partition"] = "iid"
        else:
            values |= {"data.partition": "dirichlet", "data.alpha": self.alpha}
        if self.tuning:
            values["federation.evaluate"] = "clients"
        return RunConfig.parse({**own_settings(values), **dict(self.point)})


@dataclass(frozen=True)
class CellJob:
    """A cell that can be run, here or elsewhere."""

    cell: Cell
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its folder and its outcome."""
        return self.cell.name

    def run(self, out: Path) -> Outcome:
        """Run it, or the rest of it."""
        folder = out / "cells" / self.name
        try:
            with warnings.catch_warnings():
                # That the test set is left aside is what tuning is for.
                warnings.filterwarnings("ignore", ".*test samples are left aside", DataWarning)
                config = self.cell.config(self.settings)
                result = fedprune.run(config, folder, resume=(folder / CONFIG).exists())
        except USER_ERRORS as error:
            if "has diverged" in str(error):
                return Outcome(DID_DIVERGE, reason=str(error))
            raise
        loss = result.summary["test_loss"]
        if loss is None or not math.isfinite(loss):
            return Outcome(DID_DIVERGE, reason=f"the test loss is {loss}")
        return Outcome(FINISHED, values={key: result.summary.get(key) for key in KEPT})


def takes_density(method: str) -> bool:
    """Whether a method can be given a density."""
    return "density" in method_class(method)().settings()


def grid(
    points: Mapping[Pair, Point],
    *,
    methods: Sequence[str],
    densities: Sequence[float],
    alphas: Sequence[float | None],
    seeds: Iterable[int],
) -> list[Cell]:
    """Every cell of a table, seed by seed, so that an early stop leaves whole seeds.

    Args:
        points: each method's settings by density; methods without any are left out.
    """
    return [
        Cell(method, density, alpha, seed, points[method, density])
        for seed in seeds
        for alpha in alphas
        for method, density in pairs(methods, densities)
        if (method, density) in points
    ]


def pairs(methods: Sequence[str], densities: Sequence[float]) -> list[Pair]:
    """Methods with densities; one that takes none comes once, before the others."""
    free = [(method, None) for method in methods if not takes_density(method)]
    return [*free, *((m, d) for d in densities for m in methods if takes_density(m))]


def point_name(point: Point) -> str:
    """A point in a file's name.

    >>> point_name((("training.lr", 0.1), ("method.alpha", 0.3)))
    'lr0.1-alpha0.3'
    """
    return "-".join(f"{key.rpartition('.')[2]}{value}" for key, value in point)
