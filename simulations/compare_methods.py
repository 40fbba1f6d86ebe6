"""Every federated method in the same loop: accuracy by density and data split, and what it costs.

    python -m simulations.compare_methods --preset digits

Each method's learning rate is tuned first, by the same number of runs, on other seeds than the
table's and on samples that clients keep from training; the test set is read by the table's runs
alone. Every run is a folder; a finished one is not run again, an interrupted one goes on, and
commands on one folder share the work. `--table-only` writes the page of what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedprune.config import RunConfig, parse_assignments
from fedprune.methods import METHODS
from prunelab.errors import PrunelabError
from simulations.comparison.cells import Cell, CellJob, Point, grid, pairs
from simulations.comparison.jobs import (
    FINISHED,
    Job,
    Outcome,
    Workers,
    processes,
    ray_cluster,
    read_outcome,
    run_jobs,
)
from simulations.comparison.memory import MemoryJob
from simulations.comparison.presets import PRESETS, SHORT, Preset
from simulations.comparison.results import groups
from simulations.comparison.tables import (
    frontier_sections,
    gap_section,
    method_sections,
)
from simulations.comparison.tuning import (
    Tried,
    chosen,
    tried,
    tuning_cells,
    tuning_rows,
    write_log,
)
from simulations.page import page, table
from sparsemodel.storage.files import write_atomically

Pair = tuple[str, float | None]


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

    def jobs(self, cells: Sequence[Cell]) -> list[Job]:
        """Cells with what it takes to run them."""
        return [CellJob(cell, self.preset.settings) for cell in cells]


def run_call(call: Call, workers: Workers | None) -> str:
    """Run what is missing, with nobody to do it nothing, and return the page."""
    outcomes: dict[str, Outcome] = {}

    def work(jobs: Sequence[Job]) -> None:
        if workers is not None:
            outcomes.update(run_jobs(jobs, call.out, workers))
        found = {job.name: read_outcome(job.name, call.out) for job in jobs}
        outcomes.update({name: one for name, one in found.items() if one is not None})

    log: dict[Pair, list[Tried]] = {}
    if call.point is None:
        work(call.jobs(tuning_cells(call.preset, call.pairs)))
        for method, density in call.pairs:
            found = tried(call.preset, method, density, outcomes)
            if found is not None:
                log[method, density] = found
        write_log(call.out, log)
        points = {pair: point for pair, found in log.items() if (point := chosen(found))}
    else:
        points = dict.fromkeys(call.pairs, call.point)
    memory_jobs = {pair: _memory_job(call, pair) for pair in call.pairs}
    if sys.platform == "linux":  # whose kernel tells
        work(list(memory_jobs.values()))
    cells = grid(
        points,
        methods=call.methods,
        densities=call.preset.densities,
        alphas=call.preset.alphas,
        seeds=call.preset.seeds,
    )
    work(call.jobs(cells))
    memory = {
        pair: outcomes[job.name].values.get("peak_bytes")
        for pair, job in memory_jobs.items()
        if job.name in outcomes
    }
    return write_page(call, cells, outcomes, memory, log)


def write_page(
    call: Call,
    cells: Sequence[Cell],
    outcomes: Mapping[str, Outcome],
    memory: Mapping[Pair, float | None],
    log: Mapping[Pair, Sequence[Tried]],
) -> str:
    """The Markdown page: the gap to dense, then tables, frontiers, tuning and what went wrong."""
    found = groups(cells, outcomes)
    preset, clients = call.preset, int(call.preset.settings["data.clients"])
    body = [*gap_section(found), *method_sections(found)]
    body += frontier_sections(found, memory, clients=clients)
    seeds = ", ".join(map(str, preset.seeds))
    notes = [
        f"mean ± sample standard deviation over seeds {seeds}; the seed decides data split, "
        "initial weights, order and masks alike, and differences are paired by it",
        "intervals are Student's, each for itself: they are not widened for the number of rivals",
        "a run that diverged counts as such and is in no mean: a method with one is less stable "
        "than its mean says",
        "test data are used once a round for the record and decide nothing",
    ]
    if call.point is None:
        notes += [
            "every method was tuned by the same number of runs at Dirichlet 0.5, at each density "
            f"for itself, on seeds {', '.join(map(str, preset.tuning_seeds))}; the score is the "
            "accuracy on a tenth of each client's own samples, which no client trains on; the "
            "test set is not read; of equal scores the smaller setting wins; what diverged "
            "cannot win",
        ]
        missing = [pair for pair in call.pairs if pair not in log]
        if missing:
            notes += [f"not tuned yet, and left out: {', '.join(map(_pair_name, missing))}"]
        header = ["method", "density", "accuracy, % on clients' own samples, by setting"]
        body += ["", "## Tuning", "", table(header, tuning_rows(log), words=(0, 2))]
    else:
        notes += ["nothing was tuned: every method uses the settings below"]
    if preset.note:
        notes += [preset.note]
    body += _troubles(outcomes)
    planned = len(cells)
    done = sum(cell.name in outcomes for cell in cells)
    if done < planned:
        notes += [f"{done} of {planned} runs have ended so far"]
    shown = {k: v for k, v in preset.settings.items() if k != "data.dataset" or "/" not in str(v)}
    return page(
        preset.title,
        command=call.command,
        at=", ".join(sorted({one.commit for one in outcomes.values() if one.commit})) or "none",
        notes=notes,
        body=body,
        settings=shown,
    )


def _troubles(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Runs that did not finish, and why."""
    rows = [
        [name, one.status, (one.reason.strip().splitlines() or ["?"])[-1][-300:]]
        for name, one in outcomes.items()
        if one.status != FINISHED
    ]
    if not rows:
        return []
    header = ["run", "outcome", "reason"]
    return ["", "## Runs that did not finish", "", table(header, rows, words=(0, 1, 2))]


