"""Memory of a method's clients: in a process of their own, told by the kernel (Linux)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulations.comparison.cells import Cell
from simulations.comparison.presets import SHORT
from simulations.jobs import FINISHED, Outcome

if TYPE_CHECKING:
    from flwr.app import Context, Message


@dataclass(frozen=True)
class MemoryJob:
    """A short run of a cell on the CPU, all of whose clients answer in one process in turn."""

    cell: Cell
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its outcome."""
        return f"client-{self.cell.name}"

    def run(self, out: Path) -> Outcome:
        """The largest resident memory over all answers, that of the client that needs most."""
        settings = {**self.settings, **SHORT, "training.device": "cpu"}
        return Outcome(FINISHED, values={"peak_bytes": client_peak(self.cell, settings)})


def client_peak(cell: Cell, settings: Mapping[str, Any]) -> int:
    """Bytes: the high-water mark of the process of a run's clients."""
    from benchmarks.client_memory import client_process  # noqa: PLC0415
    from fedprune.flower.inline import InlineGrid  # noqa: PLC0415
    from fedprune.flower.server import GridCohort  # noqa: PLC0415
    from fedprune.rounds import folder as runfolder  # noqa: PLC0415
    from fedprune.rounds.loop import run  # noqa: PLC0415
    from fedprune.rounds.setup import Setup, lay_out  # noqa: PLC0415
    from prunelab.runs.temporary import temporary_folder  # noqa: PLC0415

    config, peak = cell.config(settings), 0
    with temporary_folder() as place, client_process() as process:

        def client(message: Message, context: Context) -> Message:
            nonlocal peak
            reply = process(message, context)
            peak = max(peak, *(measured.peak for measured in process.measured.values()))
            return reply

        setup = Setup(config, place / "setup")
        lay_out(config, setup.folder, with_start=True)
        grid = InlineGrid(
            client,  # type: ignore[arg-type]
            run_config={**config.flower(), "run.setup": str(setup.folder)},
            num_nodes=config.data.clients,
        )
        runfolder.prepare(place / "run", config, resume=False)
        with runfolder.open_run(place / "run") as folder:
            cohort = GridCohort(grid, setup)
            cohort.join()
            run(setup, cohort, folder)
    return peak
