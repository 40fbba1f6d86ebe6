"""Where FedTiny grows weights: how many of them at outputs that had none.

    python -m simulations.growth_places

Behind a batch norm an output without a weight is constant, its variance is zero, and gradients at
its pruned weights are divided by √ε. `small` is digits with resnet8, seconds a run; `cifar10` is
resnet18, some minutes a run, with the data set at hand or as a folder of parquet by --data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import fedprune
from fedprune import RunConfig
from fedprune.exchange.pooled import Pooled
from fedprune.methods import FedTiny, RunState
from simulations.command import parse
from simulations.page import page, table
from simulations.pruning_cells import Result, run_cells
from sparsemodel.runtime.pattern import Pattern
from sparsemodel.runtime.state import SparseState

DENSITIES = (0.01, 0.03, 0.1)
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "small": {
        "data.dataset": "digits",
        "data.num_train": 700,
        "data.clients": 6,
        "model.name": "resnet8",
        "training.rounds": 6,
        "training.lr": 0.1,
    },
    "cifar10": {
        "data.dataset": "cifar10",
        "data.num_train": 5000,
        "data.num_test": 200,
        "data.clients": 10,
        "data.augment": True,
        "model.name": "resnet18",
        "training.rounds": 6,
        "training.local_epochs": 1,
        "training.batch_size": 32,
        "training.lr": 0.05,
    },
}


@dataclass(frozen=True)
class Move:
    """What adjustments did to layers: counts, which add up.

    Attributes:
        layers: of which the mask moved.
        outputs, silent: of these layers before, and those without a weight.
        grown, grown_silent: weights, and those at outputs that were silent.
        mostly_silent: layers that grew more than half of their weights there.
        silenced: outputs that lost their last weight.
    """

    layers: int = 0
    outputs: int = 0
    silent: int = 0
    grown: int = 0
    grown_silent: int = 0
    mostly_silent: int = 0
    silenced: int = 0

    def __add__(self, other: Move) -> Move:
        return Move(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def move(before: Pattern, after: Pattern) -> Move:
    """One adjustment of one layer.

    >>> import numpy as np
    >>> before = Pattern.from_positions((3, 4), np.array([0, 1, 4]))
    >>> after = Pattern.from_positions((3, 4), np.array([0, 1, 8]))
    >>> move(before, after)
    Move(layers=1, outputs=3, silent=1, grown=1, grown_silent=1, mostly_silent=1, silenced=1)
    """
    was_silent, is_silent = np.diff(before.row_ptr) == 0, np.diff(after.row_ptr) == 0
    rows = np.setdiff1d(after.positions(), before.positions()) // before.row_length
    at_silent = int(was_silent[rows].sum())
    return Move(
        1, len(was_silent), int(was_silent.sum()), len(rows), at_silent,
        int(2 * at_silent > len(rows)), int((is_silent & ~was_silent).sum()),
    )  # fmt: skip


@dataclass(frozen=True)
class Watched(FedTiny):
    """FedTiny that notes where its mask moves."""

    name: ClassVar[str] = "watched"
    moves: ClassVar[list[Move]] = []

    def adjusted(self, state: RunState, pooled: Pooled, counts: dict[str, int]) -> SparseState:
        after = super().adjusted(state, pooled, counts)
        for layer in counts:
            patterns = pooled.model.pattern(layer), after.pattern(layer)
            assert patterns[0] is not None and patterns[1] is not None, "pruned layers"  # noqa: PT018
            self.moves.append(move(*patterns))
        return after


def run_one(settings: Mapping[str, Any], method: Watched) -> Result:
    """The sums over one run's adjusted layers, those with a silent output before and the others.

    Of the run itself nothing is kept.
    """
    Watched.moves.clear()
    with tempfile.TemporaryDirectory() as folder:
        fedprune.run(RunConfig.parse(settings), Path(folder) / "run", method=method)
    with_silent = [one for one in Watched.moves if one.silent]
    without = [one for one in Watched.moves if not one.silent]
    return {"some": asdict(sum(with_silent, Move())), "none": asdict(sum(without, Move()))}


def result_row(density: float, which: str, total: Move) -> list[str]:
    """A row of the table."""
    return [
        f"{density:g}",
        which,
        str(total.layers),
        f"{100 * total.silent / total.outputs:.1f}",
        str(total.grown),
        f"{100 * total.grown_silent / total.grown:.1f}" if total.grown else "",
        str(total.mostly_silent),
        str(total.silenced),
    ]


def main() -> None:
    """Run what is missing and write the page."""
    call = parse("growth_places", list(PRESETS))
    settings = dict(PRESETS[call.preset])
    if call.data is not None:
        settings["data.dataset"] = call.data
    cells = {}
    for seed, density in product(call.seeds, DENSITIES):
        name = f"s{seed}-d{density:g}"
        method = Watched(density=density, pool_size=2, adjust_every=1, adjust_until=7)
        cells[name] = partial(run_one, {**settings, "seed": seed}, method)
    found = run_cells(cells, call.out, settings=settings)
    rows = []
    for density, which in product(DENSITIES, ("some", "none")):
        group = [Move(**found[f"s{seed}-d{density:g}"][which]) for seed in call.seeds]
        total = sum(group, Move())
        if total.layers:
            rows.append(result_row(density, which, total))
    header = ["density", "silent outputs", "layers adjusted", "outputs silent, %", "weights grown"]
    header += ["at silent outputs, %", "layers with most of them there", "outputs silenced"]
    seeds = ", ".join(map(str, call.seeds))
    text = page(
        "Where FedTiny grows weights",
        command=call.command,
        at=", ".join(sorted({result["commit"] for result in found.values()})),
        notes=[
            f"all adjustments of seeds {seeds}, one after every round, from two candidates; counts "
            "are sums over them",
            "a silent output has no weight; percentages are of the layers of their row",
        ],
        body=[table(header, rows, words=(1,))],
        settings=settings if not call.has_folder else PRESETS[call.preset],
    )
    call.save(text)


if __name__ == "__main__":
    main()