def _memory_job(call: Call, pair: Pair) -> MemoryJob:
    """A client of average share, at the smallest learning rate."""
    method, density = pair
    point = call.point or call.preset.points(method)[0]
    settings = {**call.preset.settings, **SHORT}
    samples = int(settings.get("data.num_train", 0)) or 50_000
    share = samples // int(settings["data.clients"]) + 50  # of which the server takes a few
    return MemoryJob(Cell(method, density, None, 0, point), settings, share)


def _pair_name(pair: Pair) -> str:
    method, density = pair
    return method if density is None else f"{method} at {density:g}"


def parse(words: Sequence[str] | None = None) -> tuple[Call, argparse.Namespace]:
    """The command line, and what of it is about how to run.

    Raises:
        SystemExit: it asks for what cannot be; nothing has been run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m simulations.compare_methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="digits")
    parser.add_argument("--methods", help="names with commas between; default all")
    parser.add_argument("--densities", help="default the preset's")
    parser.add_argument("--alphas", help="such as .1,.5,iid; default the preset's")
    parser.add_argument("--seeds", help="default the preset's")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--no-tuning", action="store_true", help="--set training.lr=... for all")
    parser.add_argument("--data", help="a folder of parquet, or a name, instead of the data set")
    parser.add_argument("--out", type=Path, help="where runs go; default runs/NAME-PRESET")
    parser.add_argument("--jobs", type=int, default=0, help="at a time; default cores, or GPUs")
    parser.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster; local starts one here")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    given = parser.parse_args(words)
    try:
        return _call(given), given
    except (PrunelabError, ValueError) as error:
        parser.error(str(error))


def _call(given: argparse.Namespace) -> Call:
    preset, changes = PRESETS[given.preset], parse_assignments(given.set)
    settings = {**preset.settings, **changes}
    if given.data:
        settings["data.dataset"] = (
            str(Path(given.data).resolve()) if "/" in given.data else (given.data)
        )
    point: Point | None = None
    if given.no_tuning:
        rate = float(settings.get("training.lr", RunConfig().training.lr))
        point = (("training.lr", rate),)
    elif "training.lr" in changes:
        raise ValueError("--set training.lr: it is tuned; --no-tuning takes this one for all")
    settings.pop("training.lr", None)
    chosen_preset = replace(
        preset,
        settings=settings,
        densities=_floats(given.densities) or preset.densities,
        alphas=_alphas(given.alphas) or preset.alphas,
        seeds=[int(s) for s in given.seeds.split(",")] if given.seeds else preset.seeds,
    )
    if point is None and set(chosen_preset.seeds) & set(preset.tuning_seeds):
        raise ValueError("--seeds: the tuning has had some of these; take others")
    methods = given.methods.split(",") if given.methods else list(METHODS)
    is_whole = not (changes or given.no_tuning or given.methods or given.densities or given.alphas)
    name = "-".join(["compare_methods", given.preset, *(f"{k}={v}" for k, v in changes.items())])
    out = given.out or Path("runs") / name
    saved = Path(__file__).with_name(f"compare_methods_{given.preset}.md")
    call = Call(
        chosen_preset,
        methods,
        out,
        point,
        _command(given, chosen_preset.seeds),
        saved if is_whole else out / "table.md",
    )
    for cell in tuning_cells(chosen_preset, call.pairs):  # what cannot be is told before a run
        cell.config({**settings, "training.device": "cpu"})
    _check_folder(out, settings)
    return call


def _command(given: argparse.Namespace, seeds: Sequence[int]) -> str:
    parts = [f"python -m simulations.compare_methods --preset {given.preset}"]
    parts += [f"--{name} {value}" for name in ("methods", "densities", "alphas")
              if (value := getattr(given, name))]  # fmt: skip
    parts += [f"--seeds {','.join(map(str, seeds))}"]
    parts += [f"--set {value}" for value in given.set]
    parts += ["--no-tuning"] if given.no_tuning else []
    parts += [f"--data {'FOLDER' if '/' in given.data else given.data}"] if given.data else []
    return " ".join(parts)


def _check_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a folder has runs of other settings."""
    file, text = out / "settings.json", json.dumps(settings, sort_keys=True, indent=1)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{out} holds runs of other settings; give another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.encode())


def _floats(text: str | None) -> list[float]:
    return [float(part) for part in text.split(",")] if text else []


def _alphas(text: str | None) -> list[float | None]:
    parts = text.split(",") if text else []
    return [None if part == "iid" else float(part) for part in parts]


@contextmanager
def workers_of(given: argparse.Namespace, *, on_gpus: bool) -> Iterator[Workers]:
    """Whoever does the work."""
    if given.ray:
        with ray_cluster(given.ray, jobs=given.jobs, gpus=on_gpus) as workers:
            yield workers
        return
    gpus = 0
    if on_gpus:
        import torch  # noqa: PLC0415

        gpus = torch.cuda.device_count()
        if gpus == 0:
            raise SystemExit("training.device is cuda and there is no GPU; --set training.device")
    with processes(given.jobs or gpus or os.cpu_count() or 1, gpus=gpus) as workers:
        yield workers


def main() -> None:
    """Run what is missing and write the page."""
    call, given = parse()
    if given.table_only:
        text = run_call(call, None)
    else:
        on_gpus = call.preset.settings.get("training.device") == "cuda"
        with workers_of(given, on_gpus=on_gpus) as workers:
            text = run_call(call, workers)
    call.saved.write_text(text, encoding="utf-8")
    print(text)
    print(f"table: {call.saved}")
    if "| failed |" in text:
        raise SystemExit("some runs failed: the page says why; the same command tries them again")


if __name__ == "__main__":
    main()
