"""`fedprune device`: a device's side of a fleet, on the command line; none of it needs torch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedprune.device.home import (
    DEFAULT,
    PROFILE,
    VARIABLE,
    Profile,
    make_home,
    own_data,
    parse_bytes,
)
from fedprune.errors import ConfigError
from prunelab.pages.console import say, show_table

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
_MODEL = "A built-in network's name, or a file of a program's text; default resnet18."
Model = Annotated[str, typer.Option(help=_MODEL, show_default=False)]
Density = Annotated[float, typer.Option(help="Share of the pruned layers' weights, 0 to 1.")]


@device.command()
def init(  # noqa: PLR0917 - the command's options
    home: Home = DEFAULT,
    data: Annotated[
        str, typer.Option(help="Its own samples: a folder, a file, or module:function.")
    ] = "",
    budget: Budget = "0",
    threads: Annotated[int, typer.Option(help="Of training; 0: as many as a run says.")] = 0,
    client: Annotated[int, typer.Option(help="Its number in runs, 0 first; each another.")] = -1,
    allow: Annotated[
        str, typer.Option(help="Installed packages whose functions a run may name: a,b.")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Replace the profile; keys are never replaced.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Make this device: a pair of keys, and a profile of what it may use."""
    home = home.expanduser()
    profile = Profile(parse_bytes(budget), threads, own_data(data) if data else "", client, allow)
    public = make_home(home, profile, force=force)
    say(f"public key: {public}")
    say("next, at the server:   fedprune server register DIR node.pub")
    say("then, on this device:  fedprune device join HOST:PORT --root-certificates ca.crt")


@device.command()
def join(
    superlink: Annotated[str, typer.Argument(metavar="HOST:PORT")],
    root_certificates: Annotated[
        Path | None, typer.Option(help="The certificate of the server's authority, ca.crt.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS; for trying out.")] = False,
    home: Home = DEFAULT,
    debug: Debug = False,
) -> None:
    """Take part in the runs of a server, until a signal ends it."""
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


@device.command()
def bench(  # noqa: PLR0917 - the command's options
    budget: Budget = "0",
    model: Model = "resnet18",
    density: Density = 0.01,
    threads: Annotated[int, typer.Option(help="To try beside one; 0: all processors.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure which batches, with and without recomputing, fit a budget, and seconds a step."""
    from fedprune.device import bench as measuring  # noqa: PLC0415
    from prunelab.pages.units import format_bytes  # noqa: PLC0415

    limit = parse_bytes(budget)
    fits = list(measuring.bench(model, density=density, budget=limit, threads=threads))
    alone = measuring.best(fits, of=lambda fit: fit.fits)
    node = measuring.best(fits, of=lambda fit: fit.fits_flower)
    if as_json:
        chosen = {
            "alone": alone and alone.to_dict(),
            "node": node and node.to_dict(),
            "tried": [fit.to_dict() for fit in fits],
        }
        print(json.dumps(chosen))
        return
    show_table(
        ["batch", "recompute", "threads", "s a step", "samples/s", "alone", "as a node", "fits"],
        [
            [
                str(fit.batch_size), "yes" if fit.recompute else "no", str(fit.threads),
                f"{fit.step_seconds:.3f}", f"{fit.speed:.0f}", format_bytes(fit.peak_bytes),
                format_bytes(fit.flower_bytes) if fit.flower_bytes else "no Flower",
                "both" if fit.fits_flower else "alone" if fit.fits else "no",
            ]
            for fit in fits
        ],
    )  # fmt: skip
    for what, fit in (("alone (run-local)", alone), ("as a node (join)", node)):
        way = "nothing fits the budget" if fit is None else (
            f"batches of {fit.batch_size}{', recompute' if fit.recompute else ''}, "
            f"{fit.threads} thread(s), {fit.step_seconds:.3f} s a step"
        )  # fmt: skip
        say(f"{what}: {way}")


@device.command(name="run-local")
def run_local(  # noqa: PLR0917 - the command's options
    data: Annotated[
        str | None, typer.Option(help="Its samples: a folder, a file; default: the profile's.")
    ] = None,
    model: Annotated[str | None, typer.Option(help=_MODEL)] = None,
    start: Annotated[
        Path | None, typer.Option(help="A sparse model.safetensors of a run to train on from.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Of a random start; default 0.01.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Default 10.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="At most; default 16.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default 0.05.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides every random choice.")] = None,
    budget: Annotated[str | None, typer.Option(help="Default: the profile's.")] = None,
    threads: Annotated[int | None, typer.Option(help="Default: the profile's, else 1.")] = None,
    out: Annotated[Path, typer.Option(help="The folder of the model.")] = Path("runs/local"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    home: Home = DEFAULT,
    debug: Debug = False,
) -> None:
    """Train a sparse model on this device's own samples alone; nothing leaves it."""
    home = home.expanduser()
    profile = Profile.read(home) if (home / PROFILE).exists() else Profile()
    given = {
        "data": own_data(data) if data else None, "model": model, "density": density,
        "start": str(start.resolve()) if start else None, "epochs": epochs,
        "batch_size": batch_size, "lr": lr, "seed": seed,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    if not resume and "data" not in given:
        if not profile.data:
            raise ConfigError("no samples: give --data, or make a device with --data")
        given["data"] = profile.data
    asked = {
        "given": given, "out": str(out), "budget": budget or str(profile.budget),
        "threads": threads or profile.threads or 1, "resume": resume, "debug": debug,
    }  # fmt: skip
    # In this process's place: the command line's imports would count as its memory.
    os.execv(sys.executable, [sys.executable, "-m", "fedprune.device.alone", json.dumps(asked)])
