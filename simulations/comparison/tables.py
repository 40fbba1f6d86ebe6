"""The page's sections: gap to dense, a table for each alpha and density, frontiers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from prunelab.pages.units import NOTHING, format_bytes, format_seconds, mean_and_spread
from simulations.comparison.cells import Pair, point_name
from simulations.comparison.results import (
    COSTS,
    DENSE,
    Group,
    Key,
    difference,
    extremes,
    shown_at,
)
from simulations.page import table
from simulations.statistics import Interval, frontier, seeds_needed

OURS = ("fedtiny", "fedtiny-plus")
WIDTH = 2.0
"""Points: an interval narrower than this says enough where it holds zero."""
Memory = Mapping[Pair, float]


def gap_section(found: Mapping[Key, Group]) -> list[str]:
    """How far pruned networks are below dense ones: without a gap nothing can be told."""
    header = ["alpha", "density", "dense, %", "best method", "dense minus best"]
    header += ["worst method", "dense minus worst", "gap"]
    rows = []
    for alpha, density in _tables(found):
        shown = shown_at(found, alpha=alpha, density=density)
        dense, ends = shown.get(DENSE), extremes(shown)
        if dense is None or not ends:
            continue
        gaps = [difference(dense, shown[name]) for name in ends]
        cells = [text for name, gap in zip(ends, gaps, strict=True) for text in (name, _told(gap))]
        widest = gaps[-1]
        has_gap = widest is not None and widest.verdict == "above"
        accuracy = mean_and_spread(dense.accuracies.values(), ".1f")
        told = "yes" if has_gap else "one seed" if _is_single(widest) else "not shown"
        rows.append([alpha_name(alpha), f"{density:g}", accuracy, *cells, told])
    return [
        "## Gap to dense",
        "",
        f"Dense averaging ({DENSE}) minus the best and the worst method of each table, in points "
        "with 95 % intervals. Where there is no gap, no method can be told from another: what "
        "limits the accuracy is then not the pruning.",
        "",
        table(header, rows, words=(3, 5, 7)) if rows else f"Not known: no run of {DENSE} yet.",
    ]


def best_rival_section(found: Mapping[Key, Group]) -> list[str]:
    """Ours against the rival of the highest mean, where there are both."""
    header = ["alpha", "density", "ours", "best rival", "points", "95 % interval", "seeds"]
    header += ["verdict"]
    rows = []
    for alpha, density in _tables(found):
        shown = shown_at(found, alpha=alpha, density=density)
        rivals = {
            method: group
            for method, group in shown.items()
            if group.accuracies
            and (method, density, alpha) in found
            and not method.startswith(OURS[0])
        }
        if not rivals:
            continue
        best = max(rivals, key=lambda method: rivals[method].mean)
        for ours in OURS:
            if ours in shown:
                told = _row(difference(shown[ours], rivals[best]))
                rows.append([alpha_name(alpha), f"{density:g}", ours, best, *told[:3], told[4]])
    if not rows:
        return []
    return [
        "",
        "## Against the best rival",
        "",
        "Rivals are the other methods of the same density; the best is the one of the highest "
        "mean on these seeds, which favours it.",
        "",
        table(header, rows, words=(2, 3, 7)),
    ]


def method_sections(found: Mapping[Key, Group]) -> list[str]:
    """For each alpha and density: every method, and ours against each."""
    lines = []
    for alpha, density in _tables(found):
        shown = shown_at(found, alpha=alpha, density=density)
        lines += ["", f"## {alpha_words(alpha)}, density {density:g}", "", _methods(shown)]
        for ours in OURS:
            if ours in shown:
                lines += ["", f"{ours} minus each rival, paired by seed:", ""]
                lines += [_against(shown, ours)]
    return lines


def frontier_sections(found: Mapping[Key, Group], memory: Memory, *, clients: int) -> list[str]:
    """For each alpha: accuracy against what a client pays."""
    header = ["method", "density", "accuracy, %", "bytes", "processor time", "peak memory"]
    lines = [
        "",
        "## Frontiers",
        "",
        "What one client pays in a whole run: bytes sent and received; measured processor time of "
        "all its answers; measured largest resident memory of a client's process. A • marks the "
        "frontier: no other row costs no more and is at least as accurate.",
    ]
    for alpha in dict.fromkeys(at for _, _, at in found):
        rows = {key: group for key, group in found.items() if key[2] == alpha and group.accuracies}
        costs = {
            what: [_cost(what, key, group, memory, clients) for key, group in rows.items()]
            for what in COSTS
        }
        marks = {what: _marks(costs[what], [g.mean for g in rows.values()]) for what in COSTS}
        forms = {"bytes": format_bytes, "seconds": _duration, "memory": format_bytes}
        body = []
        for place, ((method, density, _), group) in enumerate(rows.items()):
            cells = [f"{forms[w](costs[w][place])}{marks[w][place]}" for w in COSTS]
            accuracy = mean_and_spread(group.accuracies.values(), ".1f")
            body.append([method, _density(density, group), accuracy, *cells])
        lines += ["", f"{alpha_words(alpha)}:", "", table(header, body)]
    return lines


def alpha_name(alpha: float | None) -> str:
    """As on the command line."""
    return "iid" if alpha is None else f"{alpha:g}"


def alpha_words(alpha: float | None) -> str:
    """As in a heading."""
    return "IID" if alpha is None else f"Dirichlet {alpha:g}"


def _tables(found: Mapping[Key, Group]) -> list[tuple[float | None, float]]:
    """Alphas and densities, each in the order given."""
    alphas = dict.fromkeys(alpha for _, _, alpha in found)
    densities = dict.fromkeys(density for _, density, _ in found if density is not None)
    return [(alpha, density) for alpha in alphas for density in densities]


def _methods(shown: Mapping[str, Group]) -> str:
    header = ["method", "density", "accuracy, %", "seeds", "settings", "diverged", "failed"]
    ends = extremes(shown)
    rows = []
    for method, group in shown.items():
        accuracy = mean_and_spread(group.accuracies.values(), ".1f")
        best = bool(ends) and method == ends[0]
        rows.append(
            [
                method,
                f"{group.density:.4f}" if group.values else NOTHING,
                f"**{accuracy}**" if best else accuracy,
                str(len(group.accuracies)),
                point_name(group.point),
                _count(group.diverged),
                _count(group.failed),
            ]
        )
    return table(header, rows, words=(0, 4))


def _against(shown: Mapping[str, Group], ours: str) -> str:
    header = ["rival", "points", "95 % interval", "seeds", f"seeds for {WIDTH:g} points", "verdict"]
    rows = []
    for rival, group in shown.items():
        if rival in (ours, DENSE):
            continue
        rows.append([rival, *_row(difference(shown[ours], group))])
    return table(header, rows, words=(0, 5))


def _row(found: Interval | None) -> list[str]:
    """Points, interval, seeds, seeds needed and verdict."""
    if found is None:
        return [NOTHING, NOTHING, "0", NOTHING, "no pair of runs"]
    needed = seeds_needed(found.spread, width=WIDTH)
    return [
        f"{found.mean:+.1f}",
        _bounds(found),
        str(found.count),
        NOTHING if needed is None else str(needed),
        "one seed" if _is_single(found) else found.verdict,
    ]


def _told(found: Interval | None) -> str:
    return NOTHING if found is None else f"{found.mean:+.1f} {_bounds(found)}"


def _bounds(found: Interval) -> str:
    if math.isinf(found.half):
        return NOTHING
    return f"[{found.mean - found.half:+.1f}, {found.mean + found.half:+.1f}]"


def _is_single(found: Interval | None) -> bool:
    return found is not None and found.count == 1


def _cost(what: str, key: Key, group: Group, memory: Memory, clients: int) -> float | None:
    if what == "memory":
        return memory.get(key[:2])
    return group.cost(what, clients=clients)


def _marks(costs: Sequence[float | None], gains: Sequence[float]) -> list[str]:
    """A mark behind each cost on the frontier of those that are known."""
    known = [place for place, cost in enumerate(costs) if cost is not None]
    on = frontier([costs[place] or 0.0 for place in known], [gains[place] for place in known])
    marked = {place for place, is_on in zip(known, on, strict=True) if is_on}
    return [" •" if place in marked else "" for place in range(len(costs))]


def _duration(seconds: float | None) -> str:
    """With three digits where it is short."""
    return format_seconds(seconds) if seconds is None or seconds >= 10 else f"{seconds:.3g} s"


def _density(density: float | None, group: Group) -> str:
    return f"{group.density:.4g}" if density is None else f"{density:g}"


def _count(seeds: Iterable[int]) -> str:
    return str(len(list(seeds)) or "")
