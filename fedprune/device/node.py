"""A device's node in a federation: Flower's SuperNode as a child, started again when it ends.

Flower's exit status says little (1 for every refusal), so its lines are read: what they mean is
written down here, in one place.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import tomli_w

from fedprune.device.home import (
    JOINED,
    LOG,
    NODE_CONFIG,
    PRIVATE,
    PUBLIC,
    Profile,
    read_json,
    write_json,
)
from prunelab.errors import RunError
from prunelab.runs.children import ended_with_parent
from prunelab.runs.folder import locked, write_file

COMMAND = "flower-supernode"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
# A SuperLink takes a node that was killed for alive until two heartbeats, of 30 s each, are missed.
HELD_SECONDS = 180.0
FIRST_WAIT, LONGEST_WAIT, HELD_WAIT = 1.0, 60.0, 10.0
STEADY_SECONDS = 60.0  # a node that was joined for so long begins anew with short waits
END_SECONDS = 10.0
LOG_BYTES = 1 << 20

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_JOINED = re.compile(r"SuperNode ID: (\d+)")
_RETRYING, _BACK = "Connection attempt failed, retrying", "Connection successful after"
_REFUSED = "[code: 2004]"  # unknown, revoked, or still held by a process that was killed
_CERTIFICATE = "CERTIFICATE_VERIFY_FAILED"
_NO_TLS = re.compile(r"\[SSL: \w+\]|SSL/TLS handshake error")
_EXIT = re.compile(r"Exit Code: (\d+)")
_CONNECTION = 305
_GRACEFUL, _ENDING = "SuperNode terminated gracefully", "Shutting down"

Say = Callable[[str], None]


@dataclass
class _Child:
    """What the lines of one SuperNode have said so far."""

    server: str
    joined: float = 0.0  # when; 0: not yet
    node: str = ""
    refused: bool = False
    graceful: bool = False
    ending: bool = False
    fatal: str = ""
    retries: int = 0
    exit_code: int = 0
    _lines: list[str] = field(default_factory=list)

    def hear(self, line: str) -> str:
        """Take in a line of Flower's; what a person should be told of it, mostly nothing."""
        text = _COLOURS.sub("", line).strip()
        if found := _JOINED.search(text):
            self.joined, self.node, self.retries = time.monotonic(), found[1], 0
            return f"joined {self.server} as node {self.node}"
        if _ENDING in text:
            self.ending = True
        elif _RETRYING in text:
            # One may be of the SuperExec, which waits for the SuperNode, or has lost it at its end.
            self.retries += not self.ending
            if self.retries == 2 and not self.ending:
                return f"{self.server} does not answer; trying until it does"
        elif _BACK in text:
            told, self.retries = self.retries >= 2, 0
            return f"{self.server} answers again" if told and self.joined else ""
        elif found := _EXIT.search(text):
            self.exit_code = int(found[1])
        elif _REFUSED in text:
            self.refused = True
        elif _GRACEFUL in text:
            self.graceful = True
        elif _CERTIFICATE in text:
            self.fatal = (
                f"the certificate of {self.server} is not the one expected ({text}); give the "
                "server's own ca.crt as --root-certificates, and the name that stands in it"
            )
        elif _NO_TLS.search(text) and not self.fatal:
            self.fatal = (
                f"{self.server} does not speak TLS as expected; is it another port, or a server "
                "without certificates (--insecure)?"
            )
        elif text:
            self._lines = [*self._lines[-4:], text]
        return ""

    def last_words(self) -> str:
        """For people, of a SuperNode that ended for a reason of its own."""
        return "; ".join(self._lines[-2:])


def join(
    home: Path, superlink: str, *, root_certificates: Path | None = None, say: Say = print
) -> None:
    """Be a node of a federation until a signal ends it.

    Args:
        home: of the device.
        superlink: host:port of the server.
        root_certificates: of the server; None: a connection without TLS and without keys.
        say: is told, a line each, what happens.

    Raises:
        ConfigError: the profile is none.
        RunError: another process has joined from this home; the server cannot be trusted, or
            refuses the device; says what to do.
    """
    command = _command(home, superlink, root_certificates)
    with locked(home, wait=0), _ended_by_signals():
        _write_node_config(home, Profile.read(home))
        was = read_json(home / JOINED)
        node = was.get("node", "") if was.get("superlink") == superlink else ""
        _note(home, superlink=superlink, node=node, state="joining")
        try:
            _keep_joined(home, superlink, command, say, known=bool(node))
        except SystemExit:
            _note(home, **(read_json(home / JOINED) | {"state": "ended"}))
            raise


