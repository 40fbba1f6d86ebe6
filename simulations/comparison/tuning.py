"""Tuning: the same number of runs for every method, on other seeds and on development data."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simulations.comparison.cells import Cell, Pair, Point, point_name
from simulations.comparison.presets import TUNING_ALPHA, Preset
from simulations.jobs import FINISHED, Outcome
from sparsemodel.storage.files import write_atomically

LOG = "tuning.json"


@dataclass(frozen=True)
class Tried:
    """A point and what came of it on each tuning seed: an accuracy, or None where it diverged."""

    point: Point
    scores: Sequence[float | None]

    @property
    def score(self) -> float | None:
        """The mean; None where a run diverged."""
        known = [score for score in self.scores if score is not None]
        return statistics.mean(known) if len(known) == len(self.scores) else None


def tuning_cells(preset: Preset, pairs: Sequence[Pair]) -> list[Cell]:
    """Every run of the tuning, seed by seed."""
    return [
        Cell(method, density, TUNING_ALPHA, seed, point, tuning=True)
        for seed in preset.tuning_seeds
        for method, density in pairs
        for point in preset.points(method)
    ]


def tried(
    preset: Preset, method: str, density: float | None, outcomes: Mapping[str, Outcome]
) -> list[Tried] | None:
    """What tuning found of a method at a density; None: not all of its runs have ended."""
    result = []
    for point in preset.points(method):
        scores: list[float | None] = []
        for seed in preset.tuning_seeds:
            name = Cell(method, density, TUNING_ALPHA, seed, point, tuning=True).name
            outcome = outcomes.get(name)
            if outcome is None or not outcome.is_final:
                return None
            scores.append(outcome.values["test_accuracy"] if outcome.status == FINISHED else None)
        result.append(Tried(point, scores))
    return result


def chosen(found: Sequence[Tried]) -> Point | None:
    """The point of the best score, of equal ones the first; None where every one diverged."""
    best: Tried | None = None
    for one in found:
        if one.score is not None and (best is None or one.score > (best.score or 0.0)):
            best = one
    return None if best is None else best.point


def write_log(out: Path, log: Mapping[Pair, Sequence[Tried]]) -> None:
    """Bring tuning.json up to date: every tried point, its scores by seed, whether it won."""
    file = out / LOG
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    lines = [line for line in known if (line["method"], line["density"]) not in log]
    for (method, density), found in log.items():
        winner = chosen(found)
        points = [
            {
                "point": dict(one.point),
                "scores": list(one.scores),
                "score": one.score,
                "chosen": one.point == winner,
            }
            for one in found
        ]
        lines.append({"method": method, "density": density, "tried": points})
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(lines, indent=1).encode())


def tuning_rows(log: Mapping[Pair, Sequence[Tried]]) -> list[list[str]]:
    """A row for each method and density: what was tried, its score in percent, the winner bold."""
    rows = []
    for (method, density), found in log.items():
        winner = chosen(found)
        cells = [_shown(one, won=one.point == winner) for one in found]
        ends = {found[0].point: "the lowest", found[-1].point: "the highest"}
        shown = "own" if density is None else f"{density:g}"
        rows.append([method, shown, "; ".join(cells), ends.get(winner, "") if winner else ""])
    return rows


def _shown(one: Tried, *, won: bool) -> str:
    score = "diverged" if one.score is None else f"{100 * one.score:.1f}"
    text = f"{point_name(one.point)}: {score}"
    return f"**{text}**" if won else text
