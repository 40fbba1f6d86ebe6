"""A fleet in which three of ten clients fail in every round, in every way, and the server as well.

Runs FedTiny without faults, with them under each robust aggregation, and with them under the plain
mean. Every run is a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from prunelab.pages.units import format_bytes, mean_and_spread
from simulations.command import Call, parse
from simulations.faults import FAULTS
from simulations.faulty_grid import MEMORY_AT, SERVER_KILLS
from simulations.page import page, table
from simulations.pruning_cells import Result, run_cells

SHARE = 0.3
SETTINGS = {
    "data.dataset": "digits",
    "data.clients": 10,
    "model.name": "resnet8",
    "model.width": 8,
    "training.local_epochs": 1,
    "method.name": "fedtiny",
    "method.density": 0.1,
    "method.pool_size": 3,
    "method.adjust_every": 5,
    "federation.timeout": 20.0,
    "federation.quorum": 0.7,
    "federation.byzantine": SHARE,
}
PRESETS = {"quick": 40, "small": 200}
KINDS = ("multi-krum", "trimmed-mean", "clipped", "median")
CLEAN, PLAIN = "no faults, mean", "faults, mean"
ROWS = {
    CLEAN: ("mean", 0.0),
    PLAIN: ("mean", SHARE),
    **{f"faults, {kind}": (kind, SHARE) for kind in KINDS},
}
"""Row -> aggregation, and the share of the clients that fail."""


def run_alone(settings: Mapping[str, Any], share: float) -> Result:
    """One run in a fresh process: what it holds is its own."""
    command = [sys.executable, "-m", "simulations.faulty_grid", json.dumps(settings), str(share)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    call = parse("faulty_fleet", list(PRESETS))
    rounds = PRESETS[call.preset]
    cells, names = {}, dict[str, list[str]]()
    for row, (kind, share) in ROWS.items():
        for seed in call.seeds:
            own = {"seed": seed, "training.rounds": rounds, "federation.aggregation": kind}
            name = f"{row.replace(', ', '-').replace(' ', '-')}-s{seed}"
            cells[name] = partial(run_alone, {**SETTINGS, **own}, share)
            names.setdefault(row, []).append(name)
    results = run_cells(cells, call.out, settings={**SETTINGS, "training.rounds": rounds})
    rows = {row: [results[name] for name in own] for row, own in names.items()}
    call.save(_page(call, rows, rounds))


def _page(call: Call, rows: dict[str, list[Result]], rounds: int) -> str:
    body = [
        table(
            ["setting", "accuracy, %", "aborted runs", "rounds asked again", "answers left out",
             "answers used", "server killed"],
            [
                [
                    setting,
                    mean_and_spread([r["accuracy"] for r in own], ".1f", scale=100),
                    str(sum(bool(r["aborted"]) for r in own)),
                    *(str(sum(r[key] for r in own)) for key in
                      ("below_quorum", "left_out", "answers", "server_killed")),
                ]
                for setting, own in rows.items()
            ],
        ),
        "",
        "Memory of the whole process, server and all nodes, when a round begins:",
        "",
        table(
            ["setting", *(f"round {number}" for number in MEMORY_AT if number <= rounds)],
            [
                [
                    setting,
                    *(
                        format_bytes(max(r["memory"][str(number)] for r in own))
                        for number in MEMORY_AT
                        if number <= rounds
                    ),
                ]
                for setting, own in rows.items()
            ],
        ),
        "",
        "How clients fail:",
        "",
        *(f"- **{kind}**: {what}" for kind, what in FAULTS.items()),
    ]  # fmt: skip
    everybody = [result for own in rows.values() for result in own]
    return page(
        "A fleet that fails",
        command=call.command,
        at=", ".join(sorted({result["commit"] for result in everybody})),
        used=f", {call.threads} used",
        notes=[
            f"in every round {SHARE:.0%} of the clients fail, each in a way dealt from all below; "
            "other clients every 20 rounds; "
            f"the server is killed {SERVER_KILLS} times a run, and resumed",
            "accuracy on the test side after the last round, mean ± sample standard deviation over "
            "the seeds; sums over the seeds in the other columns",
            "test data decide nothing; nothing was tuned",
        ],
        body=body,
        settings={**SETTINGS, "training.rounds": rounds},
    )


if __name__ == "__main__":
    main()