def _keep_joined(home: Path, superlink: str, command: list[str], say: Say, *, known: bool) -> None:
    wait, held_since, revoked = FIRST_WAIT, 0.0, False
    while True:
        child, status = _run(home, superlink, command, say)
        known = known or bool(child.joined)
        if child.joined and time.monotonic() - child.joined > STEADY_SECONDS:
            wait = FIRST_WAIT
        if child.fatal:
            raise _given_up(home, child.fatal)
        if child.refused:
            now = time.monotonic()
            held_since = held_since or now
            if not known or revoked or now - held_since > HELD_SECONDS:
                raise _given_up(home, _refusal(home, superlink))
            if held_since == now:
                say(
                    f"{superlink} still counts this device's last process as online; trying again "
                    f"for up to {HELD_SECONDS / 60:.0f} minutes"
                )
            wait = min(wait, HELD_WAIT)
        elif child.exit_code not in (0, _CONNECTION):
            raise _given_up(home, f"{COMMAND} cannot run: {child.last_words()}")
        elif child.graceful and not child.joined:
            raise _given_up(
                home, f"{superlink} refuses this device's signature; is its clock right?"
            )
        else:
            held_since = 0.0
            # A server that no longer knows a node's key ends the node.
            revoked = child.graceful
            wait = FIRST_WAIT if revoked else wait
            why = "by the server" if child.graceful else f"with status {status}"
            say(f"the SuperNode was ended {why}; starting it again in {wait:.0f} s")
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def _run(home: Path, superlink: str, command: list[str], say: Say) -> tuple[_Child, int]:
    """One SuperNode to its end, which an exception here brings about: what it said, its status."""
    child = _Child(superlink)
    process = subprocess.Popen(
        ended_with_parent(*command, "--port", str(_free_port())),
        env=_environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C is ours to pass on
    )
    assert process.stdout is not None

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            _log(home, line)
            if news := child.hear(line):
                say(news)
                state = "joined" if child.joined and not child.retries else "server unreachable"
                node = child.node or read_json(home / JOINED).get("node", "")
                _note(home, superlink=superlink, node=node, state=state)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status = process.wait()
    finally:
        _end(process)
        reader.join(timeout=END_SECONDS)
        process.stdout.close()
    return child, status


def _end(process: subprocess.Popen[str]) -> None:
    """End the SuperNode, and what it has started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.5)


def _command(home: Path, superlink: str, root_certificates: Path | None) -> list[str]:
    found = shutil.which(COMMAND, path=_path())
    if found is None:
        raise RunError(f"no {COMMAND} here: pip install 'fedprune[device]'")
    command = [found, "--superlink", superlink, "--node-config", str(home / NODE_CONFIG)]
    if root_certificates is None:
        return [*command, "--insecure"]
    if not root_certificates.is_file():
        raise RunError(f"--root-certificates {root_certificates}: there is no such file")
    if not (home / PRIVATE).exists():
        raise RunError(f"{home} has no key; make a device by: fedprune device init")
    return [
        *command,
        "--root-certificates",
        str(root_certificates),
        "--auth-supernode-private-key",
        str(home / PRIVATE),
    ]


def _write_node_config(home: Path, profile: Profile) -> None:
    """What Flower tells the client app of this node."""
    if profile.client < 0:
        raise RunError(
            "which client of the run this device is has not been said: fedprune device init "
            "--force --client 0 (another number for each device)"
        )
    values = {"partition-id": profile.client, "home": str(home.resolve())}
    if profile.data:
        values["data-path"] = profile.data
    write_file(home / NODE_CONFIG, tomli_w.dumps(values).encode())


def _environment(home: Path) -> dict[str, str]:
    return {**os.environ, **QUIET, "FLWR_HOME": str(home.resolve() / "flwr"), "PATH": _path()}


def _path() -> str:
    """This interpreter's commands first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def _refusal(home: Path, superlink: str) -> str:
    return (
        f"{superlink} refuses this device's key: it is not registered there, was revoked, or is in "
        f"use elsewhere; at the server: fedprune server register {PUBLIC} (the file is "
        f"{home / PUBLIC}), then join again"
    )


def _given_up(home: Path, why: str) -> RunError:
    _note(home, **(read_json(home / JOINED) | {"state": "given up", "error": why}))
    return RunError(why)


def _note(home: Path, **values: str) -> None:
    """What `fedprune device status` shows of the node."""
    write_json(home / JOINED, {**values, "pid": os.getpid(), "time": time.time()})


def _log(home: Path, line: str) -> None:
    """Keep Flower's lines, at most two files of LOG_BYTES."""
    path = home / LOG
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_suffix(".1.log"))
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A SIGTERM or a Ctrl-C leaves what is inside, once, so that the child is ended too."""
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
