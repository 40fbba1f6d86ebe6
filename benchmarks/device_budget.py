"""A client process under a memory budget for many rounds: does its peak, by the kernel, stay below?

    python -m benchmarks.device_budget [--quick] [--json]

A run of one client with 100 random pictures of 3×32×32, progressive pruning with growth every
fifth round (FedTiny), as a device has it: the real ClientApp in a process of its own, whose home
has a budget. The settings do not ask for recomputing: the budget does. `ours` is the largest
high-water mark of resident memory over all rounds, `peer` the budget; on standard error it says how
many messages had smaller batches. "joined" is `fedprune device join` on a real SuperLink, and the
mark that of its process. Works on Linux alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from benchmarks import fleet
from benchmarks.client_memory import MIB, MODEL, ClientProcess, settings
from benchmarks.deployment import device
from benchmarks.gpu_simulation import write_images
from benchmarks.rows import Row, add_arguments, show
from benchmarks.timing import use_threads
from fedprune.config import RunConfig
from fedprune.device.home import ANSWER, Profile, make_home, read_json
from fedprune.flower.inline import InlineGrid
from fedprune.flower.server import GridCohort
from fedprune.rounds import folder as runfolder
from fedprune.rounds.loop import run
from fedprune.rounds.setup import TRAIN, Setup, lay_out
from prunelab.runs.temporary import temporary_folder

BENCH = "device_budget"
SAMPLES, ROUNDS = 100, 100
BUDGETS_MIB = (180, 145, 120)  # room for all, for recomputing, for smaller batches alone
DEPLOYED_MIB, DEPLOYED_ROUNDS = 165, 20
DENSITY = 0.01


class BudgetedClient(ClientProcess):
    """A client whose node has a home; remembers what it said of each message."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self._home = home
        self.peak = 0
        self.fitted: list[str] = []
        self.errors: list[str] = []

    def __call__(self, message: Message, context: Context) -> Message:
        context.node_config["home"] = str(self._home)
        reply = super().__call__(message, context)
        self.peak = max(self.peak, *(measured.peak for measured in self.measured.values()))
        answer = read_json(self._home / ANSWER)
        self.fitted += filter(None, [answer.get("fitted")])
        self.errors += filter(None, [answer.get("error")])
        return reply


def rows(model: str, *, rounds: int) -> Iterator[Row]:
    """A row a budget."""
    with temporary_folder() as folder:
        data = folder / "data"
        data.mkdir()
        write_images(data, num_train=SAMPLES + 10, num_test=20)
        config = settings(model, DENSITY, data)
        training = replace(config.training, rounds=rounds, recompute=False)
        values = replace(config, training=training).flat()
        values |= {"method.adjust_every": 5, "method.adjust_until": rounds}
        config = RunConfig.parse(values)
        lay_out(config, folder / "setup", with_start=True)
        for budget in BUDGETS_MIB:
            client = under(config, folder, budget * MIB)
            changed = sum("instead of" in told for told in client.fitted)
            print(
                f"# {budget} MiB: {len(client.fitted)} messages, {changed} with smaller batches; "
                f"last: {client.fitted[-1:]}; refused: {client.errors[:1]}",
                file=sys.stderr,
            )
            if client.errors or client.peak > budget * MIB:
                raise RuntimeError(
                    f"{budget} MiB: {client.peak / MIB:.1f} MiB, {client.errors[:1]}"
                )
            case = f"{model} b16 {rounds} rounds, under {budget} MiB"
            yield Row(BENCH, case, DENSITY, client.peak / MIB, budget, "budget", "MiB")
        yield deployed(config, folder)


def deployed(config: RunConfig, folder: Path) -> Row:
    """The same on a real SuperLink, by `fedprune device join`, of a device with its own data."""
    setup = folder / "setup-deployed"

    def budgeted(home: Path, port: int, environment: dict[str, str], *, client: int = 0) -> Any:
        profile = Profile(DEPLOYED_MIB * MIB, data=str(setup / TRAIN), client=client)
        make_home(home / f"device{client}", profile)
        return device(home, port, environment, client=client)

    rounds = min(config.training.rounds, DEPLOYED_ROUNDS)
    config = replace(config, training=replace(config.training, rounds=rounds))
    lay_out(config, setup, with_start=True)
    looked, _ = fleet.run(config, budgeted, folder / "deployed", setup)
    answer = read_json(folder / "deployed" / "device0" / ANSWER)
    print(f"# joined: {answer.get('fitted')}", file=sys.stderr)
    case = f"{config.model.name} b16 {rounds} rounds, joined under {DEPLOYED_MIB} MiB"
    return Row(BENCH, case, DENSITY, looked.peak / MIB, DEPLOYED_MIB, "budget", "MiB")


def under(config: RunConfig, folder: Path, budget: int) -> BudgetedClient:
    """The whole run with a client whose process may hold so many bytes."""
    home = folder / f"home-{budget}"
    make_home(home, Profile(budget=budget, client=0))
    setup, client = Setup(config, folder / "setup"), BudgetedClient(home)
    try:
        run_config = {**config.flower(), "run.setup": str(setup.folder)}
        grid = InlineGrid(client, run_config=run_config, num_nodes=1)  # type: ignore[arg-type]
        out = folder / f"run-{budget}"
        runfolder.prepare(out, config, resume=False)
        with runfolder.open_run(out) as opened:
            cohort = GridCohort(grid, setup)
            cohort.join()
            run(setup, cohort, opened)
    finally:
        client.close()
    return client


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{BENCH}", description=__doc__)
    add_arguments(parser, quick="six rounds")
    parser.add_argument("--model", default=MODEL)
    arguments = parser.parse_args()
    use_threads(arguments.threads or 1)
    show(rows(arguments.model, rounds=6 if arguments.quick else ROUNDS), arguments)


if __name__ == "__main__":
    main()
