"""The command line that the simulations of data pruning share, and where their page goes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prunelab.data.datasets import ImageSet, load_dataset


@dataclass(frozen=True)
class Call:
    """What the command line asked for."""

    name: str
    preset: str
    seeds: Sequence[int]
    out: Path
    data: str | None
    threads: int

    @property
    def has_folder(self) -> bool:
        """Whether --data is a folder of the user's own."""
        return self.data is not None and Path(self.data).is_dir()

    @property
    def command(self) -> str:
        """The command as a page shows it; a folder of data stays the user's own."""
        seeds = ",".join(map(str, self.seeds))
        text = f"python -m simulations.{self.name} --preset {self.preset} --seeds {seeds}"
        if self.data is None:
            return text
        return f"{text} --data {'FOLDER' if self.has_folder else self.data}"

    def load(self, dataset: str, *, num_train: int | None, num_test: int | None) -> ImageSet:
        """A stratified subset (None: everything) of --data, or else of the preset's `dataset`."""
        return load_dataset(self.data or dataset, num_train=num_train, num_test=num_test)

    def save(self, page: str) -> Path:
        """Write the page: on the preset's own data beside the script, else among the cells."""
        suffix = "" if self.preset == "small" else f"_{self.preset}"
        beside = Path(__file__).parent / f"{self.name}{suffix}.md"
        target = beside if self.data is None else self.out / "table.md"
        target.write_text(page, encoding="utf-8")
        print(page)
        print(f"table: {target}")
        return target


def parse(name: str, presets: Sequence[str]) -> Call:
    """The command line of `python -m simulations.NAME`; torch gets its threads."""
    parser = argparse.ArgumentParser(prog=f"python -m simulations.{name}")
    parser.add_argument("--preset", choices=presets, default="small")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--data", help="a data set's name or a folder of parquet; else the preset's"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, help="where cells go; default runs/NAME-PRESET")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    out = given.out or Path("runs") / f"{name}-{given.preset}"
    return Call(name, given.preset, seeds, out, given.data, given.threads)
