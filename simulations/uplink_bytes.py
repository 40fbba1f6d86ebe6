"""What accuracy costs on the way up: number formats, the largest changes alone, error feedback.

    python -m simulations.uplink_bytes

FedTiny with everything the same but how trained models travel up. `small` fits one core; `full`
has every number format at every share, and more rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import fedprune
from fedprune import RunConfig
from fedprune.rounds.folder import CONFIG
from prunelab.pages.units import format_bytes, mean_and_spread
from simulations.command import parse
from simulations.page import page, table
from simulations.pruning_cells import Result, run_cells

DENSITIES = (0.05, 0.01)
SHARES = (1.0, 0.3, 0.1, 0.03)
DTYPES = ("fp32", "fp16", "bf16", "int8")
COMMON: dict[str, Any] = {
    "data.dataset": "digits",
    "model.name": "resnet8",
    "method.name": "fedtiny",
}


@dataclass(frozen=True)
class Way:
    """How trained models travel up."""

    dtype: str = "fp32"
    topk: float = 1.0
    error_feedback: bool = False

    @property
    def name(self) -> str:
        """Of a cell's file."""
        return f"{self.dtype}-{self.topk:g}{'-ef' if self.error_feedback else ''}"

    def settings(self) -> dict[str, Any]:
        """The keys of a run's configuration."""
        return {
            "federation.uplink_dtype": self.dtype,
            "federation.uplink_topk": self.topk,
            "federation.error_feedback": self.error_feedback,
        }


@dataclass(frozen=True)
class Preset:
    """How long runs are, and of which number formats only the largest changes are tried."""

    rounds: int
    with_shares: Sequence[str]


PRESETS = {"small": Preset(20, ("bf16", "int8")), "full": Preset(40, DTYPES)}
EXACT = Way()


def ways(preset: Preset) -> list[Way]:
    """Everything as it is, and each way that loses something with and without feedback."""
    lossy = [
        Way(dtype, share, feedback)
        for share, dtype, feedback in product(SHARES, DTYPES, (False, True))
        if (dtype, share) != ("fp32", 1.0) and (share == 1 or dtype in preset.with_shares)
    ]
    return [EXACT, *lossy]


def run_one(settings: Mapping[str, Any], folder: Path) -> Result:
    """One run, or the rest of it; what the table needs of its summary."""
    config = RunConfig.parse(settings)
    summary = fedprune.run(config, folder, resume=(folder / CONFIG).exists()).summary
    kept = ("test_accuracy", "bytes_up_steady_round", "bytes_up", "bytes_dense_round")
    return {key: summary[key] for key in (*kept, "state_bytes")}


def result_rows(
    results: Mapping[tuple[float, Way, int], Result], *, density: float, seeds: Sequence[int]
) -> list[list[str]]:
    """A row for each way, with its distance to the exact one, paired by seed."""
    rows = []
    for way in dict.fromkeys(way for at, way, _ in results if at == density):
        group = [results[density, way, seed] for seed in seeds]
        accuracy = [100 * result["test_accuracy"] for result in group]
        exact = [100 * results[density, EXACT, seed]["test_accuracy"] for seed in seeds]
        distance = (a - b for a, b in zip(accuracy, exact, strict=True))
        feedback = "–" if way == EXACT else "on" if way.error_feedback else "off"
        rows.append(
            [
                way.dtype, f"{way.topk:g}", feedback,
                mean_and_spread(accuracy, ".1f"),
                "" if way == EXACT else mean_and_spread(distance, "+.1f"),
                _bytes(group, "bytes_up_steady_round"),
                _bytes(group, "bytes_up"),
                _bytes(group, "state_bytes"),
            ]
        )  # fmt: skip
    return rows


def feedback_rows(results: Mapping[tuple[float, Way, int], Result]) -> list[list[str]]:
    """What error feedback changes, by density and share, over number formats and seeds."""
    gains: dict[tuple[float, float], list[float]] = {}
    for (density, way, seed), result in results.items():
        if way.error_feedback:
            without = results[density, replace(way, error_feedback=False), seed]
            gain = 100 * (result["test_accuracy"] - without["test_accuracy"])
            gains.setdefault((density, way.topk), []).append(gain)
    return [
        [f"{density:g}", f"{share:g}", mean_and_spread(found, "+.1f"), _won(found)]
        for (density, share), found in gains.items()
    ]


def _won(gains: Sequence[float]) -> str:
    return f"{sum(gain > 0 for gain in gains)} of {len(gains)}"


def _bytes(group: Iterable[Result], key: str) -> str:
    sizes = [result[key] for result in group]
    return format_bytes(sum(sizes) / len(sizes))


def main() -> None:
    """Run what is missing and write the page."""
    call = parse("uplink_bytes", list(PRESETS))
    preset = PRESETS[call.preset]
    settings = {**COMMON, "training.rounds": preset.rounds}
    if call.data is not None:
        settings["data.dataset"] = call.data
    keys = list(product(call.seeds, DENSITIES, ways(preset)))
    cells = {}
    for seed, density, way in keys:
        name = f"s{seed}-d{density:g}-{way.name}"
        own = {**settings, **way.settings(), "method.density": density, "seed": seed}
        cells[name] = partial(run_one, own, call.out / name)
    found = run_cells(cells, call.out, settings=settings)
    results = {
        (density, way, seed): result
        for (seed, density, way), result in zip(keys, found.values(), strict=True)
    }
    header = ["values", "share told", "error feedback", "accuracy, %", "points to exact"]
    header += ["up / steady round", "up in all", "client's state"]
    body: list[str] = []
    for density in DENSITIES:
        dense = next(iter(results.values()))["bytes_dense_round"]
        body += [f"Density {density:g} (a dense model takes {format_bytes(dense)} a round):", ""]
        rows = result_rows(results, density=density, seeds=call.seeds)
        body += [table(header, rows, words=(0, 2)), ""]
    body += ["Error feedback, on minus off, paired by format and seed:", ""]
    header = ["density", "share told", "points", "pairs won"]
    body += [table(header, sorted(feedback_rows(results)), words=())]
    seeds = ", ".join(map(str, call.seeds))
    text = page(
        "Fewer bytes up: accuracy against bytes",
        command=call.command,
        at=", ".join(sorted({result["commit"] for result in found.values()})),
        notes=[
            f"mean ± sample standard deviation over seeds {seeds}; the seed decides data split, "
            "initial weights, order and masks alike",
            "nothing was tuned for any way of travelling; test data decide nothing",
            "after the first adjustments masks part whatever the rounding is: the rows of fp16 at "
            "share 1, which loses next to nothing, show how much of a difference is chance",
            "`up / steady round` is one client's message, `up in all` of all clients and rounds, "
            "the choice of the mask and growth included, which travel the same way in every row",
        ],
        body=body,
        settings=settings,
    )
    call.save(text)


if __name__ == "__main__":
    main()
