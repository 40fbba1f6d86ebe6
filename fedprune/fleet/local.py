"""A whole federation on this machine: a SuperLink with TLS and node keys, and real nodes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedprune.device.home import PROFILE, PUBLIC, TEMPORARY, Profile, make_home
from fedprune.fleet import nodes as registry
from fedprune.fleet.processes import START_SECONDS, Kept, flower_environment
from fedprune.fleet.server import SETTINGS, Server, init, move
from fedprune.fleet.superlink import LOG, await_health, superlink
from fedprune.fleet.superlink import start as start_superlink
from fedprune.flower.simulation import free_port
from prunelab.data.folders import shown_folders
from prunelab.errors import DataError, RunError

NODE_LOG = "node.log"
LIST_SECONDS = 1.0


@dataclass
class LocalNode:
    """One node of a local fleet.

    Attributes:
        home: the device's home; its log lies there too.
        number: that Flower knows its key by.
        kept: its process.
    """

    home: Path
    number: int
    kept: Kept

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
            time.sleep(LIST_SECONDS)

    def kept(self) -> dict[str, Kept]:
        """All processes by name, as `fedprune.fleet.superlink.serve` takes them."""
        named = {f"node {node.home.name}": node.kept for node in self.nodes}
        return {"the SuperLink": self.superlink, **named}


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
        name: of the connection in Flower's configuration, of a new folder; by default the folder's.
        port: of the SuperLink; 0: that of before, at first any that is free.

    Raises:
        DataError: `data` has no folders.
        RunError: something does not start; says what and where its log is.
    """
    own = _own_data(data)
    count = len(own) if own else nodes
    home = folder / "server"
    if (home / SETTINGS).exists():
        server = Server.read(home)
        if port not in (0, server.port):
            server = move(server, port)
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


def node_command(server: Server, home: Path) -> list[str]:
    """The command of one node, a device with this home."""
    return [
        sys.executable, "-m", "fedprune", "device", "join", server.local_address,
        "--root-certificates", str(server.authority.resolve()), "--home", str(home.resolve()),
    ]  # fmt: skip


def _node(
    server: Server, home: Path, place: int, own: list[Path], numbers: dict[str, int]
) -> LocalNode:
    if not (home / PROFILE).exists():
        make_home(home, Profile(client=place, data=str(own[place].resolve()) if own else ""))
        # One folder for all: what a run starts from is then laid out once.
        (home / TEMPORARY).symlink_to(server.state.resolve())
    number = numbers.get(home.name)
    if number is None:
        number = registry.register(server, home / PUBLIC, name=home.name)
    environment = flower_environment(home.resolve() / "flwr")
    kept = Kept(lambda: node_command(server, home), environment, home / NODE_LOG)
    return LocalNode(home, number, kept)


def _own_data(data: Path | None) -> list[Path]:
    if data is None:
        return []
    if not data.is_dir():
        raise DataError(f"{data} is not a folder; it takes one with a folder for each node")
    found = shown_folders(data)
    if not found:
        raise DataError(f"{data} has no folders; it takes one for each node")
    return found
