"""A real fleet on this machine: Flower's SuperNodes beside nodes of one process, in the same run.

    python -m benchmarks.fleet [--quick] [--json]

A SuperLink, and nodes that answer it, as processes of their own.

"round": four nodes share digits (resnet8, density .05, the README's first command for so many); the
median of the seconds from one line of metrics to the next, of rounds without growth. "node": one
node of resnet18, batch 16, `training.recompute`, 500 random pictures of 3×32×32, a FedTiny run of
two rounds, the second with growth; proportional set size of all processes of the node together, by
the kernel, looked at every tenth of a second, the largest; and the high-water mark of resident
memory of the process that trains. The models of both kinds of node have to be the same bits.
"alone": `fedprune device run-local` on the same pictures, the high-water mark of its process. Works
on Linux alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

from benchmarks.client_memory import BATCH, MIB, MODEL, SAMPLES, alone_peak, settings
from benchmarks.deployment import device, submit, supernode
from benchmarks.gpu_simulation import write_images
from benchmarks.process_memory import proportional, resident, session_of
from benchmarks.rows import Row, add_arguments, show
from fedprune.config import RunConfig
from fedprune.flower import simulation
from fedprune.flower.inline import calling
from fedprune.flower.launch import launch_values
from fedprune.rounds.folder import METRICS
from fedprune.rounds.setup import TRAIN, lay_out
from prunelab.runs.temporary import temporary_folder

BENCH = "fleet"
NODES, ROUNDS, QUICK_ROUNDS = 4, 20, 8
DENSITY = 0.01
LOOK_SECONDS = 0.1
Kind = Callable[..., AbstractContextManager[int]]
KINDS: dict[str, Kind] = {"SuperNode": supernode, "device": device}
PEER = "SuperNode"


@dataclass
class Looked:
    """What a look at the run, now and then, saw.

    Attributes:
        lines: when each line of metrics was there, and the line.
        parts: command -> bytes, of the node's processes when they held most together.
        peak: the largest high-water mark of one process of a node, in bytes.
    """

    lines: list[tuple[float, dict[str, object]]] = field(default_factory=list)
    parts: dict[str, int] = field(default_factory=dict)
    peak: int = 0

    def look(self, metrics: Path, group: int) -> None:
        """Look once."""
        if metrics.exists():
            text = metrics.read_text().splitlines()
            now = time.monotonic()
            self.lines += [(now, json.loads(line)) for line in text[len(self.lines) :]]
        parts, peak = memory_of(group)
        self.peak = max(self.peak, peak)
        if sum(parts.values()) > sum(self.parts.values()):
            self.parts = parts

    def round_seconds(self) -> list[float]:
        """Of rounds in which nothing grew, but for the first and the last, which does more."""
        pairs = zip(self.lines[1:-2], self.lines[2:-1], strict=True)
        return [after - before for (before, _), (after, line) in pairs if not line["adjusted"]]


def memory_of(group: int) -> tuple[dict[str, int], int]:
    """Proportional set sizes of a session's processes by command, and the largest high-water
    mark, in bytes.
    """
    parts: dict[str, int] = {}
    peak = 0
    for process, command in session_of(group):
        name = next((Path(c).name for c in command if "flwr-" in c or "flower-" in c), "node")
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parts[name] = parts.get(name, 0) + proportional(process)
            peak = max(peak, resident("VmHWM", process=process))
    return parts, peak


def run(config: RunConfig, kind: Kind, home: Path, setup: Path) -> tuple[Looked, str]:
    """Run a configuration on nodes of a kind; what was seen, and the digest of the model."""
    home.mkdir()
    launch = launch_values(home / "run", resume=False, setup=setup)
    app = simulation.write_app(home / "app", config, launch)
    environment = simulation.private_environment(home, commands=simulation.commands(home))
    port, looked = simulation.free_port(), Looked()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    flags = ["--disable-runtime-dependency-installation"]
    with ExitStack() as stack:
        stack.enter_context(simulation.superlink(home, port, environment, *flags))
        groups = [
            stack.enter_context(kind(home, port, environment, client=client))
            for client in range(config.data.clients)
        ]
        look = partial(looked.look, home / "run" / METRICS, groups[0])
        stack.enter_context(calling(look, every=LOOK_SECONDS))
        submit([str(app), "own"], environment, home)
    return looked, sha256((home / "run" / "model.safetensors").read_bytes()).hexdigest()


def compared(config: RunConfig, folder: Path, *, own: bool = False) -> dict[str, Looked]:
    """The same run on both kinds of nodes.

    Args:
        own: whether the device, which is alone then, has the samples as its own.
    """
    folder.mkdir()
    setup = folder / "setup"
    lay_out(config, setup, with_start=True)
    kinds = {**KINDS, "device": partial(device, data=str(setup / TRAIN))} if own else KINDS
    found = {name: run(config, kind, folder / name, setup) for name, kind in kinds.items()}
    if len({digest for _, digest in found.values()}) != 1:
        raise RuntimeError("the kinds of nodes give different models")
    return {name: looked for name, (looked, _) in found.items()}


def rows(*, quick: bool) -> Iterator[Row]:
    """Rows of seconds a round and of memory."""
    with temporary_folder() as folder:
        rounds = QUICK_ROUNDS if quick else ROUNDS
        config = RunConfig.parse({"data.clients": NODES, "training.rounds": rounds})
        found = compared(config, folder / "digits")
        seconds = {name: looked.round_seconds() for name, looked in found.items()}
        for name, each in seconds.items():
            print(
                f"# {name}: rounds of {min(each):.2f} to {max(each):.2f} s ({len(each)} of them)",
                file=sys.stderr,
            )
        middle = {name: statistics.median(each) for name, each in seconds.items()}
        case = f"resnet8, {NODES} nodes: a round, "
        yield from _rows(case, config.method.target_density, middle, "s")

        images = folder / "images"
        images.mkdir()
        write_images(images, num_train=SAMPLES + 10, num_test=20)
        config = settings(MODEL, DENSITY, images)
        found = compared(config, folder / MODEL, own=True)
        for name, looked in found.items():
            parts = ", ".join(f"{part} {size / MIB:.1f}" for part, size in looked.parts.items())
            print(f"# {name}: proportional set size of {parts} MiB", file=sys.stderr)
        whole = {name: sum(looked.parts.values()) / MIB for name, looked in found.items()}
        yield from _rows(f"{MODEL} b{BATCH}: whole node, ", DENSITY, whole, "MiB")
        peaks = {name: looked.peak / MIB for name, looked in found.items()}
        yield from _rows(f"{MODEL} b{BATCH}: process that trains, ", DENSITY, peaks, "MiB")
        store = folder / MODEL / "setup" / TRAIN
        peak, batch_size = alone_peak(MODEL, DENSITY, store, folder / "alone")
        case = f"{MODEL} b{batch_size}: alone, run-local"
        yield Row(BENCH, case, DENSITY, peak, peaks[PEER], f"{PEER}'s", "MiB")


def _rows(case: str, density: float, found: dict[str, float], unit: str) -> Iterator[Row]:
    peer = found[PEER]
    for name, value in found.items():
        if name != PEER:
            yield Row(BENCH, case + name, density, value, peer, PEER, unit)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCH}", description=__doc__)
    add_arguments(parser, quick=f"{QUICK_ROUNDS} rounds")
    arguments = parser.parse_args()
    show(rows(quick=arguments.quick), arguments)


if __name__ == "__main__":
    main()
