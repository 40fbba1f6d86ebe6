"""The command line of a grid: from a preset to the page."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from prunelab.errors import PrunelabError
from simulations.jobs import check_settings, parsed, workers_of
from simulations.kept.grid import Plan
from simulations.kept.jobs import data_of
from simulations.kept.steps import Found, run_plan
from simulations.kept.tables import kept_page
from simulations.page import publish

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def main(
    name: str,
    title: str,
    presets: Mapping[str, Plan],
    body: Callable[[Found], list[str]],
    words: Sequence[str] | None = None,
) -> None:
    """Run what is missing of a preset and write its page."""
    parser = argparse.ArgumentParser(prog=f"python -m simulations.{name}")
    parser.add_argument("--preset", choices=list(presets), default="small")
    parser.add_argument("--seeds", help="with commas between; default the preset's")
    parser.add_argument("--data", help="a name or a folder of parquet; default the preset's")
    parser.add_argument("--device", help="cpu or cuda; default the preset's")
    parser.add_argument("--out", type=Path, help="where runs go; default runs/NAME-PRESET")
    if any(plan.teachers for plan in presets.values()):
        parser.add_argument(
            "--teachers", metavar="FOLDER",
            help="of trained ones, NAME.safetensors, instead of our own; they take images "
            "normalised as ImageNet's",
        )  # fmt: skip
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    given = parsed(parser, words)
    try:
        plan = _plan(presets[given.preset], given)
        out = given.out or Path("runs") / f"{name}-{given.preset}"
        if given.table_only and not (out / "outcomes").is_dir():
            raise ValueError(f"--table-only: there are no runs in {out}")
        data = data_of(plan.setting)
        settings = {**plan.shared, "teachers": bool(plan.setting.teachers)}
        check_settings(out, {**settings, "dataset": data.fingerprint})
    except (PrunelabError, ValueError) as error:
        parser.error(str(error))
    if given.table_only:
        found = run_plan(plan, out, None)
    else:
        with workers_of(given, on_gpus=plan.setting.device == "cuda") as workers:
            found = run_plan(plan, out, workers)
    text = kept_page(
        title, found, command=_command(name, given, plan.seeds), body=body(found),
        data=f"{data.name}: {len(data.train_labels):,} training and {len(data.test_labels):,} "
        f"test samples, fingerprint {data.fingerprint}",
    )  # fmt: skip
    suffix = "" if given.preset == "small" else f"_{given.preset}"
    is_own = given.data is None or Path(given.data).is_dir()
    saved = Path(__file__).parents[1] / f"{name}{suffix}.md" if is_own else out / "table.md"
    publish(text, saved, found.outcomes.values(), hint="the page says why; ")


def _plan(plan: Plan, given: argparse.Namespace) -> Plan:
    setting = plan.setting
    if given.data:
        setting = replace(setting, dataset=str(given.data))
    if given.device:
        setting = replace(setting, device=given.device)
    if getattr(given, "teachers", None):
        missing = [t for t in plan.teachers if not _teacher_file(given.teachers, t).exists()]
        if missing:
            raise ValueError(f"--teachers: there is no {_teacher_file(given.teachers, missing[0])}")
        setting = replace(setting, teachers=given.teachers, **IMAGENET)
    seeds = plan.seeds
    if given.seeds:
        try:
            seeds = tuple(dict.fromkeys(int(seed) for seed in given.seeds.split(",")))
        except ValueError:
            raise ValueError(
                f"--seeds {given.seeds}: expected whole numbers, such as 0,1"
            ) from None
    if plan.teachers and set(seeds) & set(plan.tuning_seeds):
        raise ValueError("--seeds: the choice of α has had some of these; take others")
    return replace(plan, setting=setting, seeds=seeds)


def _teacher_file(folder: str, teacher: str) -> Path:
    return Path(folder) / f"{teacher}.safetensors"


def _command(name: str, given: argparse.Namespace, seeds: Sequence[int]) -> str:
    parts = [f"python -m simulations.{name} --preset {given.preset}"]
    parts += [f"--seeds {','.join(map(str, seeds))}"]
    if given.data:
        parts += [f"--data {'FOLDER' if Path(given.data).is_dir() else given.data}"]
    if getattr(given, "teachers", None):
        parts += ["--teachers FOLDER"]
    if given.device:
        parts += [f"--device {given.device}"]
    return " ".join(parts)
