"""`fedprune server ...` and `fedprune fleet ...`."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from fedprune.trained.commands import Debug
from prunelab.pages.console import errors, escaped, say, show_table

server = typer.Typer(
    help="The server of a federation: certificates, SuperLink, nodes.", no_args_is_help=True
)
fleet = typer.Typer(help="A whole federation on this machine, to try out.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The server's folder.", metavar="DIR")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="A name or address by which nodes reach it; may be repeated."),
]


@server.command()
def init(
    folder: Folder,
    hosts: Hosts = None,
    name: Annotated[str, typer.Option(help="For Flower's commands; default: the folder's.")] = "",
    port: Annotated[int | None, typer.Option(help="That it listens on; default: 8000.")] = None,
    debug: Debug = False,
) -> None:
    """Make a server's folder: authority, certificate, settings, state, and a connection."""
    from fedprune.fleet import server as servers  # noqa: PLC0415
    from fedprune.fleet.connections import CONFIG, flower_home  # noqa: PLC0415

    made = servers.init(folder, hosts=tuple(hosts or ()), name=name, port=port or servers.PORT)
    say(f"made {folder}; keep ca.key and server.key in it to yourself, back the folder up")
    say(f"every node needs {made.authority}")
    say(f"Flower's commands reach it as {made.name} ({flower_home() / CONFIG})")
    if not made.hosts:
        say("it listens on 127.0.0.1 alone; --host gives it a name for other machines")
    say(f"next: fedprune server start {folder}")


@server.command()
def renew(folder: Folder, hosts: Hosts = None, debug: Debug = False) -> None:
    """Make a new certificate by the same authority; nodes need nothing new."""
    from fedprune.fleet import server as servers  # noqa: PLC0415

    made, expires = servers.renew(folder, hosts=tuple(hosts or ()))
    names = ", ".join(made.hosts) or "127.0.0.1"
    say(f"the certificate of {names} is valid until {expires:%Y-%m-%d}")
    say("restart the server, which reads it when it starts")


@server.command()
def start(
    folder: Folder,
    port: Annotated[int | None, typer.Option(help="Another port, from now on.")] = None,
    debug: Debug = False,
) -> None:
    """Run the SuperLink until Ctrl-C; where it dies it is started again."""
    from fedprune.fleet import superlink  # noqa: PLC0415
    from fedprune.fleet.server import Server, move  # noqa: PLC0415

    _end_as_interrupted()
    own = Server.read(folder)
    if port is not None and port != own.port:
        own = move(own, port)
    try:
        with superlink.running(own) as kept:
            say(f"{folder} listens on port {own.port}; Flower's commands know it as {own.name}")
            for line in superlink.warnings(own):
                errors.print(f"[yellow]warning:[/yellow] {escaped(line)}", soft_wrap=True)
            superlink.serve(kept, say)
    except KeyboardInterrupt:
        say("ended")


@server.command()
def register(
    folder: Folder,
    keys: Annotated[list[Path], typer.Argument(help="Public keys of nodes: node.pub.")],
    name: Annotated[str, typer.Option(help="What to call the node here.")] = "",
    debug: Debug = False,
) -> None:
    """Let nodes in, by their public keys."""
    from fedprune.fleet import nodes as registry  # noqa: PLC0415
    from fedprune.fleet.server import Server  # noqa: PLC0415

    own = Server.read(folder)
    for key in keys:
        say(f"{key}: node {registry.register(own, key, name=name)}")


@server.command()
def revoke(
    folder: Folder,
    node: Annotated[str, typer.Argument(help="Its public key, number or name.")],
    debug: Debug = False,
) -> None:
    """Shut a node out, for good: its key is never taken again."""
    from fedprune.fleet import nodes as registry  # noqa: PLC0415
    from fedprune.fleet.server import Server  # noqa: PLC0415

    say(f"revoked node {registry.revoke(Server.read(folder), node)}")


@server.command()
def nodes(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """List the nodes that the server knows."""
    from fedprune.fleet import nodes as registry  # noqa: PLC0415
    from fedprune.fleet.server import Server  # noqa: PLC0415

    found = registry.nodes(Server.read(folder))
    if as_json:
        print(json.dumps([dataclasses.asdict(node) for node in found]))
        return
    rows = [[str(n.number), n.name, n.status, n.since, n.key] for n in found]
    show_table(["node", "name", "status", "since", "key"], rows)


@fleet.command()
def up(
    *,
    number: Annotated[int, typer.Option("--nodes", min=1, help="How many nodes.")] = 8,
    folder: Annotated[Path, typer.Option("--dir", help="Where everything is kept.")] = Path(
        "fleet"
    ),
    data: Annotated[
        Path | None, typer.Option(help="A folder with one folder of samples for each node.")
    ] = None,
    name: Annotated[str, typer.Option(help="For Flower's commands; default: the folder's.")] = "",
    port: Annotated[
        int | None, typer.Option(min=1, help="That it listens on; default: any that is free.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a server and its nodes on this machine until Ctrl-C, with TLS and node keys."""
    from fedprune.fleet.local import fleet_up  # noqa: PLC0415
    from fedprune.fleet.superlink import serve  # noqa: PLC0415

    _end_as_interrupted()
    try:
        say(f"starting a SuperLink and nodes in {folder}, which takes some seconds")
        with fleet_up(folder, nodes=number, data=data, name=name, port=port or 0) as running:
            say(f"{len(running.nodes)} nodes are online; everything lies in {folder}")
            say(f"try: fedprune run --superlink {running.server.name} --rounds 5")
            say("Ctrl-C ends it")
            serve(running.kept(), say)
    except KeyboardInterrupt:
        say("ended")


def _end_as_interrupted() -> None:
    """Let systemd's SIGTERM end the command as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
