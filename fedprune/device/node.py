"""A device's part in a federation: one process at a time, and what `status` shows of it."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType

from fedprune.device.home import (
    JOINED,
    LOG,
    PRIVATE,
    STATE,
    TEMPORARY,
    Profile,
    read_json,
    write_json,
)
from fedprune.errors import ConfigError
from prunelab.errors import RunError
from prunelab.runs.folder import locked

LOG_BYTES = 1 << 20  # of each of two files

Say = Callable[[str], None]


def join(
    home: Path, superlink: str, *, root_certificates: Path | None = None, say: Say = print
) -> None:
    """Be a node of a federation until a signal ends it.

    Args:
        home: of the device.
        superlink: host:port of the server.
        root_certificates: of the server; None: a connection without TLS.
        say: is told, a line each, what happens.

    Raises:
        ConfigError: the profile is none, or the address.
        RunError: another process has joined from this home; the server cannot be trusted, or
            refuses the device; says what to do.
    """
    host, _, port = superlink.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"{superlink!r} is no address; give HOST:PORT, fleet.example.org:8000")
    profile = Profile.read(home)
    if profile.client < 0:
        raise ConfigError(
            "which client of a run this device is has not been said: fedprune device init "
            "--force --client 0 (another number for each device)"
        )
    if root_certificates is not None and not root_certificates.is_file():
        raise RunError(f"--root-certificates {root_certificates}: there is no such file")
    config: dict[str, str | int] = {"partition-id": profile.client, "home": str(home.resolve())}
    if profile.data:
        config["data-path"] = profile.data
    # `status` holds the lock for a moment to see whether it is held.
    with locked(home, wait=1), _ended_by_signals(), _logging(home), _own_temporary(home):
        # Takes a second, which a refused profile need not.
        from fedprune.flower.node.node import NodeSettings, run_node  # noqa: PLC0415

        def tell(state: str, text: str) -> None:
            say(text)
            logging.getLogger(__name__).info(text)
            _note(home, superlink, state=state, text=text)

        settings = NodeSettings(
            superlink,
            home / STATE,
            home / PRIVATE,
            root_certificates=root_certificates,
            config=config,
            packages=profile.packages,
        )
        _note(home, superlink, state="joining")
        try:
            run_node(settings, tell=tell)
        except RunError as error:
            _note(home, superlink, state="given up", text=str(error))
            raise
        finally:
            last = read_json(home / JOINED)
            if last.get("state") != "given up":
                _note(home, superlink, state="ended", text=str(last.get("text", "")))


def _note(home: Path, superlink: str, *, state: str, text: str = "") -> None:
    """What `fedprune device status` shows of the node."""
    now = {"superlink": superlink, "state": state, "text": text}
    write_json(home / JOINED, {**now, "pid": os.getpid(), "time": time.time()})


@contextmanager
def _logging(home: Path) -> Iterator[None]:
    """What is said of messages goes into the home: no server reads it."""
    handler = RotatingFileHandler(home / LOG, maxBytes=LOG_BYTES, backupCount=1, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for every look
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


@contextmanager
def _own_temporary(home: Path) -> Iterator[None]:
    """Temporary files lie in the home: a store of the samples outlives a start of the machine."""
    own, before = home.resolve() / TEMPORARY, os.environ.get("TMPDIR")
    own.mkdir(exist_ok=True, mode=0o700)
    os.environ["TMPDIR"], tempfile.tempdir = str(own), None
    try:
        yield
    finally:
        tempfile.tempdir = None
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A SIGTERM or a Ctrl-C leaves what is inside, once."""
    ends = (signal.SIGTERM, signal.SIGINT)

    def end(number: int, frame: FrameType | None) -> None:
        for each in ends:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(0)

    before = [signal.signal(each, end) for each in ends]
    try:
        yield
    finally:
        for each, handler in zip(ends, before, strict=True):
            signal.signal(each, handler)
