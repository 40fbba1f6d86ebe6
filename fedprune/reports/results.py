"""The results of runs as people read them: numbers with units, and tables of plain text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from prunelab.pages.page import Fact
from prunelab.pages.units import (
    NOTHING,
    format_bytes,
    format_seconds,
    known_number,
    mean_and_spread,
    percent,
    rounded,
)


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of each result in a summary.json, for people; what is missing is a dash."""
    return [(fact.label, fact.line) for fact in facts(summary)]


def comparison_table(summaries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """One row for each method and target density, in the order of their first run.

    Args:
        summaries: contents of summary.json of runs on one data set and model.

    Returns:
        Header and rows. Accuracy is the mean over the runs, with the sample standard deviation
        where there are at least two; other columns are means. A value that one of the runs
        lacks is a dash, never the mean of the others.
    """
    header = ["method", "density", "seeds", "accuracy, %", "up / client / round"]
    header += ["down / client / round", "FLOPs of dense", "training state", "time"]
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for summary in summaries:
        key = (summary["method"], summary["density_target"])
        groups.setdefault(key, []).append(summary)
    rows = []
    for (method, _), group in groups.items():
        flops = _mean(group, "train_flops_ratio")
        rows.append(
            [
                method,
                rounded(_mean(group, "density")),
                str(len(group)),
                mean_and_spread((s.get("test_accuracy") for s in group), scale=100),
                format_bytes(_mean(group, "bytes_up_steady_round")),
                format_bytes(_mean(group, "bytes_down_steady_round")),
                rounded(flops, ".3f"),
                format_bytes(_mean(group, "state_bytes")),
                format_seconds(_mean(group, "seconds")),
            ]
        )
    return header, rows


def facts(summary: Mapping[str, Any]) -> list[Fact]:
    """Each result; a value that is not known is a dash with no note."""
    dense = summary.get("bytes_dense_round")
    up, down = summary.get("bytes_up_steady_round"), summary.get("bytes_down_steady_round")
    state, target = summary.get("state_bytes"), summary.get("density_target")
    rounds = summary.get("rounds")
    results = [
        (
            "test accuracy",
            percent(summary.get("test_accuracy")),
            f"after round {rounds}" if rounds else "",
        ),
        (
            "density",
            rounded(summary.get("density")),
            "" if target is None else "dense" if target == 1 else f"target {rounded(target)}",
        ),
        ("upload / client / round", format_bytes(up), _share(up, dense)),
        ("download / client / round", format_bytes(down), _share(down, dense)),
        ("upload, whole run", format_bytes(summary.get("bytes_up")), "all clients"),
        ("download, whole run", format_bytes(summary.get("bytes_down")), "all clients"),
        ("training FLOPs", percent(summary.get("train_flops_ratio")), "of dense training"),
        ("training state", format_bytes(state), _share(state, summary.get("state_bytes_dense"))),
        ("peak memory", format_bytes(summary.get("peak_rss_bytes")), "resident set"),
        ("time", format_seconds(summary.get("seconds")), ""),
    ]
    return [Fact(label, value, "" if value == NOTHING else note) for label, value, note in results]


def _mean(group: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [known_number(summary.get(key)) for summary in group]
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) else None


def _share(value: Any, dense: Any) -> str:
    part, whole = known_number(value), known_number(dense)
    if part is None or not whole:
        return ""
    return f"{100 * part / whole:.3g} % of {format_bytes(whole)} dense"
