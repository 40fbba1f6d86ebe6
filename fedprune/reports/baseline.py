"""Was pruning worth it? A run beside the same run without pruning."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.config import METHOD_NAME, RunConfig, read_toml
from fedprune.errors import ConfigError
from fedprune.methods import BASELINES
from fedprune.methods.base import Method
from fedprune.reports.results import Measure
from fedprune.rounds.folder import CONFIG, FREE_ON_RESUME, REPORT, SUMMARY, read_summary
from prunelab.errors import RunError
from prunelab.pages.page import Command, Part, Section, Table, Text
from prunelab.pages.units import (
    NOTHING,
    format_bytes,
    format_seconds,
    known_number,
    percent,
    rounded,
)

TITLE = "Was pruning worth it?"
ONE_SEED = "This is one seed: the compare command shows the spread over several."


@dataclass(frozen=True)
class Beside:
    """A finished run that another is compared with: name of its folder, and its summary."""

    name: str
    summary: Mapping[str, Any]

    @property
    def is_dense(self) -> bool:
        """Whether it pruned nothing."""
        return bool(self.summary["method"] == Method.name)

    @property
    def label(self) -> str:
        """What its method is called here."""
        return f"dense ({Method.name})" if self.is_dense else str(self.summary["method"])


def runs_beside(folder: Path, config: RunConfig) -> list[Beside]:
    """The first finished run of each of BASELINES in a folder beside this one.

    It differs from this one in the method alone, and has its density if it prunes. Nothing for a
    dense run, and none of this run's own method.
    """
    if config.method.name == Method.name:
        return []
    wanted, density = _but_method(config.flat()), config.method.target_density
    found: dict[str, Beside] = {}
    for path in sorted(folder.resolve().parent.glob(f"*/{CONFIG}")):
        try:
            theirs = read_toml(path) if (path.parent / SUMMARY).is_file() else {}
            name = theirs.get(METHOD_NAME)
            if name not in BASELINES or name in found or name == config.method.name:
                continue
            if theirs.get("method.density", density) == density and _but_method(theirs) == wanted:
                found[name] = Beside(path.parent.name, read_summary(path.parent))
        except (ConfigError, RunError, OSError):
            continue  # some other run, damaged: not this page's business
    return [found[name] for name in BASELINES if name in found]


def verdict(summary: Mapping[str, Any], beside: Sequence[Beside], *, folder: str) -> Section | None:
    """The section that answers the question, or says how to get an answer.

    Args:
        summary: of the finished run.
        beside: what `runs_beside` found.
        folder: name of its folder.
    """
    if summary["method"] == Method.name:
        return None
    parts: list[Part] = []
    for other in beside:
        parts += [Text(_sentence(summary, other)), _table(summary, other)]
    if not any(other.is_dense for other in beside):
        parts += _how_to_know(summary, folder)
    elif beside:
        parts.append(Text(ONE_SEED, is_note=True))
    return Section(TITLE, parts, wide=True)


def _table(ours: Mapping[str, Any], other: Beside) -> Table:
    what = "without pruning" if other.is_dense else f"by method {other.label}"
    return Table(
        ["", ours["method"], other.label, "difference"],
        _rows(ours, other),
        caption=f"The same run {what} is in the folder {other.name}.",
    )


def _sentence(ours: Mapping[str, Any], other: Beside) -> str:
    measure, theirs = Measure.of(ours), other.summary
    values = ours.get(measure.key), theirs.get(measure.key)
    difference = measure.difference(*values)
    if not other.is_dense:
        return (
            f"Method {other.label}, at the same density, came to {measure.show(values[1])}: "
            f"{ours['method']} is {difference}. It sent "
            f"{_part(_both_ways(ours), _both_ways(theirs))} of the bytes of {other.label}."
        )
    return (
        f"At density {rounded(ours.get('density'))} the network's {measure.name} on the test data "
        f"is {measure.show(values[0])}, that of the dense one {measure.show(values[1])} "
        f"({difference}). It sent "
        f"{_part(_both_ways(ours), _both_ways(theirs))} of the dense run's bytes, took "
        f"{_part(ours.get('train_flops_ratio'), theirs.get('train_flops_ratio'))} of its training "
        f"FLOPs, and a client held {_part(ours.get('state_bytes'), theirs.get('state_bytes'))} of "
        "its training state."
    )


def _rows(ours: Mapping[str, Any], other: Beside) -> list[Sequence[str]]:
    measure, theirs = Measure.of(ours), other.summary
    sizes = {
        "upload / client / round": ("bytes_up_steady_round", format_bytes),
        "download / client / round": ("bytes_down_steady_round", format_bytes),
        "upload, whole run": ("bytes_up", format_bytes),
        "download, whole run": ("bytes_down", format_bytes),
        "training FLOPs, of dense": ("train_flops_ratio", percent),
        "training state of a client": ("state_bytes", format_bytes),
        "time": ("seconds", format_seconds),
    }
    judged = ours.get(measure.key), theirs.get(measure.key)
    rows: list[Sequence[str]] = [
        (f"test {measure.name}", *map(measure.show, judged), measure.difference(*judged))
    ]
    whole = "dense" if other.is_dense else other.label
    for label, (key, show) in sizes.items():
        values = ours.get(key), theirs.get(key)
        rows.append((label, *map(show, values), f"{_part(*values)} of {whole}"))
    return rows


def _how_to_know(summary: Mapping[str, Any], folder: str) -> list[Part]:
    before = "No dense run of the same settings lies beside this one. "
    if "@" in f"{summary['dataset']}{summary['model']}":
        return [  # objects of a Python program, which no command has
            Text(
                f'{before}The same call of fedprune.run with method="{Method.name}" and a folder '
                f"beside this one makes it; fedprune report {folder} then compares the two."
            )
        ]
    name = shlex.quote(folder)
    return [
        Text(f"{before}Two commands, in the folder that {folder} lies in, make it and compare:"),
        Command(
            f"fedprune run --config {name}/{CONFIG} --method {Method.name} --engine inline "
            f"--out {shlex.quote(f'{folder}-dense')}\nfedprune report {name}"
        ),
        Text(f"Then open {REPORT} again.", is_note=True),
    ]


def _but_method(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in values.items()
        if not key.startswith("method.") and key not in FREE_ON_RESUME
    }


def _both_ways(summary: Mapping[str, Any]) -> float | None:
    up, down = known_number(summary.get("bytes_up")), known_number(summary.get("bytes_down"))
    return None if up is None or down is None else up + down


def _part(ours: Any, dense: Any) -> str:
    """ours / dense in per cent."""
    part, whole = known_number(ours), known_number(dense)
    return NOTHING if part is None or not whole else f"{100 * part / whole:.3g} %"
