"""What the simulations of data pruning share: their command line and the page they write."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datapruning.data import ImageSet, load_dataset
from simulations.provenance import commit, machine


@dataclass(frozen=True)
class Preset:
    """Size of an experiment.

    Attributes:
        dataset: a name, replaced by --data.
        num_train, num_test: a stratified subset; None: everything.
        settings: whatever the experiment reads.
    """

    dataset: str
    model: str
    epochs: int
    batch_size: int
    num_train: int | None
    num_test: int | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """What the command line asked for."""

    preset: str
    seeds: Sequence[int]
    out: Path
    data: str | None

    @property
    def command(self) -> str:
        """The options as they are shown; a folder of data stays the user's own."""
        seeds = ",".join(map(str, self.seeds))
        return f"--preset {self.preset} --seeds {seeds}" + (" --data FOLDER" if self.data else "")


def parse(name: str, presets: Sequence[str]) -> Call:
    """The command line of `python -m simulations.NAME`."""
    parser = argparse.ArgumentParser(prog=f"python -m simulations.{name}")
    parser.add_argument("--preset", choices=presets, default="small")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, help="where cells go; default runs/NAME-PRESET")
    parser.add_argument("--data", help="a data set's name, or a folder of parquet")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    out = given.out or Path("runs") / f"{name}-{given.preset}"
    return Call(given.preset, seeds, out, given.data)


def load(preset: Preset, call: Call) -> ImageSet:
    """The data of a preset."""
    return load_dataset(
        call.data or preset.dataset, num_train=preset.num_train, num_test=preset.num_test
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def write_page(
    name: str, title: str, call: Call, preset: Preset, data: ImageSet, *, body: Sequence[str]
) -> Path:
    """Write the saved table of an experiment beside its script; returns its path."""
    suffix = "" if call.preset == "small" else f"_{call.preset}"
    path = Path(__file__).parent / f"{name}{suffix}.md"
    settings = {
        "model": preset.model,
        "epochs": preset.epochs,
        "batch_size": preset.batch_size,
        **preset.settings,
    }
    lines = [
        f"# {title}",
        "",
        f"Written by `python -m simulations.{name} {call.command}`.",
        "",
        f"- commit {commit()}, {machine()}",
        f"- {data.name}: {len(data.train_labels):,} training and {len(data.test_labels):,} test "
        f"samples, fingerprint {data.fingerprint}",
        f"- test accuracy in %, mean ± sample standard deviation over seeds "
        f"{', '.join(map(str, call.seeds))}; the seed decides scores, selection, initial weights "
        "and order; test data were read once a run, at its end, and decided nothing",
        "",
        *body,
        "",
        "Settings:",
        "",
        *[f"- `{key} = {value}`" for key, value in settings.items()],
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
