"""A whole federation on this machine: a SuperLink with TLS and node keys, and real nodes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedprune.device.keys import PRIVATE, PUBLIC, write_keys
from fedprune.fleet import nodes as registry
from fedprune.fleet.processes import POLL_SECONDS, START_SECONDS, Kept, flower_environment
from fedprune.fleet.server import SETTINGS, Server, init
from fedprune.fleet.superlink import LOG, await_health, superlink
from fedprune.fleet.superlink import start as start_superlink
from fedprune.flower.simulation import free_port
from prunelab.errors import DataError, RunError

NODE_LOG = "node.log"


@dataclass
class LocalNode:
    """One node of a local fleet.

    Attributes:
        home: its folder: key, state, log.
        number: that Flower knows its key by.
        kept: its process.
    """

    home: Path
    number: int
    server: Server
    kept: Kept

    def kill(self) -> None:
        """Kill it, as a power cut would."""
        self.kept.kill()

    def restart(self) -> None:
        """Start it again, after `kill`, without waiting until the SuperLink has missed it."""
        from fedprune.flower.rejoin import leave  # noqa: PLC0415 - it imports Flower

        leave(self.server.local_address, self.server.authority, self.home / PRIVATE, self.number)
        self.kept.start()

    def log(self) -> str:
        """What it has printed so far."""
        return (self.home / NODE_LOG).read_text(encoding="utf-8", errors="replace")


@dataclass
class Fleet:
    """A running local federation.

    Attributes:
        server: its folder and name; `fedprune run --superlink NAME` reaches it.
        superlink: the SuperLink's process.
    """

    server: Server
    superlink: Kept
    nodes: list[LocalNode]

    def restart_superlink(self) -> None:
        """Start the SuperLink again, after a kill, on the same port and data base."""
        self.superlink.start()
        await_health(self.server, self.superlink)

    def await_nodes(self, *, seconds: float = START_SECONDS) -> None:
        """Wait until all nodes are online.

        Raises:
            RunError: one has ended, or does not come.
        """
        deadline = time.monotonic() + seconds
        while True:
            found = registry.nodes(self.server)
            online = {node.number for node in found if node.status == registry.ONLINE}
            missing = [node for node in self.nodes if node.number not in online]
            if not missing:
                return
            dead = [node for node in missing if not node.kept.is_running()]
            if dead or time.monotonic() > deadline:
                first = (dead or missing)[0]
                raise RunError(
                    f"{len(missing)} of {len(self.nodes)} nodes do not come online; "
                    f"{first.home / NODE_LOG} says why"
                )
            time.sleep(POLL_SECONDS)

    def keep(self, say: Callable[[str], None]) -> None:
        """Start again what has ended, once; to be called now and then."""
        for what, kept in (
            ("the SuperLink", self.superlink),
            *((f"node {node.home.name}", node.kept) for node in self.nodes),
        ):
            if kept.keep() is not None:
                say(f"{what} had ended; started again")


@contextmanager
def fleet_up(
    folder: Path, *, nodes: int = 8, data: Path | None = None, name: str = "", port: int = 0
) -> Iterator[Fleet]:
    """A federation of real processes on 127.0.0.1, for as long as the context lasts.

    Keys and the server's folder are made where there are none; a folder of an earlier fleet goes
    on with what it has.

    Args:
        folder: for everything that is kept.
        nodes: how many; where `data` is given, as many as that has folders.
        data: a folder with one folder a node, its own samples: class folders, parquet, tables or
            stores; None: nodes take their share of the run's data set.
        name: of the connection in Flower's configuration; by default the folder's.
        port: of the SuperLink; 0: any that is free.

    Raises:
        DataError: `data` has no folders.
        RunError: something does not start; says what and where its log is.
    """
    own = _own_data(data)
    count = len(own) if own else nodes
    home = folder / "server"
    if (home / SETTINGS).exists():
        server = Server.read(home)
    else:
        server = init(home, name=name or folder.resolve().name, port=port or free_port())
    link = superlink(server, log=server.state / LOG)
    fleet = Fleet(server, link, [])
    try:
        start_superlink(server, link)
        numbers = {node.name: node.number for node in registry.nodes(server)}
        for place in range(count):
            node = _node(server, folder / "nodes" / f"{place}", place, own, numbers)
            fleet.nodes.append(node)
            node.kept.start()
        fleet.await_nodes()
        yield fleet
    finally:
        for kept in (*(node.kept for node in fleet.nodes), link):
            kept.end()


def node_command(server: Server, home: Path, *, place: int, data: Path | None = None) -> list[str]:
    """The command of one node.

    Args:
        home: its folder, with its key.
        place: its partition-id.
        data: its own samples; None: its share of the run's data set.
    """
    config = f"partition-id={place}"
    if data is not None:
        config += f" data-path={json.dumps(str(data.resolve()))}"
    command = ["flower-supernode", "--superlink", server.local_address]
    command += ["--root-certificates", str(server.authority.resolve())]
    command += ["--auth-supernode-private-key", str((home / PRIVATE).resolve())]
    command += ["--node-config", config, "--host", "127.0.0.1", "--port", str(free_port())]
    return command


def _node(
    server: Server, home: Path, place: int, own: list[Path], numbers: dict[str, int]
) -> LocalNode:
    state = home / "state"
    state.mkdir(parents=True, exist_ok=True)
    if not (home / PRIVATE).exists():
        write_keys(home)
    number = numbers.get(home.name)
    if number is None:
        number = registry.register(server, home / PUBLIC, name=home.name)
    data = own[place] if own else None
    kept = Kept(
        lambda: node_command(server, home, place=place, data=data),
        # One folder for all: what a run starts from is then laid out once.
        {**flower_environment(state.resolve()), "TMPDIR": str(server.state.resolve())},
        home / NODE_LOG,
    )
    return LocalNode(home, number, server, kept)


def _own_data(data: Path | None) -> list[Path]:
    if data is None:
        return []
    found = sorted(path for path in data.iterdir() if path.is_dir() and path.name[0] != ".")
    if not found:
        raise DataError(f"{data} has no folders; it takes one for each node")
    return found
