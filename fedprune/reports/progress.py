"""A run as the command shows it while it goes: lines that fit 80 columns, one a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedprune.config import RunConfig
from fedprune.reports.results import Measure
from fedprune.rounds.folder import read_metrics
from fedprune.rounds.population import totals
from prunelab.pages.console import console, errors, escaped, say
from prunelab.pages.units import format_bytes, format_seconds, known_number

RECENT = 6  # rounds whose mean time tells what is left


class Watch:
    """Shows what comes to a run's metrics.jsonl; every call looks for new lines.

    Clients that were left out are warnings, however the rest is shown.

    Args:
        show: is given each new line; by default it is printed.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        *,
        show: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._folder, self._config = folder, config
        self._show = show or self._print
        self._num_shown = 0
        self._now = 0.0
        self._marks: list[tuple[float, int]] = []  # when rounds were seen to be complete

    def heading(self) -> None:
        """Say what runs and where, and what was made of what the settings leave open."""
        config, data = self._config, self._config.data
        say(
            f"{config.method.name} on {Path(config.data.dataset).name}, {config.model_name}, "
            f"{config.data.clients} clients, {config.training.rounds} rounds"
        )
        used = config.method.used(config.training.rounds)
        known = {"dirichlet": f", alpha={data.alpha:g}",
                 "pathological": f", classes_per_client={data.classes_per_client}"}  # fmt: skip
        for text in (
            f"method: {', '.join(f'{key}={value}' for key, value in used.items())}" * bool(used),
            f"division: {data.partition}{known.get(data.partition, '')}; "
            f"device: {config.training.device}; seed: {config.seed}",
        ):
            if text:
                console.print(escaped(text), highlight=False)  # wrapped at words
        say(f"folder: {self._folder}")

    def __call__(self) -> None:
        fresh = read_metrics(self._folder)[self._num_shown :]
        self._now = time.monotonic()
        for line in fresh:
            self._show(line)
            for skipped in line.get("skipped", []):
                errors.print(
                    f"[yellow]warning:[/yellow] round {line.get('round', 0)}: client "
                    f"{skipped['client']} left out: {escaped(skipped['reason'])}",
                    soft_wrap=True,
                )
        # Of several rounds at once the last; those that were there before were no time in coming.
        rounds = [int(line["round"]) for line in fresh if is_round(line)]
        if rounds and self._num_shown:
            self._marks = [*self._marks[-RECENT + 1 :], (self._now, rounds[-1])]
        self._num_shown += len(fresh)

    def _print(self, line: Mapping[str, Any]) -> None:
        if line.get("event") == "start":
            say(start_line(line))
            if line.get("no_program"):
                # Wrapped at words: the reason may be long.
                console.print(
                    escaped(
                        "clients compute by torch modules, which takes torch and more memory: "
                        f"{line['no_program']}"
                    ),
                    highlight=False,
                )
        elif is_round(line):
            say(round_line(line, rounds=self._config.training.rounds, left=self._left(line)))

    def _left(self, line: Mapping[str, Any]) -> float | None:
        """Seconds that the other rounds will take; None before that can be said."""
        number = int(line["round"])
        if not self._marks or number <= self._marks[0][1]:
            return None
        began, first = self._marks[0]
        each = (self._now - began) / (number - first)
        return each * (self._config.training.rounds - number)


def is_round(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is of a completed round."""
    return "round" in line and "event" not in line


def start_line(line: Mapping[str, Any]) -> str:
    """The clients, what the method began with, and how a client computes.

    >>> start_line({"all_clients": {"count": 2}, "density": 0.05, "execution": "sparse"})
    '2 clients, density 0.05, sparse execution'
    """
    text = f"{totals(line)['count']} clients, density {line['density']:.4g}"
    if "execution" in line:
        text += f", {line['execution']} execution"
    if "selection" in line:
        selection = line["selection"]
        text += f", candidate {selection['winner'] + 1} of {len(selection['densities'])} won"
    return text


def round_line(line: Mapping[str, Any], *, rounds: int, left: float | None) -> str:
    """One round in one line.

    Args:
        line: of metrics.jsonl.
        rounds: of the whole run.
        left: seconds until its end, where that can be said.

    >>> line = {"round": 2, "test_accuracy": 0.5, "bytes_up": 21_900, "bytes_down": 31_400}
    >>> round_line(line, rounds=20, left=125)
    'round   2/20  accuracy 50.00 %  up 21.9 kB  down 31.4 kB  left 2 min 05 s'
    """
    measure = Measure.of(line)
    value = known_number(line.get(measure.key))
    shown = measure.show(value)
    if measure.is_share and value is not None:
        shown = f"{100 * value:5.2f} %"
    text = (
        f"round {line['round']:>3}/{rounds}  {measure.name} {shown}"
        f"  up {format_bytes(line['bytes_up'])}  down {format_bytes(line['bytes_down'])}"
    )
    return text if left is None else f"{text}  left {format_seconds(left)}"
