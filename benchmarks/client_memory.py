"""Memory of a real client process, by execution and phase, against the dense torch client.

    python -m benchmarks.client_memory [--quick] [--json] [--plot FILE.png]

A FedTiny run of one client with 500 random pictures of 3×32×32, of resnet18 and batches of 16, with
`training.recompute`: the server's side is the real one, in this process; the client is the real
ClientApp in a process of its own, which answers everything: who it is (join), the candidates'
statistics (measure), their losses (score), training, training with growth. After each answer the
kernel tells the high-water mark of resident memory, which then begins anew. "runtime" has no
torch in the process; "modules" is what a network without a program would get, sparse torch
modules; "masked" and "dense" are the other executions. Another process answers the message of the
first round alone: start is from the message to the end of its first step, after all imports.

"deployment" is the same run of the runtime on a SuperLink and a SuperNode: the high-water mark
of Flower's own `flwr-clientapp` processes; its peer is the dense client's process of the
other rows. "run-local" is `fedprune device run-local` on the same pictures, without Flower, for
two epochs under a budget that asks for recomputing. Works on Linux alone.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message

from benchmarks.client_process import Measured
from benchmarks.deployment import clientapp_peaks
from benchmarks.gpu_simulation import write_images
from benchmarks.rows import Row, add_arguments, show
from benchmarks.timing import use_threads
from fedprune.config import RunConfig
from fedprune.flower.inline import InlineGrid
from fedprune.flower.server import GridCohort
from fedprune.local.model import normalization
from fedprune.local.shares import share_of
from fedprune.local.site import TRAIN
from fedprune.rounds import folder as runfolder
from fedprune.rounds.loop import run
from fedprune.rounds.setup import Setup, lay_out
from prunelab.data.store import open_store
from prunelab.runs.temporary import temporary_folder
from sparsemodel.runtime.state import SparseState
from sparsemodel.runtime.trainer import Trainer

BENCH = "client_memory"
MODEL, BATCH, SAMPLES = "resnet18", 16, 500
DENSITIES = (0.01, 0.05)
EXECUTIONS = {"runtime": "auto", "modules": "sparse", "masked": "masked", "dense": "dense"}
PEER = "dense"
ALONE_BUDGET = "100MB"  # too small for resnet18 without recomputing
PHASES = {"1": "train", "2": "train with growth"}  # what the server calls them -> what we do
CLIENT = "from benchmarks.client_process import main; main()"
MIB = 2**20


class WithoutProgram(Setup):
    """A run whose network has no program, so that clients compute it by torch modules."""

    program = None  # type: ignore[assignment]


class ClientProcess:
    """A ClientApp in a process of its own; called as a Grid of this process calls its app."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", CLIENT]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.measured: dict[str, Measured] = {}
        self.first_training = b""

    def __call__(self, message: Message, context: Context) -> Message:
        group = message.metadata.group_id
        phase = PHASES.get(group, group)
        question = pickle.dumps((message, context))
        if phase == "train":
            self.first_training = question
        reply, context.state, self.measured[phase] = self.answer(question)
        return reply

    def answer(self, question: bytes) -> Any:
        """Pass a pickled message and context on, and wait for the reply."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextmanager
def client_process() -> Iterator[ClientProcess]:
    """A client process for as long as the context lasts."""
    process = ClientProcess()
    try:
        yield process
    finally:
        process.close()


def settings(model: str, density: float, data: Path) -> RunConfig:
    """Of the run: two rounds, the second of them with growth."""
    return RunConfig.parse(
        {
            "data.dataset": str(data),
            "data.clients": 1,
            "data.partition": "iid",
            "model.name": model,
            "training.rounds": 2,
            "training.local_epochs": 1,
            "training.batch_size": BATCH,
            "training.lr": 0.02,
            "training.recompute": True,
            "method.name": "fedtiny",
            "method.density": density,
            "method.adjust_every": 2,
            "method.adjust_until": 3,
            "server.per_class": 1,
            "server.pretrain_epochs": 1,
        }
    )


def rows(
    model: str,
    densities: Sequence[float],
    *,
    executions: Sequence[str] = tuple(EXECUTIONS),
    samples: int = SAMPLES,
    deployed: bool = True,
) -> Iterator[Row]:
    """Rows of the executions' peaks in MiB, and of their starts in milliseconds."""
    with temporary_folder() as temporary:
        folder = Path(temporary)
        data = folder / "data"
        data.mkdir()
        write_images(data, num_train=samples + 10, num_test=20)  # ten are the server's
        for density in densities:
            config = settings(model, density, data)
            place = folder / str(density)
            place.mkdir()
            found = {way: measure(config, way, place) for way in dict.fromkeys([PEER, *executions])}
            for way in executions:
                for phase, peak in found[way].items():
                    peer, unit = found[PEER][phase], "ms" if phase == "start" else "MiB"
                    case = f"{model} b{BATCH} {phase}, {way}"
                    if way != PEER:
                        yield Row(BENCH, case, density, peak, peer, PEER, unit)
            store = place / "setup-runtime" / TRAIN
            peak, batch_size = alone_peak(model, density, store, place / "alone")
            case = f"{model} b{batch_size} alone, run-local"
            yield Row(BENCH, case, density, peak, found[PEER]["all"], PEER, "MiB")
            if deployed:
                lay_out(config, place / "setup", with_start=True)
                peaks = clientapp_peaks(config, place / "setup", place / "deployed")
                case = f"{model} b{BATCH} all, deployment"
                yield Row(BENCH, case, density, max(peaks) / MIB, found[PEER]["all"], PEER, "MiB")


