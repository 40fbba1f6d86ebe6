"""One client in a process of its own, for `benchmarks.client_memory`; imports nothing by itself.

It reads pickled (message, context) from its standard input, lets the ClientApp of
`fedprune.flower.client` answer, and writes pickled (reply, state of the context, Measured).
"""

from __future__ import annotations

import copyreg
import pickle
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.process_memory import reset_high_water, resident


@dataclass(frozen=True)
class Measured:
    """What the kernel and the clock say of one message.

    Attributes:
        peak: largest resident memory since the message before, or since the start, in bytes.
        resident: resident memory after it.
        imported: resident memory after each import before the first message, by what it is.
        import_seconds: of the ClientApp's own imports, after Flower's.
        first_step_seconds: from the message to the end of its first training step; NaN: none.
        torch: whether torch is in the process.
    """

    peak: int
    resident: int
    imported: dict[str, int]
    import_seconds: float
    first_step_seconds: float
    torch: bool


def _pickled(view: memoryview) -> tuple[type, tuple[bytes]]:
    return memoryview, (bytes(view),)


copyreg.pickle(memoryview, _pickled)  # Flower cuts large arrays into views


def main() -> None:
    """Answer messages until there are no more."""
    imported = {"interpreter": resident("VmRSS")}
    import numpy  # noqa: F401, PLC0415

    imported["numpy"] = resident("VmRSS")
    import flwr.app  # noqa: PLC0415
    import flwr.clientapp  # noqa: F401, PLC0415
    from flwr.supercore.task_identity import TaskIdentity  # noqa: PLC0415

    imported["Flower's client"] = resident("VmRSS")
    started = time.perf_counter()
    from fedprune.flower.client import app  # noqa: PLC0415
    from fedprune.local import training  # noqa: PLC0415

    import_seconds = time.perf_counter() - started
    imported["ClientApp"] = resident("VmRSS")
    # Message's constructor reads these process-wide identities.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    epoch_batches = training.epoch_batches
    while True:
        try:
            message, context = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        started, first = time.perf_counter(), float("nan")

        def timed(*arguments: Any, **named: Any) -> Iterator[Any]:
            nonlocal first
            for batch in epoch_batches(*arguments, **named):
                yield batch  # and the step is made
                if first != first:  # noqa: PLR0124 - NaN until now
                    first = time.perf_counter() - started  # noqa: B023

        training.epoch_batches = timed
        reply = app(message, context)
        measured = Measured(
            resident("VmHWM"),
            resident("VmRSS"),
            imported,
            import_seconds,
            first,
            "torch" in sys.modules,
        )
        pickle.dump((reply, context.state, measured), sys.stdout.buffer)
        sys.stdout.buffer.flush()
        del message, context, reply
        reset_high_water()


if __name__ == "__main__":
    main()
