"""`fedprune device`: a device's side of a fleet, on the command line; none of it needs torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedprune.device.home import DEFAULT, VARIABLE, Profile, make_home, own_data, parse_bytes
from fedprune.errors import ConfigError
from prunelab.pages.console import say

device = typer.Typer(
    help="A device of a fleet: joins a server, trains under a memory budget, without torch.",
    no_args_is_help=True,
)

Home = Annotated[
    Path, typer.Option(envvar=VARIABLE, help="The device's folder of keys, profile and state.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
Budget = Annotated[str, typer.Option(help="Memory of a whole process: 128MB, 128MiB.")]


@device.command()
def init(  # noqa: PLR0917 - the command's options
    home: Home = DEFAULT,
    data: Annotated[
        str, typer.Option(help="Its own samples: a folder, a file, or module:function.")
    ] = "",
    budget: Budget = "0",
    threads: Annotated[int, typer.Option(help="Of training; 0: as many as a run says.")] = 0,
    client: Annotated[int, typer.Option(help="Its number in runs, 0 first; each another.")] = -1,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the profile; keys are never replaced.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Make this device: a pair of keys, and a profile of what it may use."""
    home = home.expanduser()
    profile = Profile(parse_bytes(budget), threads, own_data(data) if data else "", client)
    public = make_home(home, profile, force=force)
    say(f"public key: {public}")
    say("next, at the server:   fedprune server register node.pub")
    say("then, on this device:  fedprune device join HOST:PORT --root-certificates ca.crt")


@device.command()
def join(
    superlink: Annotated[str, typer.Argument(help="The server's HOST:PORT.")],
    root_certificates: Annotated[
        Path | None, typer.Option(help="The certificate of the server's authority, ca.crt.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Neither TLS nor keys; for trying out.")
    ] = False,
    home: Home = DEFAULT,
    debug: Debug = False,
) -> None:
    """Take part in the runs of a server, until a signal ends it; what dies is started again."""
    from fedprune.device import node  # noqa: PLC0415

    if insecure == (root_certificates is not None):
        raise ConfigError(
            "give the server's certificate, --root-certificates ca.crt; or --insecure, where all "
            "who can reach the server are trusted"
        )
    node.join(home.expanduser(), superlink, root_certificates=root_certificates, say=say)


@device.command()
def status(home: Home = DEFAULT, as_json: AsJson = False, debug: Debug = False) -> None:
    """Say what the node is doing: server, last answer, memory, samples, last error."""
    from fedprune.device.status import rows_of, status_of  # noqa: PLC0415

    found = status_of(home.expanduser())
    if as_json:
        print(json.dumps(found))
        return
    for name, value in rows_of(found):
        say(f"{name:<20}{value}")
