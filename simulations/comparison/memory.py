"""Memory of one client of a method: a process of its own, told by the kernel (Linux)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.comparison.cells import Cell
from simulations.comparison.jobs import FINISHED, Outcome


@dataclass(frozen=True)
class MemoryJob:
    """A short run of a cell with one client, which has the share of one of its clients.

    Attributes:
        settings: of the cells, and what makes the run short.
        share: how many samples the client has, and the server's few.
    """

    cell: Cell
    settings: Mapping[str, Any]
    share: int

    @property
    def name(self) -> str:
        """Of its outcome."""
        return f"memory-{self.cell.name}"

    def run(self, out: Path) -> Outcome:
        """The high-water mark of resident memory over all that the client answers."""
        settings = {
            **self.settings,
            "data.clients": 1,
            "data.num_train": self.share,
            "training.device": "cpu",
        }
        return Outcome(FINISHED, values={"peak_bytes": client_peak(self.cell, settings)})


def client_peak(cell: Cell, settings: Mapping[str, Any]) -> int:
    """Bytes: the largest resident memory of the process of a run's one client."""
    from benchmarks.client_memory import client_process  # noqa: PLC0415
    from fedprune.flower.inline import InlineGrid  # noqa: PLC0415
    from fedprune.flower.server import GridCohort  # noqa: PLC0415
    from fedprune.rounds import folder as runfolder  # noqa: PLC0415
    from fedprune.rounds.loop import run  # noqa: PLC0415
    from fedprune.rounds.setup import Setup, lay_out  # noqa: PLC0415
    from prunelab.runs.temporary import temporary_folder  # noqa: PLC0415

    config = cell.config(settings)
    with temporary_folder() as place, client_process() as client:
        setup = Setup(config, place / "setup")
        lay_out(config, setup.folder, with_start=True)
        run_config = {**config.flower(), "run.setup": str(setup.folder)}
        grid = InlineGrid(client, run_config=run_config, num_nodes=1)  # type: ignore[arg-type]
        runfolder.prepare(place / "run", config, resume=False)
        with runfolder.open_run(place / "run") as folder:
            cohort = GridCohort(grid, setup)
            cohort.join()
            run(setup, cohort, folder)
        return max(measured.peak for measured in client.measured.values())