def alone_peak(model: str, density: float, store: Path, out: Path) -> tuple[float, int]:
    """Of a device that trains by itself: the kernel's figure in MiB, and its batch."""
    command = [sys.executable, "-m", "fedprune", "device", "run-local", "--data", str(store)]
    settings = {"model": model, "density": density, "epochs": 2, "batch-size": BATCH, "out": out,
                "budget": ALONE_BUDGET, "home": out.with_name("no-device")}  # fmt: skip
    command += [f"--{name}={value}" for name, value in settings.items()]
    subprocess.run(command, check=True, stdout=sys.stderr)
    summary = json.loads((out / "summary.json").read_text())
    return summary["peak_rss_bytes"] / MIB, summary["batch_size"]


def measure(config: RunConfig, way: str, place: Path) -> dict[str, float]:
    """Peaks by phase in MiB, "all" of them together, and "start" in milliseconds."""
    training = replace(config.training, execution=EXECUTIONS[way])
    config = replace(config, training=training)
    setup = (WithoutProgram if way == "modules" else Setup)(config, place / f"setup-{way}")
    lay_out(config, setup.folder, with_start=True)
    with client_process() as client:
        run_config = {**config.flower(), "run.setup": str(setup.folder)}
        grid = InlineGrid(client, run_config=run_config, num_nodes=1)  # type: ignore[arg-type]
        runfolder.prepare(place / way, config, resume=False)
        with runfolder.open_run(place / way) as folder:
            cohort = GridCohort(grid, setup)
            cohort.join()
            state = run(setup, cohort, folder)
    with client_process() as fresh:
        _, _, first = fresh.answer(client.first_training)
    if client.measured["train"].torch == (way == "runtime"):
        raise RuntimeError(f"{way}: torch is in the process where it should not be, or is not")
    _explain(way, client.measured["train"], first, _held(setup, state.model, way))
    peaks = {phase: measured.peak / MIB for phase, measured in client.measured.items()}
    return {**peaks, "all": max(peaks.values()), "start": 1000 * first.first_step_seconds}


def _held(setup: Setup, state: SparseState, way: str) -> dict[str, int]:
    """Bytes that a runtime's model holds once it has made a step, as a client has it."""
    if way != "runtime":
        return {}
    assert setup.program is not None
    store, training = open_store(setup.folder / TRAIN), setup.config.training
    model = Trainer(
        setup.program,
        state,
        batch_size=BATCH + 1,
        recompute=training.recompute,
        normalization=normalization(store.input_shape[0]),
    )
    images, labels = store.take(np.arange(BATCH))
    model.step(images, labels, lr=training.lr, momentum=training.momentum)
    data = len(share_of(store, 0)) * images[0].nbytes
    return {**model.held_bytes(), "data": data}


def _explain(way: str, training: Measured, first: Measured, held: dict[str, int]) -> None:
    """On standard error: what a process's memory is made of, and its imports' time."""
    imports, before = [], 0
    for what, resident in first.imported.items():
        imports.append(f"{what} {(resident - before) / MIB:.1f}")
        before = resident
    parts = [f"{what} {size / MIB:.2f}" for what, size in held.items()]
    print(
        f"# {way}: imports {', '.join(imports)}; after training {training.resident / MIB:.1f}"
        f"{'; held in it ' if parts else ''}{', '.join(parts)} MiB; the ClientApp's own imports "
        f"{first.import_seconds:.2f} s",
        file=sys.stderr,
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCH}", description=__doc__)
    add_arguments(parser, quick="density 0.01, the runtime and dense torch alone, no deployment")
    parser.add_argument("--model", default=MODEL)
    arguments = parser.parse_args()
    use_threads(arguments.threads or 1)
    if arguments.quick:
        table = rows(arguments.model, DENSITIES[:1], executions=("runtime",), deployed=False)
    else:
        table = rows(arguments.model, DENSITIES)
    show(table, arguments)


if __name__ == "__main__":
    main()
