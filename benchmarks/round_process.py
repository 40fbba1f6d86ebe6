"""One side of `benchmarks.round` in a process of its own; imports nothing of a side by itself.

    python -m benchmarks.round_process {ours,plain} [--processor-time] < CONFIG.json

Prints one JSON object: seconds of the start and of each round, seconds of the training steps in
each round, the high-water marks of this process and of the largest of its children, and what the
summary of the run says of bytes.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Clock = Callable[[], float]


def ours(values: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """A whole run through fedprune's inline engine."""
    began = clock()
    from fedprune.config import RunConfig  # noqa: PLC0415
    from fedprune.local.model import RuntimeModel  # noqa: PLC0415
    from fedprune.rounds import loop, run  # noqa: PLC0415
    from prunelab.runs.temporary import temporary_folder  # noqa: PLC0415

    rounds: list[float] = []
    steps: list[float] = []
    starts: list[float] = []
    play_round, step = loop.play_round, RuntimeModel.step

    def timed_round(*arguments: Any) -> Any:
        starts.append(clock())
        steps.append(0.0)
        state = play_round(*arguments)
        rounds.append(clock() - starts[-1])
        return state

    def timed_step(*arguments: Any, **named: Any) -> float:
        start = clock()
        loss = step(*arguments, **named)
        steps[-1] += clock() - start
        return loss

    loop.play_round, RuntimeModel.step = timed_round, timed_step  # type: ignore[method-assign]
    with temporary_folder() as temporary:
        config = RunConfig.parse(values)
        summary = run.run(config, Path(temporary) / "run", engine="inline")
    return {
        "start": starts[0] - began,
        "rounds": rounds,
        "steps": steps,
        "summary": {key: value for key, value in summary.items() if key.startswith("bytes")},
    }


def plain(values: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """As many rounds of dense federated averaging in plain torch."""
    from benchmarks.gpu_simulation import plain_rounds  # noqa: PLC0415
    from benchmarks.timing import use_threads  # noqa: PLC0415
    from fedprune.config import RunConfig  # noqa: PLC0415
    from fedprune.rounds.workspace import open_workspace  # noqa: PLC0415

    use_threads(values["training.threads"])
    return {"rounds": plain_rounds(open_workspace(RunConfig.parse(values)), clock=clock)}


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def main() -> None:
    """Measure one side."""
    clock = processor_seconds if "--processor-time" in sys.argv else time.perf_counter
    side = {"ours": ours, "plain": plain}[sys.argv[1]]
    measured = side(json.load(sys.stdin), clock)
    from sparsemodel.storage.meter import peak_rss_bytes  # noqa: PLC0415

    measured["peak"] = peak_rss_bytes()
    measured["children"] = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
