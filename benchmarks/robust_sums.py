"""What each way of aggregation costs a server, against Flower's strategies on dense arrays.

    python -m benchmarks.robust_sums [--quick] [--json] [--plot FILE.png] [--threads N]
        [--processor-time] [--clients K]

Ten clients' answers of one round, resnet18: ours folds states of the active values, the peer is
Flower's own strategy on the same values laid out dense (for "clipped", which Flower does not have
as such, its FedAvg). Flower takes the arrays out of its records, so that they are put in again
before each call, which is timed with it. Bytes are what a server holds of all answers.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, MultiKrum
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.rows import Row, add_arguments, add_timing_arguments, show
from benchmarks.timing import Clock, clock, interleaved, use_threads
from fedprune.exchange.robust import Aggregation
from fedprune.settings import AGGREGATIONS
from prunelab.networks import build_model
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.state import SparseState

BENCH = "robust_sums"
DENSITIES = (0.01, 0.05)
SHARE = 0.2
MIB = 2**20


def answers(model: str, density: float, count: int) -> list[SparseState]:
    """States of clients under one mask, all layers but vectors at the density."""
    network = build_model(model, num_classes=10, input_shape=(3, 32, 32), seed=0)
    generator = np.random.default_rng(0)
    patterns, start = {}, {}
    for name, value in network.state_dict().items():
        if not value.is_floating_point():
            continue
        start[name] = value.numpy()
        if value.ndim > 1:
            kept = max(1, round(density * value.numel()))
            places = np.sort(generator.choice(value.numel(), kept, replace=False))
            patterns[name] = Pattern.from_positions(tuple(value.shape), places)
            start[name] = start[name].reshape(-1)[places]
    masks = Patterns(patterns)
    return [
        SparseState({n: _moved(v, generator) for n, v in start.items()}, masks)
        for _ in range(count)
    ]


def _moved(value: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return value + 0.01 * np.abs(generator.standard_normal(value.shape)).astype(np.float32)


def ours(kind: str, states: Sequence[SparseState]) -> Callable[[], object]:
    """One aggregation of all answers."""

    def run() -> object:
        total = Aggregation(kind, byzantine=SHARE).states(before=states[0])
        for state in states:
            total.add(state, weight=100)
        return total.result()

    return run


def flowers(
    kind: str, states: Sequence[SparseState], *, active: bool = False
) -> tuple[str, Callable[[], object]]:
    """Flower's strategy for it, and a call on the same values: dense, or the active ones alone."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    liars = int(SHARE * len(states))
    strategy = {
        "trimmed-mean": lambda: FedTrimmedAvg(beta=SHARE),
        "median": FedMedian,
        "multi-krum": lambda: MultiKrum(
            num_malicious_nodes=liars, num_nodes_to_select=len(states) - liars
        ),
    }.get(kind, FedAvg)()
    question = Message(RecordDict(), 1, "train")
    held = [state.values if active else state.dense() for state in states]
    arrays = [{name: Array(value) for name, value in values.items()} for values in held]

    def run() -> object:
        replies = [
            Message(
                RecordDict({"arrays": ArrayRecord(each), "m": MetricRecord({"num-examples": 100})}),
                reply_to=question,
            )
            for each in arrays
        ]
        return strategy.aggregate_train(1, replies)

    return f"Flower's {type(strategy).__name__}", run


def rows(model: str, densities: Sequence[float], count: int, *, by: Clock) -> Iterator[Row]:
    """A row for each kind and density, and one of bytes."""
    for density in densities:
        states = answers(model, density, count)
        for kind in AGGREGATIONS:
            peer_name, peer = flowers(kind, states)
            found = interleaved({"ours": ours(kind, states), "peer": peer}, rounds=3, clock=by)
            case = f"{model}, {count} clients, {kind}"
            yield Row(BENCH, case, density, found["ours"], found["peer"], peer_name, "s")
        own = sum(value.nbytes for state in states for value in state.values.values()) / MIB
        dense = sum(value.nbytes for value in states[0].dense().values()) * count / MIB
        case = f"{model}, {count} clients, answers held"
        yield Row(BENCH, case, density, own, dense, "dense arrays", "MiB")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCH}", description=__doc__)
    add_arguments(parser, quick="resnet8 at density 0.05")
    add_timing_arguments(parser)
    parser.add_argument("--clients", type=int, default=10)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    model = "resnet8" if arguments.quick else "resnet18"
    densities = DENSITIES[1:] if arguments.quick else DENSITIES
    by = clock(processor_time=arguments.processor_time)
    show(rows(model, densities, arguments.clients, by=by), arguments)


if __name__ == "__main__":
    main()
