"""Outcomes of cells by method, density and alpha: accuracies by seed, costs of a client."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from simulations.comparison.cells import Cell, Point
from simulations.jobs import FAILED, FINISHED, Outcome
from simulations.statistics import Interval, interval

DENSE = "fedavg"
COSTS = ("bytes", "seconds", "memory")
Key = tuple[str, float | None, float | None]
"""Method, density (None: its own), alpha (None: IID)."""


@dataclass
class Group:
    """The runs of a method at a density and an alpha.

    Attributes:
        accuracies: of the finished ones, in percent, by seed.
        values: of the same, what their summaries say.
        diverged, failed: seeds.
    """

    point: Point
    accuracies: dict[int, float] = field(default_factory=dict)
    values: list[Mapping[str, Any]] = field(default_factory=list)
    diverged: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Accuracy over the finished runs."""
        return statistics.mean(self.accuracies.values())

    @property
    def density(self) -> float:
        """Of the final models."""
        return float(statistics.mean(value["density"] for value in self.values))

    def cost(self, what: str, *, clients: int) -> float | None:
        """What a run costs one client: "bytes" both ways, or processor "seconds"."""
        keys = {"bytes": ("bytes_up", "bytes_down"), "seconds": ("client_seconds",)}[what]
        sums = [[value[key] for key in keys] for value in self.values]
        if any(None in one for one in sums):
            return None
        return statistics.mean(map(sum, sums)) / clients


def groups(cells: Iterable[Cell], outcomes: Mapping[str, Outcome]) -> dict[Key, Group]:
    """Cells that have an outcome, together where only the seed differs, in order."""
    result: dict[Key, Group] = {}
    for cell in cells:
        outcome = outcomes.get(cell.name)
        if outcome is None:
            continue
        group = result.setdefault((cell.method, cell.density, cell.alpha), Group(cell.point))
        if outcome.status == FINISHED:
            group.accuracies[cell.seed] = 100 * outcome.values["test_accuracy"]
            group.values.append(outcome.values)
        else:
            (group.failed if outcome.status == FAILED else group.diverged).append(cell.seed)
    return result


def difference(ours: Group, theirs: Group) -> Interval | None:
    """Ours minus theirs in points, paired by the seeds that both finished; None without any."""
    seeds = sorted(ours.accuracies.keys() & theirs.accuracies.keys())
    pairs = [ours.accuracies[seed] - theirs.accuracies[seed] for seed in seeds]
    return interval(pairs) if pairs else None


def shown_at(
    found: Mapping[Key, Group], *, alpha: float | None, density: float
) -> dict[str, Group]:
    """Finished methods that stand in the table of a density: its own, and those without one."""
    return {
        method: group
        for (method, own, at), group in found.items()
        if at == alpha and own in (None, density)
    }


def extremes(table: Mapping[str, Group]) -> Sequence[str]:
    """The best and the worst method of a table, dense averaging left out."""
    named = [name for name, group in table.items() if name != DENSE and group.accuracies]
    ranked = sorted(named, key=lambda name: -table[name].mean)
    return ranked[:1] + ranked[-1:]
