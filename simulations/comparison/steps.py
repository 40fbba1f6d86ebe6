"""A whole comparison in its steps: tuning, clients' memory, the table's runs, the page."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simulations.comparison.cells import Cell, CellJob, Pair, Point, grid, pairs
from simulations.comparison.memory import MemoryJob
from simulations.comparison.presets import Preset
from simulations.comparison.tuning import Tried, chosen, tried, tuning_cells, write_log
from simulations.jobs import Job, Outcome, Workers, read_outcome, run_jobs


@dataclass(frozen=True)
class Call:
    """What the command line asked for.

    Attributes:
        preset: with the densities, alphas, seeds and settings that were given in its place.
        point: what every method uses where nothing is tuned; None: tune.
        command: that does it again.
        saved: where the page goes.
    """

    preset: Preset
    methods: Sequence[str]
    out: Path
    point: Point | None
    command: str
    saved: Path

    @property
    def pairs(self) -> list[Pair]:
        """Methods with densities, in order."""
        return pairs(self.methods, self.preset.densities)


@dataclass(frozen=True)
class Found:
    """What there is of a comparison.

    Attributes:
        cells: of the table.
        outcomes: of these, of the tuning and of clients' memory, by name.
        memory: bytes of a client's process, where they are known.
        log: of the tuning.
    """

    cells: Sequence[Cell]
    outcomes: Mapping[str, Outcome]
    memory: Mapping[Pair, float]
    log: Mapping[Pair, Sequence[Tried]]


def compare(call: Call, workers: Workers | None) -> Found:
    """Run what is missing; with nobody to do it, only look at what there is."""
    outcomes: dict[str, Outcome] = {}

    def work(jobs: Sequence[Job]) -> None:
        if workers is not None:
            run_jobs(jobs, call.out, workers)
        found = {job.name: read_outcome(job.name, call.out) for job in jobs}
        outcomes.update({name: one for name, one in found.items() if one is not None})

    def runs(cells: Sequence[Cell]) -> list[Job]:
        return [CellJob(cell, call.preset.settings) for cell in cells]

    # 1. Each method's own settings, from runs of their own.
    log: dict[Pair, list[Tried]] = {}
    if call.point is None:
        work(runs(tuning_cells(call.preset, call.pairs)))
        found = {pair: tried(call.preset, *pair, outcomes) for pair in call.pairs}
        log = {pair: one for pair, one in found.items() if one is not None}
        write_log(call.out, log)
        points = {pair: point for pair, one in log.items() if (point := chosen(one))}
    else:
        points = dict.fromkeys(call.pairs, call.point)
    # 2. The memory of a client's process, once for each method and density.
    memory_jobs = {pair: _memory_job(call, pair) for pair in call.pairs}
    if sys.platform == "linux":  # whose kernel tells
        work(list(memory_jobs.values()))
    memory = {
        pair: outcomes[job.name].values["peak_bytes"]
        for pair, job in memory_jobs.items()
        if job.name in outcomes and outcomes[job.name].values
    }
    # 3. The table's runs.
    cells = grid(
        points,
        methods=call.methods,
        densities=call.preset.densities,
        alphas=call.preset.alphas,
        seeds=call.preset.seeds,
    )
    work(runs(cells))
    return Found(cells, outcomes, memory, log)


def _memory_job(call: Call, pair: Pair) -> MemoryJob:
    """Clients of equal shares, at the smallest learning rate, which changes no size."""
    method, density = pair
    point = call.point or call.preset.points(method)[0]
    return MemoryJob(Cell(method, density, None, 0, point), call.preset.settings)
