"""A real fleet whose processes are killed all the time: does the run finish, does memory grow?

    python -m benchmarks.fleet_killed [--rounds 200] [--json]

`fedprune fleet up` with four nodes (TLS, node keys) and `fedprune run --superlink` of digits, as a
user has them. Every few rounds a node drawn by the seed is killed with -9 and started again, and
the SuperLink twice in the run. Rows compare resident memory, by the kernel, after the last rounds
with that after a tenth of them: of the nodes, which may be new processes, of the SuperLink, and of
the ServerApp. Then the test accuracy, in percent, beside that of the same run inline, in which
nothing is killed. Works on Linux alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.process_memory import resident, session_of
from benchmarks.rows import Row, add_arguments, show
from fedprune.config import RunConfig
from fedprune.fleet.local import Fleet, fleet_up
from fedprune.rounds.folder import METRICS, MODEL, read_metrics, read_summary
from fedprune.rounds.run import run
from prunelab.runs.temporary import temporary_folder

BENCH = "fleet_killed"
NODES, ROUNDS, QUICK_ROUNDS = 4, 200, 20
NODE_EVERY = 4  # rounds from one kill of a node to the next
TIMEOUT = 30.0
SERVER_AT = (0.35, 0.7)  # of the rounds, when the SuperLink is killed
KINDS = {"flower-superlink": "the SuperLink", "flwr-serverapp": "the ServerApp"}
MIB = 2**20


def rows(rounds: int) -> Iterator[Row]:
    """Rows of memory and accuracy."""
    with temporary_folder() as folder:
        os.environ["FLWR_HOME"] = str(folder / "flower")
        # Who was killed with a message on its way is asked again.
        config = RunConfig.parse(
            {"data.clients": NODES, "training.rounds": rounds, "federation.quorum": NODES,
             "federation.timeout": TIMEOUT}
        )  # fmt: skip
        settings = folder / "settings.toml"
        settings.write_text(config.toml(), encoding="utf-8")
        with fleet_up(folder / "fleet", nodes=NODES, name="killed") as fleet:
            memory, kills = _killing(fleet, settings, folder / "run", rounds)
        early, late = memory[min(memory)], memory[max(memory)]
        for what, value in late.items():
            case = f"{what}, after round {max(memory)}"
            yield Row(BENCH, case, 0.05, value, early[what], f"after round {min(memory)}", "MiB")
        lines = read_metrics(folder / "run")
        skipped = sum(len(line.get("skipped", ())) for line in lines)
        again = sum(line.get("event") == "below-quorum" for line in lines)
        summaries = read_summary(folder / "run"), run(config, folder / "inline")
        models = {(folder / name / MODEL).read_bytes() for name in ("run", "inline")}
        print(
            f"# killed: {kills}; answers left out: {skipped}, rounds asked again: {again}; "
            f"{'the same bits as' if len(models) == 1 else 'other bits than'} inline",
            file=sys.stderr,
        )
        found = [100 * summary["test_accuracy"] for summary in summaries]
        yield Row(BENCH, "test accuracy", 0.05, *found, "inline, nothing killed", "%")


def _killing(
    fleet: Fleet, settings: Path, out: Path, rounds: int
) -> tuple[dict[int, dict[str, float]], dict[str, int]]:
    """Run, and kill; memory in MiB by round, and how often what was killed."""
    command = [sys.executable, "-m", "fedprune", "run", "--config", str(settings)]
    command += ["--superlink", fleet.server.name, "--out", str(out)]
    log = out.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    draw, memory, done = random.Random(0), dict[int, dict[str, float]](), 0
    left = [round(share * rounds) for share in SERVER_AT]
    kills = {"nodes": 0, "SuperLink": 0}
    while process.poll() is None:
        time.sleep(0.05)
        now = _rounds_done(out)
        if now == done:
            continue
        if now >= rounds // 10 > done or (rounds - now) * 20 < rounds:
            memory[now] = _memory(fleet)
        if left and now >= left[0]:
            left.pop(0)
            fleet.superlink.kill()
            fleet.restart_superlink()
            kills["SuperLink"] += 1
        if now // NODE_EVERY > done // NODE_EVERY:
            node = draw.choice(fleet.nodes)
            node.kept.kill()
            node.kept.start()
            kills["nodes"] += 1
        done = now
    if process.returncode:
        raise RuntimeError(f"the run did not finish:\n{log.read_text()[-2000:]}")
    return memory, kills


def _rounds_done(out: Path) -> int:
    if not (out / METRICS).exists():
        return 0
    lines: list[dict[str, Any]] = read_metrics(out)
    return max((line.get("round", 0) for line in lines if "test_loss" in line), default=0)


def _memory(fleet: Fleet) -> dict[str, float]:
    """Of the largest process of each kind."""
    assert fleet.superlink.process is not None
    processes = [(node.kept.process.pid, "a node") for node in fleet.nodes if node.kept.process]
    for process, command in session_of(fleet.superlink.process.pid):
        kinds = [kind for kind in KINDS if any(word.endswith(kind) for word in command)]
        processes += [(process, KINDS[kind]) for kind in kinds]
    found: dict[str, float] = {}
    for process, name in processes:
        with contextlib.suppress(OSError):
            found[name] = max(found.get(name, 0.0), resident("VmRSS", process=process) / MIB)
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCH}", description=__doc__)
    add_arguments(parser, quick=f"{QUICK_ROUNDS} rounds")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    show(rows(QUICK_ROUNDS if arguments.quick else arguments.rounds), arguments)


if __name__ == "__main__":
    main()
