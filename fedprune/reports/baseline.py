"""Was pruning worth it? A run beside the same run without pruning."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.config import METHOD_NAME, RunConfig, read_toml
from fedprune.errors import ConfigError
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


@dataclass(frozen=True)
class Dense:
    """A finished dense run: name of its folder, and its summary."""

    name: str
    summary: Mapping[str, Any]


def dense_run_beside(folder: Path, config: RunConfig) -> Dense | None:
    """The first finished run in a folder beside this one that differs in the method alone.

    Its method is the one that prunes nothing. None where there is no such run, and for such a
    run itself.
    """
    if config.method.name == Method.name:
        return None
    wanted = _but_method(config.flat())
    for path in sorted(folder.resolve().parent.glob(f"*/{CONFIG}")):
        try:
            theirs = read_toml(path) if (path.parent / SUMMARY).is_file() else {}
            if theirs.get(METHOD_NAME) == Method.name and _but_method(theirs) == wanted:
                return Dense(path.parent.name, read_summary(path.parent))
        except (ConfigError, RunError, OSError):
            continue  # some other run, damaged: not this page's business
    return None


def verdict(summary: Mapping[str, Any], dense: Dense | None, *, folder: str) -> Section | None:
    """The section that answers the question, or says how to get an answer.

    Args:
        summary: of the finished run.
        folder: name of its folder.
    """
    if summary["method"] == Method.name:
        return None
    if dense is None:
        return Section(TITLE, _how_to_know(summary, folder), wide=True)
    table = Table(
        ["", summary["method"], f"dense ({Method.name})", "difference"],
        _rows(summary, dense.summary),
        caption=f"The same run without pruning is in the folder {dense.name}.",
    )
    return Section(TITLE, [Text(_sentence(summary, dense.summary)), table], wide=True)


def _sentence(ours: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    measure = Measure.of(ours)
    values = ours.get(measure.key), dense.get(measure.key)
    return (
        f"At density {rounded(ours.get('density'))} the network's {measure.name} on the test data "
        f"is {measure.show(values[0])}, that of the dense one {measure.show(values[1])} "
        f"({measure.difference(*values)}). It sent "
        f"{_part(_both_ways(ours), _both_ways(dense))} of the dense run's bytes, took "
        f"{_part(ours.get('train_flops_ratio'), dense.get('train_flops_ratio'))} of its training "
        f"FLOPs, and a client held {_part(ours.get('state_bytes'), dense.get('state_bytes'))} of "
        "its training state. This is one seed: the compare command shows the spread over several."
    )


def _rows(ours: Mapping[str, Any], dense: Mapping[str, Any]) -> list[Sequence[str]]:
    measure = Measure.of(ours)
    sizes = {
        "upload / client / round": ("bytes_up_steady_round", format_bytes),
        "download / client / round": ("bytes_down_steady_round", format_bytes),
        "upload, whole run": ("bytes_up", format_bytes),
        "download, whole run": ("bytes_down", format_bytes),
        "training FLOPs, of dense": ("train_flops_ratio", percent),
        "training state of a client": ("state_bytes", format_bytes),
        "time": ("seconds", format_seconds),
    }
    judged = ours.get(measure.key), dense.get(measure.key)
    rows: list[Sequence[str]] = [
        (f"test {measure.name}", *map(measure.show, judged), measure.difference(*judged))
    ]
    for label, (key, show) in sizes.items():
        values = ours.get(key), dense.get(key)
        rows.append((label, *map(show, values), f"{_part(*values)} of dense"))
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
