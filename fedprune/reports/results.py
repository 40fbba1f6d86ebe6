"""The results of runs as people read them: numbers with units, and tables of plain text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        Header and rows. Accuracy, or what else the task is judged by, is the mean over the runs,
        with the sample standard deviation where there are at least two; other columns are means. A
        value that one of the runs lacks is a dash, never the mean of the others.
    """
    measure = Measure.of(summaries[0]) if summaries else Measure.of({})
    judged = f"{measure.name}, %" if measure.is_share else measure.name
    header = ["method", "density", "seeds", judged, "up / client / round"]
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
                mean_and_spread(
                    (s.get(measure.key) for s in group), scale=100 if measure.is_share else 1
                ),
                format_bytes(_mean(group, "bytes_up_steady_round")),
                format_bytes(_mean(group, "bytes_down_steady_round")),
                rounded(flops, ".3f"),
                format_bytes(_mean(group, "state_bytes")),
                format_seconds(_mean(group, "seconds")),
            ]
        )
    return header, rows


@dataclass(frozen=True)
class Measure:
    """What a model is judged by on test data.

    Attributes:
        name: in words: "accuracy", another metric of the task, or "loss" where it has none.
        key: in summary.json, and in the lines of metrics.jsonl.
    """

    name: str
    key: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Measure:
        """That of a summary, or of the line of a round.

        >>> Measure.of({"metric": "mae"})
        Measure(name='mae', key='test_metric')
        """
        metric = values.get("metric", ACCURACY)
        if metric == ACCURACY:
            return cls(ACCURACY, "test_accuracy")
        return cls(metric, "test_metric") if metric else cls("loss", "test_loss")

    @property
    def is_share(self) -> bool:
        """Whether it is a part of the samples, and shown in per cent."""
        return self.name == ACCURACY

    def show(self, value: Any) -> str:
        """A value of it, in words."""
        return percent(value) if self.is_share else rounded(value)

    def difference(self, ours: Any, other: Any) -> str:
        """How far ours is from another's."""
        one, two = known_number(ours), known_number(other)
        if one is None or two is None:
            return NOTHING
        gap = round(100 * (one - two), 2) if self.is_share else one - two
        if not gap:
            return "as good" if self.is_share else "the same"
        size = f"{abs(gap):.2f} points" if self.is_share else rounded(abs(gap))
        return f"{size} {'more' if gap > 0 else 'less'}"


ACCURACY = "accuracy"
TEST_KEYS = ("test_accuracy", "test_metric", "test_loss")


def facts(summary: Mapping[str, Any]) -> list[Fact]:
    """Each result; a value that is not known is a dash with no note."""
    dense = summary.get("bytes_dense_round")
    up, down = summary.get("bytes_up_steady_round"), summary.get("bytes_down_steady_round")
    state, target = summary.get("state_bytes"), summary.get("density_target")
    rounds, measure = summary.get("rounds"), Measure.of(summary)
    results = [
        (
            f"test {measure.name}",
            measure.show(summary.get(measure.key)),
            f"after round {rounds}" if rounds else "",
        ),
        ("density", rounded(summary.get("density")), _aim(summary.get("density"), target)),
        ("upload / client / round", format_bytes(up), _share(up, dense)),
        ("download / client / round", format_bytes(down), _share(down, dense)),
        ("upload, whole run", format_bytes(summary.get("bytes_up")), "all clients"),
        ("download, whole run", format_bytes(summary.get("bytes_down")), "all clients"),
        ("training FLOPs", percent(summary.get("train_flops_ratio")), "of dense training"),
        ("training state", format_bytes(state), _share(state, summary.get("state_bytes_dense"))),
        ("peak memory", format_bytes(summary.get("peak_rss_bytes")), "resident set"),
        ("time", format_seconds(summary.get("seconds")), ""),
    ]
    if "epsilon" in summary:
        spent = rounded(summary["epsilon"])
        results.append(("epsilon of a client", spent, f"at delta {summary['delta']:g}"))
    return [Fact(label, value, "" if value == NOTHING else note) for label, value, note in results]


def _mean(group: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [known_number(summary.get(key)) for summary in group]
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) else None


def _aim(density: Any, target: Any) -> str:
    """What a density is to be compared with; a mask may be sparse without a density to reach."""
    if target is None:
        return ""
    return "dense" if density == 1 else "" if target == 1 else f"target {rounded(target)}"


def _share(value: Any, dense: Any) -> str:
    part, whole = known_number(value), known_number(dense)
    if part is None or not whole:
        return ""
    return f"{100 * part / whole:.3g} % of {format_bytes(whole)} dense"
