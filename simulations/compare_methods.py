"""Every federated method in the same loop: accuracy by density and data split, and what it costs.

    python -m simulations.compare_methods --preset digits

Each method's learning rate is tuned first, by the same number of runs, on other seeds than the
table's and on samples that clients keep from training; the test set is read by the table's runs
alone. Every run is a folder; a finished one is not run again, an interrupted one goes on, and
commands on one folder share the work. `--table-only` writes the page of what there is. The
outcomes behind a saved page are beside it: with `--archive` a table is widened, not run anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fedprune.config import RunConfig, parse_assignments
from fedprune.methods import METHODS
from prunelab.data.datasets import check_dataset
from prunelab.errors import PrunelabError
from simulations.archive import add_archive_argument, archived
from simulations.comparison.cells import Point, grid
from simulations.comparison.presets import PRESETS
from simulations.comparison.report import write_page
from simulations.comparison.steps import Call, compare
from simulations.comparison.tuning import tuning_cells
from simulations.jobs import check_settings, parsed, workers_of
from simulations.page import publish

T = TypeVar("T")


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
    add_archive_argument(parser)
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    given = parsed(parser, words)
    try:
        return _call(given), given
    except (PrunelabError, ValueError) as error:
        parser.error(str(error))


def _call(given: argparse.Namespace) -> Call:
    preset, changes = PRESETS[given.preset], parse_assignments(given.set)
    settings = {**preset.settings, **changes}
    if given.data:
        is_folder = Path(given.data).is_dir()
        if ":" not in given.data and not Path(given.data).exists():
            check_dataset(given.data)
        settings["data.dataset"] = str(Path(given.data).resolve()) if is_folder else given.data
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
        densities=_listed("densities", given.densities, float) or preset.densities,
        alphas=_listed("alphas", given.alphas, _alpha) or preset.alphas,
        seeds=_listed("seeds", given.seeds, int) or preset.seeds,
    )
    if point is None and set(chosen_preset.seeds) & set(preset.tuning_seeds):
        raise ValueError("--seeds: the tuning has had some of these; take others")
    methods = _listed("methods", given.methods, str) or list(METHODS)
    # Only the whole grid, on the preset's own data, replaces the saved page.
    own = [given.methods, given.densities, given.alphas, given.no_tuning, changes]
    is_whole = not any(own) and (given.data is None or Path(given.data).is_dir())
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
    cells = grid(
        {pair: chosen_preset.points(pair[0])[0] for pair in call.pairs},
        methods=methods,
        densities=chosen_preset.densities,
        alphas=chosen_preset.alphas,
        seeds=chosen_preset.seeds,
    )
    # What cannot be is told before a run.
    for cell in [*tuning_cells(chosen_preset, call.pairs), *cells]:
        cell.config({**settings, "training.device": "cpu"})
    if given.table_only and not (given.archive or (out / "outcomes").is_dir()):
        raise ValueError(f"--table-only: there are no runs in {out}")
    check_settings(out, settings)
    return call


def _command(given: argparse.Namespace, seeds: Sequence[int]) -> str:
    parts = [f"python -m simulations.compare_methods --preset {given.preset}"]
    parts += [f"--{name} {value}" for name in ("methods", "densities", "alphas")
              if (value := getattr(given, name))]  # fmt: skip
    parts += [f"--seeds {','.join(map(str, seeds))}"]
    parts += [f"--set {value}" for value in given.set]
    parts += ["--no-tuning"] if given.no_tuning else []
    if given.data:
        parts += [f"--data {'FOLDER' if Path(given.data).is_dir() else given.data}"]
    return " ".join(parts)


def _listed(option: str, text: str | None, read: Callable[[str], T]) -> list[T]:
    """What stands between the commas, each once."""
    parts = [part.strip() for part in text.split(",")] if text else []
    try:
        return list(dict.fromkeys(read(part) for part in parts))
    except ValueError:
        what = "numbers, or iid," if option == "alphas" else "numbers"
        raise ValueError(f"--{option} {text}: expected {what} with commas between") from None


def _alpha(text: str) -> float | None:
    return None if text == "iid" else float(text)


def main() -> None:
    """Run what is missing and write the page."""
    call, given = parse()
    settings = call.preset.settings
    with archived(given.archive, call.out, settings):
        if given.table_only:
            found = compare(call, None)
        else:
            on_gpus = settings.get("training.device") == "cuda"
            with workers_of(given, on_gpus=on_gpus) as workers:
                found = compare(call, workers)
    text = write_page(call, found)
    publish(text, call.saved, found.outcomes.values(), hint="the page says why; ")


if __name__ == "__main__":
    main()
