"""Run a grid of federated methods, densities and seeds, resumably, and write one table.

Every cell is a run folder of its own; a finished one is not run again, an interrupted one goes
on from its last round. Test accuracy is read once, from the last round's model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fedprune
from fedprune import RunConfig
from fedprune.config import own_settings, parse_assignments
from fedprune.rounds.folder import CONFIG, read_summary
from prunelab.pages.units import format_bytes, mean_and_spread
from prunelab.runs.provenance import commit
from simulations import page as markdown

# Methods whose result does not depend on the density are run once for each seed.
DENSE_METHODS = ("fedavg",)
METHODS = ("fedtiny", "fedtiny-vanilla", "fedtiny-fixed", "magnitude", "small-dense", "fedavg")


@dataclass(frozen=True)
class Experiment:
    """What a script fixes: its name, settings of each preset, densities and methods."""

    name: str
    title: str
    presets: Mapping[str, Mapping[str, Any]]
    densities: Sequence[float] = (0.01, 0.05, 0.1)
    methods: Sequence[str] = METHODS


@dataclass(frozen=True)
class Cell:
    """One run."""

    method: str
    density: float
    seed: int

    @property
    def folder(self) -> str:
        density = "" if self.method in DENSE_METHODS else f"-d{self.density:g}"
        return f"{self.method}{density}-s{self.seed}"


def cells(experiment: Experiment, seeds: Iterable[int]) -> list[Cell]:
    """Every cell of the grid, seed by seed, so that an early stop leaves whole seeds."""
    result = []
    for seed in seeds:
        for density in experiment.densities:
            for method in experiment.methods:
                if method in DENSE_METHODS and density != experiment.densities[0]:
                    continue
                result.append(Cell(method, 1.0 if method in DENSE_METHODS else density, seed))
    return result


def run_cell(cell: Cell, settings: Mapping[str, Any], out: Path) -> Path:
    """Run, or resume, or find finished, one cell; returns its folder."""
    values = {**settings, "method.name": cell.method, "method.density": cell.density}
    config = RunConfig.parse(own_settings({**values, "seed": cell.seed}))
    folder = out / cell.folder
    fedprune.run(config, folder, resume=(folder / CONFIG).exists())
    return folder


def table(experiment: Experiment, summaries: Mapping[Cell, Mapping[str, Any]]) -> str:
    """The result as Markdown: one row for each density and method."""
    header = ["density", "method", "accuracy, %", "seeds", "up / round / client", "of dense"]
    header += ["training FLOPs of dense"]
    rows = []
    keys = sorted(
        {(cell.density, cell.method) for cell in summaries},
        key=lambda key: (key[0], experiment.methods.index(key[1])),
    )
    for density, method in keys:
        group = [s for c, s in summaries.items() if (c.density, c.method) == (density, method)]
        accuracy = mean_and_spread((s["test_accuracy"] for s in group), ".1f", scale=100)
        up = statistics.mean(s["bytes_up_steady_round"] for s in group)
        dense = statistics.mean(s["bytes_dense_round"] for s in group)
        flops = statistics.mean(s["train_flops_ratio"] for s in group)
        costs = [format_bytes(up), f"{100 * up / dense:.1f} %", f"{flops:.3f}"]
        rows.append([f"{density:g}", method, accuracy, str(len(group)), *costs])
    return markdown.table(header, rows, words=(1,))


def differences(summaries: Mapping[Cell, Mapping[str, Any]]) -> str:
    """FedTiny against each rival, paired by seed: mean difference in points ± spread."""
    rows = []
    accuracy = {c: 100 * s["test_accuracy"] for c, s in summaries.items()}
    densities = sorted({c.density for c in summaries if c.method == "fedtiny"})
    rivals = [m for m in METHODS if m not in ("fedtiny", *DENSE_METHODS)]
    for density in densities:
        for rival in rivals:
            pairs = [
                accuracy[c] - accuracy[other]
                for c in accuracy
                if (c.method, c.density) == ("fedtiny", density)
                and (other := Cell(rival, density, c.seed)) in accuracy
            ]
            if not pairs:
                continue
            won = f"{sum(difference > 0 for difference in pairs)} of {len(pairs)}"
            rows.append([f"{density:g}", rival, mean_and_spread(pairs, "+.1f"), won])
    return markdown.table(["density", "FedTiny minus", "points", "seeds won"], rows, words=(1,))


def main(experiment: Experiment) -> None:
    """Command line of a script."""
    parser = argparse.ArgumentParser(prog=f"python -m simulations.{experiment.name}")
    parser.add_argument("--preset", choices=list(experiment.presets), default="small")
    parser.add_argument("--full", action="store_true", help="same as --preset full")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--densities", default=",".join(map(str, experiment.densities)))
    parser.add_argument("--methods", default=",".join(experiment.methods))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--data", help="a folder of parquet instead of the data set's name")
    parser.add_argument("--out", type=Path, help="where run folders go; default runs/NAME-PRESET")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at a time")
    arguments = parser.parse_args()
    preset = "full" if arguments.full else arguments.preset
    chosen = Experiment(
        name=experiment.name,
        title=experiment.title,
        presets=experiment.presets,
        densities=[float(d) for d in arguments.densities.split(",")],
        methods=arguments.methods.split(","),
    )
    settings = dict(experiment.presets[preset])
    if arguments.data:
        settings["data.dataset"] = str(Path(arguments.data).resolve())
    changes = parse_assignments(arguments.set)
    settings.update(changes)
    name = "-".join([experiment.name, preset, *(f"{k}={v}" for k, v in changes.items())])
    out = arguments.out or Path("runs") / name
    grid = cells(chosen, [int(seed) for seed in arguments.seeds.split(",")])
    at = commit()
    summaries = run_grid(grid, settings, out, jobs=arguments.jobs)
    page = write_page(chosen, preset, settings, summaries, at)
    # Only the whole grid with the preset's own settings replaces the saved table.
    is_whole = not changes and chosen.densities == list(experiment.densities)
    is_whole = is_whole and chosen.methods == list(experiment.methods)
    suffix = "" if preset == "small" else f"_{preset}"
    saved = Path(__file__).parent / f"{experiment.name}{suffix}.md"
    target = saved if is_whole else out / "table.md"
    target.write_text(page, encoding="utf-8")
    print(page)
    print(f"table: {target}")


def run_grid(
    grid: Sequence[Cell], settings: Mapping[str, Any], out: Path, *, jobs: int
) -> dict[Cell, Mapping[str, Any]]:
    """All cells, `jobs` at a time in processes of their own; reports each as it ends."""
    summaries: dict[Cell, Mapping[str, Any]] = {}
    started = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_cell, cell, settings, out): cell for cell in grid}
        for future in as_completed(futures):
            cell = futures[future]
            summaries[cell] = read_summary(future.result())
            left = (time.monotonic() - started) / len(summaries) * (len(grid) - len(summaries))
            print(
                f"{len(summaries)}/{len(grid)} {cell.folder}: "
                f"{100 * summaries[cell]['test_accuracy']:.2f} %, about {left / 60:.0f} min left",
                flush=True,
            )
    return {cell: summaries[cell] for cell in grid}


def write_page(
    experiment: Experiment,
    preset: str,
    settings: Mapping[str, Any],
    summaries: Mapping[Cell, Mapping[str, Any]],
    at: str,
) -> str:
    """The Markdown page: what was run, where, and what came out."""
    shown = {key: value for key, value in settings.items() if key != "data.dataset"}
    seeds = sorted({cell.seed for cell in summaries})
    command = f"python -m simulations.{experiment.name} --preset {preset} --seeds "
    command += ",".join(map(str, seeds))
    return markdown.page(
        experiment.title,
        command=command,
        at=at,
        notes=[
            f"mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}; "
            "the seed decides data split, initial weights, order and masks alike",
            "every method: the same network class (small-dense: narrower), split, pre-trained "
            "start, learning rate and rounds; no method was tuned",
            "test data are used once a round for the record and decide nothing",
        ],
        body=[
            table(experiment, summaries),
            "",
            "FedTiny against its rivals, paired by seed:",
            "",
            differences(summaries),
        ],
        settings=shown,
    )


if __name__ == "__main__":
    sys.exit("run one of the experiments, for example python -m simulations.fedtiny_cifar10")
