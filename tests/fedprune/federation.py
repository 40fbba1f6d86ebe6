"""A small real federation, run in this process."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedprune.config import RunConfig, own_settings
from fedprune.flower import client, server
from fedprune.flower.inline import InlineGrid
from fedprune.flower.launch import launch_values
from fedprune.local.site import Local, open_data
from fedprune.rounds.folder import MODEL, prepare
from fedprune.rounds.setup import Setup
from fedprune.rounds.workspace import open_workspace

TINY = {
    "seed": 7,
    "data.num_train": 300,
    "data.num_test": 60,
    "data.clients": 4,
    "model.width": 4,
    "training.rounds": 4,
    "training.local_epochs": 1,
    "method.density": 0.2,
    "method.pool_size": 2,
    "method.adjust_every": 1,
    "method.adjust_until": 4,
}

ClientApp = Callable[[Message, Context], Message | None]


def tiny(**changes: Any) -> RunConfig:
    """The small federation's configuration; `data__clients=3` stands for data.clients = 3.

    Settings that the method does not have are left out.
    """
    values = {**TINY, **{k.replace("__", "."): v for k, v in changes.items()}}
    return RunConfig.parse(own_settings(values))


def run_inline(
    config: RunConfig,
    out: Path,
    *,
    clients: ClientApp | None = None,
    resume: bool = False,
    grid: type[InlineGrid] = InlineGrid,
) -> Path:
    """Run the real ServerApp over an in-process grid; `clients`, and the grid, may misbehave."""
    prepare(out, config, resume=resume)
    with tempfile.TemporaryDirectory() as temporary:
        setup = Path(temporary) / "setup"
        open_workspace(config).lay_out(setup, with_start=True)
        values = {**config.flower(), **launch_values(out, resume=resume, setup=setup)}
        nodes = grid(
            clients or client.app,  # type: ignore[arg-type]
            run_config=values,
            num_nodes=config.data.clients,
        )
        context = Context(
            run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=values
        )
        server.app(nodes, context)
    return out


def digest(out: Path) -> str:
    return hashlib.sha256((out / MODEL).read_bytes()).hexdigest()


def places_of(setup: Setup) -> list[Local]:
    """The places of a laid-out federation's clients."""
    config, folder = setup.config, str(setup.folder)
    return [
        Local(client, open_data(config, client, setup=folder), config, setup.network)
        for client in range(config.data.clients)
    ]


def laid_out(folder: Path, **changes: Any) -> Setup:
    """What a small federation starts from, in a folder."""
    config = tiny(**changes)
    open_workspace(config).lay_out(folder, with_start=True)
    return Setup(config, folder)
