"""Rows of a benchmark: one shape for tables, JSON lines and plots."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from benchmarks.plot import draw
from benchmarks.timing import Neighbours, machine


@dataclass(frozen=True)
class Row:
    """Ours beside a peer's in one case; both in `unit`, less is better.

    `case` says what is measured and, after a comma, which way of ours.
    """

    bench: str
    case: str
    density: float
    ours: float
    peer: float
    peer_name: str
    unit: str

    @property
    def ratio(self) -> float:
        """How many times better ours is; NaN where ours is 0, such as a count of mistakes."""
        return self.peer / self.ours if self.ours else math.nan

    def as_json(self) -> str:
        """One line with every field and the ratio."""
        return json.dumps({**asdict(self), "ratio": self.ratio})

    def as_line(self) -> str:
        """One line of a table."""
        return (
            f"{self.case:<44} d={self.density:<5g} {self.ours:>9.3f} {self.unit:<3} "
            f"{self.ratio:8.2f} x  {self.peer_name} ({self.peer:.3f} {self.unit})"
        )


def add_arguments(parser: argparse.ArgumentParser, *, quick: str) -> None:
    """What all benchmarks of the sparse core understand; `quick` says what --quick leaves out."""
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ratios over the density")
    parser.add_argument("--threads", type=int, help="threads of all sides; default: torch's own")


def add_timing_arguments(parser: argparse.ArgumentParser) -> None:
    """What benchmarks that time understand beside."""
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="time the processor instead of the wall, on a busy machine; needs --threads 1",
    )


def show(rows: Iterable[Row], arguments: argparse.Namespace, *, native: bool = True) -> list[Row]:
    """Print rows as they come, then draw them if that was asked for; `native` as of `machine`."""
    notes, neighbours = sys.stderr if arguments.json else sys.stdout, Neighbours()
    clock = ", processor time" if getattr(arguments, "processor_time", False) else ""
    print(f"# {machine(native=native)}{clock}", file=notes, flush=True)
    shown: list[Row] = []
    for row in rows:
        print(row.as_json() if arguments.json else row.as_line(), flush=True)
        shown.append(row)
    print(f"# other processes took {neighbours.share():.0%} of the processors", file=notes)
    if arguments.plot:
        draw(arguments.plot, _curves(shown))
    return shown


def _curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """For each case and peer its (density, ratio) points."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(f"{row.case} / {row.peer_name}", []).append((row.density, row.ratio))
    return curves
