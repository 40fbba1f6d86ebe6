"""Whole rounds, start and memory of fedprune's inline engine against a plain FedAvg loop in torch.

    python -m benchmarks.round [--quick] [--json] [--plot FILE.png] [--threads N]
        [--processor-time] [--repeats N]

A round is all of it: clients, messages, aggregation, evaluation of 500 test images. Ten clients
of 175 drawn images of CIFAR's shape, resnet18, one epoch in batches of 16, one thread. The loop is
that of `benchmarks.gpu_simulation`, on the same parts: dense, one model, a weighted sum of state
dicts, nothing sent. Each side has processes of its own, by turns. "magnitude" has steady rounds at
a fixed mask; "start" is FedTiny's with its default pool, from the imports to the first round,
laying out the data and pre-training included (its peer is one round of the loop); "fedavg" is
dense through the engine. Peaks are high-water marks of resident memory; what a run starts from is
laid out by a child process, which has a row of its own. Bytes are those that a client is sent
before the first round, its peer C·d of the dense model, C the size of the pool.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_simulation import write_images
from benchmarks.rows import Row, add_arguments, add_timing_arguments, show
from benchmarks.timing import use_threads
from fedprune.methods.fedtiny import FedTiny
from prunelab.runs.temporary import temporary_folder

BENCH = "round"
DENSITIES = (0.01, 0.05)
ROUNDS = 3  # the first is not counted
MIB = 2**20
PEER = "plain dense FedAvg"

Values = dict[str, Any]


def settings(data: Path, *, quick: bool) -> Values:
    """Of all sides, but for the method."""
    return {
        "data.dataset": str(data),
        "data.clients": 2 if quick else 10,
        "data.partition": "iid",
        "model.name": "resnet8" if quick else "resnet18",
        "training.rounds": ROUNDS,
        "training.local_epochs": 1,
        "training.batch_size": 16,
        "training.lr": 0.02,
        "training.threads": 1,
    }


def rows(
    values: Values, densities: Sequence[float], *, repeats: int, processor_time: bool
) -> Iterator[Row]:
    """Rows of rounds, start, memory and bytes."""
    sides: dict[str, tuple[str, Values]] = {
        "plain": ("plain", values),
        "fedavg": ("ours", {**values, "method.name": "fedavg"}),
    }
    for density in densities:
        for method in ("magnitude", "fedtiny"):
            own = {**values, "method.name": method, "method.density": density}
            sides[f"{method} {density:g}"] = ("ours", own)
    found: dict[str, list[Values]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            found[name].append(measured(*side, processor_time=processor_time))
    plain, case = found["plain"], f"{values['model.name']} {values['data.clients']} clients"
    seconds, peak = round_seconds(plain), largest(plain, "peak")
    for name, runs in found.items():
        method, _, given = name.partition(" ")
        density = float(given or 1)
        if method in {"fedavg", "magnitude"}:
            own = round_seconds(runs)
            yield Row(BENCH, f"{case}, {method}", density, own, seconds, PEER, "s")
        if method == "magnitude":
            share = statistics.median(s / r for run in runs for s, r in counted(run))
            print(f"# {name}: {share:.0%} of a round are training steps", file=sys.stderr)
        if method != "plain":
            own = largest(runs, "peak")
            yield Row(BENCH, f"{case} peak, {method}", density, own, peak, PEER, "MiB")
            own = largest(runs, "children")
            yield Row(BENCH, f"{case} peak laying out, {method}", density, own, peak, PEER, "MiB")
        if method == "fedtiny":
            own = statistics.median(run["start"] for run in runs)
            yield Row(
                BENCH, f"{case} start, {method}", density, own, seconds, f"round of {PEER}", "s"
            )
            summary, pool = runs[0]["summary"], FedTiny(density=density).num_candidates
            dense = pool * density * summary["bytes_dense_round"] / MIB
            sent = summary["bytes_start_down"] / MIB
            yield Row(BENCH, f"{case} start bytes, {method}", density, sent, dense, "C·d", "MiB")


def round_seconds(runs: Sequence[Values]) -> float:
    """Median over all rounds but the first of each run."""
    return statistics.median(seconds for run in runs for seconds in run["rounds"][1:])


def counted(run: Values) -> list[tuple[float, float]]:
    """Seconds of the training steps and of the whole, of each round but the first."""
    return list(zip(run["steps"][1:], run["rounds"][1:], strict=True))


def largest(runs: Sequence[Values], key: str) -> float:
    """Of all runs, in MiB."""
    return float(max(run[key] for run in runs) / MIB)


def measured(side: str, values: Values, *, processor_time: bool) -> Values:
    """What a process of its own finds of one side."""
    command = [sys.executable, "-m", "benchmarks.round_process", side]
    done = subprocess.run(
        [*command, *["--processor-time"] * processor_time],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: Values = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCH}", description=__doc__)
    add_arguments(parser, quick="resnet8, two clients, few images, density 0.05")
    add_timing_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    arguments = parser.parse_args()
    use_threads(1)
    quick = arguments.quick
    with temporary_folder() as temporary:
        num_train, num_test = (130, 40) if quick else (1800, 500)
        write_images(Path(temporary), num_train=num_train, num_test=num_test)
        values = settings(Path(temporary), quick=quick)
        densities = DENSITIES[1:] if quick else DENSITIES
        repeats = 1 if quick else arguments.repeats
        table = rows(values, densities, repeats=repeats, processor_time=arguments.processor_time)
        show(table, arguments)


if __name__ == "__main__":
    main()
