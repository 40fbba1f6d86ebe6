"""A SuperLink that is kept running: TLS, node keys, a data base that outlives it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from fedprune.fleet import certificates
from fedprune.fleet.processes import (
    POLL_SECONDS,
    START_SECONDS,
    Kept,
    check_port,
    flower_environment,
)
from fedprune.fleet.server import Server
from fedprune.flower.simulation import is_healthy
from prunelab.errors import RunError

DATABASE, LOG = "state.db", "superlink.log"
WARN_DAYS = 30


def superlink(server: Server, *, log: Path | None = None) -> Kept:
    """The SuperLink of a server's folder, not yet started."""
    folder = server.folder.resolve()
    command = ["flower-superlink", "--enable-supernode-auth", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(server.local_port)]
    command += ["--database", str(server.state.resolve() / DATABASE)]
    for option, file in (
        ("ca-certfile", certificates.AUTHORITY),
        ("certfile", certificates.SERVER),
        ("keyfile", certificates.SERVER_KEY),
    ):
        command += [f"--ssl-{option}", str(folder / file)]
    return Kept(lambda: command, flower_environment(server.state.resolve()), log)


def gate(server: Server) -> Kept:
    """What nodes on other machines reach, not yet started."""
    folder = server.folder.resolve()
    command = [sys.executable, "-m", "fedprune.fleet.gate", str(server.port), server.local_address]
    command += [str(folder / certificates.AUTHORITY), str(folder / certificates.SERVER)]
    command += [str(folder / certificates.SERVER_KEY)]
    return Kept(lambda: command, flower_environment(server.state.resolve()))


def start(server: Server, kept: Kept) -> None:
    """Start a SuperLink and wait until it answers.

    Raises:
        RunError: Flower lies where it makes no data base, the certificate has expired, the port is
            taken, or it does not start.
    """
    flower = find_spec("flwr")
    if flower is not None and flower.origin is not None:
        check_place(Path(flower.origin).resolve().parent)
    left = certificates.expiry(server.folder / certificates.SERVER) - datetime.now(UTC)
    if left.total_seconds() < 0:
        raise RunError(
            f"the certificate in {server.folder} has expired; make a new one with "
            f"`fedprune server renew {server.folder}`"
        )
    for port in {server.port, server.local_port}:
        check_port(port)
    kept.start()
    await_health(server, kept)


def check_place(flower: Path) -> None:
    """Refuse an environment in which Flower's SuperLink answers every question with an error.

    Flower 1.42 hands the folder of its tables on in a list that is parted at spaces and commas.
    Where none is found there it starts nevertheless, with an empty data base.

    Args:
        flower: where the package `flwr` lies.

    Raises:
        RunError: its path has a space or a comma.
    """
    if any(letter in " ," for letter in str(flower)):
        raise RunError(
            f"Flower's SuperLink makes no data base where its path has a space or a comma, {flower}"
            "; install fedprune in an environment elsewhere (python3 -m venv ~/fedprune)"
        )


def await_health(server: Server, kept: Kept) -> None:
    """Wait until a started SuperLink answers.

    Raises:
        RunError: it ended, or does not answer within two minutes.
    """
    deadline = time.monotonic() + START_SECONDS
    while not is_healthy(f"https://{server.local_address}", authority=server.authority):
        if not kept.is_running() or time.monotonic() > deadline:
            told = "what it printed says why" if kept.log is None else f"{kept.log} says why"
            kept.end()
            raise RunError(f"the SuperLink of {server.folder} did not start; {told}")
        time.sleep(POLL_SECONDS)


@contextmanager
def running(server: Server) -> Iterator[dict[str, Kept]]:
    """The processes of a server by name, for as long as the context lasts.

    Raises:
        RunError: as `start`.
    """
    kept = {"the SuperLink": superlink(server)}
    if server.hosts:
        kept["the gate"] = gate(server)
    try:
        start(server, kept["the SuperLink"])
        if server.hosts:
            kept["the gate"].start()
        yield kept
    finally:
        for process in reversed(kept.values()):
            process.end()


def serve(kept: Mapping[str, Kept], say: Callable[[str], None]) -> None:
    """Keep processes running until this one is interrupted."""
    while True:
        for name, process in kept.items():
            status = process.keep()
            if status is not None:
                say(f"{name} ended ({how(status)}); started again")
        time.sleep(POLL_SECONDS)


def warnings(server: Server) -> list[str]:
    """What its owner should know: certificates that expire soon."""
    soon = []
    for file, cure in (
        (certificates.SERVER, f"make a new one with `fedprune server renew {server.folder}`"),
        (certificates.AUTHORITY, "make a new server folder in time"),
    ):
        left = (certificates.expiry(server.folder / file) - datetime.now(UTC)).days
        if left < WARN_DAYS:
            soon.append(f"{server.folder / file} expires in {left} days; {cure}")
    return soon


def how(status: int) -> str:
    """An exit status in words.

    >>> how(-9), how(1)
    ('killed by signal 9', 'exit status 1')
    """
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
