"""A server with very many clients: rounds, memory, and what one answer costs to add up.

    python -m benchmarks.scale [--quick] [--json] [--plot FILE.png] [--clients 100,1000,...]

**Runs** of the inline engine, each in a process of its own: four drawn pictures of 8x8 a client,
resnet8 at density .05, 100 clients a round, one epoch. "round" is processor time of a round but
the first, server and clients together, "start" that from the engine's first line to the first
round, "peak" the process's high-water mark at the end of its last round. The peer is the same run
with the fewest clients, so that a ratio of 1 says flat. Then the peak with 10, 100 and 1,000
clients a round, at density .5, where a thousand answers are 157 MiB.

**Aggregation** of the answers of one round, resnet18 at density .05, interleaved in this process,
one thread, processor time, milliseconds a client: "sums" from answers that were read, "messages"
from records as Flower's transport leaves them, read and checked. The peer is Flower's FedAvg, on
the same values laid out dense, as its arrays are, and on the active values alone, of which it
would have to know whose they are. Flower's own reading of its arrays is in its time. Of dense
answers, 45 MB each, there are fewer.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.robust_sums import answers, flowers
from benchmarks.rows import Row, add_arguments, show
from benchmarks.timing import clock, interleaved, use_threads
from fedprune.exchange.aggregate import StateMean
from fedprune.exchange.gate import check_parts
from fedprune.exchange.messages import MODEL, Expected, Reply, Request
from fedprune.flower import wire
from prunelab.runs.temporary import temporary_folder
from sparsemodel.runtime.state import SparseState

BENCH = "scale"
CLIENTS = (100, 1_000, 10_000, 100_000)
PER_ROUND = (10, 100, 1_000)
DENSITY, KEPT_DENSITY = 0.05, 0.5
SAMPLES = 4  # of a client
ANSWERS, DENSE_ANSWERS = 100, 20
MIB = 2**20

Values = dict[str, Any]


def write_pictures(file: Path, num_clients: int) -> None:
    """Drawn pictures: SAMPLES a client, and 64 for the test."""
    generator = np.random.default_rng(0)
    count = SAMPLES * num_clients + 64
    inputs = generator.integers(0, 256, (count, 1, 8, 8), np.uint8)
    np.savez(file, inputs=inputs, targets=np.arange(count) % 10)


def settings(data: Path, num_clients: int, *, per_round: int, density: float) -> Values:
    """Of a run."""
    return {
        "data.dataset": str(data),
        "data.clients": num_clients,
        "data.partition": "iid",
        "data.test_share": 64 / (SAMPLES * num_clients + 64),
        "federation.clients_per_round": per_round,
        "method.name": "magnitude",
        "method.density": density,
        "model.name": "resnet8",
        "server.per_class": 1,
        "server.pretrain_epochs": 0,
        "training.rounds": 3,
        "training.local_epochs": 1,
    }


def run_rows(
    clients: Sequence[int], per_round: Sequence[int], *, measured: Callable[[Values], Values]
) -> Iterator[Row]:
    """Rows of rounds, start and memory."""

    def found(num_clients: int, asked: int, density: float) -> Values:
        with temporary_folder() as temporary:
            file = temporary / "pictures.npz"
            write_pictures(file, num_clients)
            return measured(settings(file, num_clients, per_round=asked, density=density))

    runs = {number: found(number, min(number, 100), DENSITY) for number in clients}
    fewest = runs[clients[0]]
    for number, run in runs.items():
        minute = 60 / run["round"]
        print(f"# {number:,} clients: {minute:.1f} rounds a minute", file=sys.stderr)
        for what, unit in (("round", "s"), ("start", "s"), ("peak", "MiB")):
            case, peer = f"{number} clients, {what}", f"{clients[0]} clients"
            yield Row(BENCH, case, DENSITY, run[what], fewest[what], peer, unit)
    peaks = {asked: found(per_round[-1], asked, KEPT_DENSITY)["peak"] for asked in per_round}
    for asked, peak in peaks.items():
        case, peer = f"{asked} clients a round, peak", f"{per_round[0]} a round"
        yield Row(BENCH, case, KEPT_DENSITY, peak, peaks[per_round[0]], peer, "MiB")


def process(values: Values) -> Values:
    """What a process of its own finds of a run."""
    command = [sys.executable, "-m", "benchmarks.scale_process"]
    done = subprocess.run(
        command, input=json.dumps(values), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: Values = json.loads(done.stdout.splitlines()[-1])
    return found


def ours(states: Sequence[SparseState]) -> dict[str, Callable[[], object]]:
    """Sums of answers: as they were read, and from their records."""
    shapes = states[0].shapes()
    expected = Expected(states=[MODEL], fields=["loss"])
    request = Request("train", states={MODEL: states[0]}, expected=expected)
    records = [
        wire.encode_reply(Reply(100, {"loss": 1.0}, {MODEL: state}), request, dtype="fp32")
        for state in states
    ]

    def sums() -> object:
        mean = StateMean()
        for state in states:
            mean.add(state, weight=100)
        return mean.result()

    def messages() -> object:
        mean = StateMean()
        for record in records:
            reply = wire.decode_reply(record, request, shapes=shapes)
            check_parts(reply, request)
            mean.add(reply.states[MODEL], weight=reply.weight)
        return mean.result()

    return {"sums": sums, "messages": messages}


def aggregation_rows(model: str, density: float, count: int, *, rounds: int) -> Iterator[Row]:
    """Milliseconds a client, against Flower's FedAvg."""
    states = answers(model, density, count)
    dense, active = (f"Flower's FedAvg, {how}" for how in ("dense", "active values"))
    fewer = states[:DENSE_ANSWERS]
    own, peers = (
        ours(states),
        {
            dense: flowers("mean", fewer)[1],
            active: flowers("mean", states, active=True)[1],
        },
    )
    by = clock(processor_time=True)
    seconds = interleaved({**own, **peers}, rounds=rounds, clock=by)
    each = {
        name: 1000 * value / len(fewer if name == dense else states)
        for name, value in seconds.items()
    }
    for name, value in each.items():
        print(f"# {name}: {1000 / value:.0f} clients a second", file=sys.stderr)
    for name in own:
        for peer in peers:
            case = f"{model}, {count} answers, {name}"
            yield Row(BENCH, case, density, each[name], each[peer], peer, "ms")


def rows(clients: Sequence[int], per_round: Sequence[int], *, quick: bool) -> Iterator[Row]:
    """All rows."""
    model, count, rounds = ("resnet8", 5, 3) if quick else ("resnet18", ANSWERS, 7)
    yield from aggregation_rows(model, DENSITY, count, rounds=rounds)
    yield from run_rows(clients, per_round, measured=process)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCH}", description=__doc__)
    add_arguments(parser, quick="100 and 1,000 clients, resnet8's answers")
    parser.add_argument("--clients", help="numbers of clients, by commas")
    arguments = parser.parse_args()
    use_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    quick = arguments.quick
    clients = CLIENTS[:2] if quick else CLIENTS
    if arguments.clients:
        clients = tuple(map(int, arguments.clients.split(",")))
    show(rows(clients, PER_ROUND[:2] if quick else PER_ROUND, quick=quick), arguments)


if __name__ == "__main__":
    main()
