"""One run of `benchmarks.scale` in a process of its own: `... < CONFIG.json`.

Prints one JSON object: processor seconds of a round and of the start, and the high-water mark of
this process at the end of its last round, in MiB.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.process_memory import resident


def measure(values: dict[str, Any]) -> dict[str, float]:
    """A whole run through the inline engine."""
    from fedprune.config import RunConfig  # noqa: PLC0415
    from fedprune.flower import server  # noqa: PLC0415
    from fedprune.rounds import loop, run  # noqa: PLC0415
    from prunelab.runs.temporary import temporary_folder  # noqa: PLC0415

    began: list[float] = []
    rounds: list[float] = []
    peaks: list[int] = []
    play_round, cohort = loop.play_round, server.GridCohort.__init__

    def begin(*arguments: Any, **named: Any) -> None:
        began.append(time.process_time())
        cohort(*arguments, **named)

    def timed(*arguments: Any) -> Any:
        start = time.process_time()
        began.append(start)
        state = play_round(*arguments)
        rounds.append(time.process_time() - start)
        peaks.append(resident("VmHWM"))
        return state

    loop.play_round, server.GridCohort.__init__ = timed, begin  # type: ignore[method-assign]
    try:
        with temporary_folder() as temporary:
            run.run(RunConfig.parse(values), Path(temporary) / "run", engine="inline")
    finally:
        loop.play_round, server.GridCohort.__init__ = play_round, cohort  # type: ignore[method-assign]
    return {
        "round": statistics.median(rounds[1:]),
        "start": began[1] - began[0],
        "peak": peaks[-1] / 2**20,
    }


def main() -> None:
    """Measure."""
    print(json.dumps(measure(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
