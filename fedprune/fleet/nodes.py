"""The nodes that a federation lets in: registered and revoked by Flower's own commands.

Flower knows nodes by numbers and tells nobody their keys, so the server's folder keeps which key
has which number.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from fedprune.fleet.processes import flower_environment
from fedprune.fleet.server import Server
from fedprune.flower.simulation import PLAIN, is_healthy
from prunelab.errors import RunError
from sparsemodel.storage.files import write_atomically

NODES = "nodes.json"
ONLINE, REVOKED = "online", "revoked"
UNREACHED = "Connection to the SuperLink is unavailable"
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_STATES = {"registered": "never seen", "unregistered": REVOKED}


class UnreachedError(RunError):
    """A SuperLink that does not answer."""


@dataclass(frozen=True)
class Node:
    """A node of a federation.

    Attributes:
        number: Flower's.
        status: "never seen", "online", "offline" or "revoked".
        since: when that began, as Flower tells it; "" where it does not.
        key: its key's fingerprint; "" where it was not registered here.
        name: that it was given here.
    """

    number: int
    status: str
    since: str = ""
    key: str = ""
    name: str = ""


def fingerprint(path: Path) -> str:
    """The fingerprint of a node's public key, as ssh-keygen shows it.

    Raises:
        RunError: the file is no key that Flower takes.
    """
    try:
        key = load_ssh_public_key(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise RunError(
            f"{path} is not a public key; give the file node.pub that `fedprune device init` made"
        ) from None
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise RunError(
            f"{path} is a key of another kind; Flower takes ecdsa keys of NIST's curves, as "
            "`fedprune device init` makes them"
        )
    text = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    blob = b64decode(text.split()[1])
    return f"SHA256:{b64encode(sha256(blob).digest()).decode().rstrip('=')}"


def register(server: Server, key: Path, *, name: str = "") -> int:
    """Let a node in from now on; its number.

    Raises:
        RunError: no key, a key that is known or was revoked, or a server that does not answer.
    """
    known, own = _known(server), fingerprint(key)
    for old in [old for old, node in known.items() if node["key"] == own]:
        states = {str(node.number): node.status for node in nodes(server)}
        if old in states:
            cure = ", and revoked for good: make the node a new key" * (states[old] == REVOKED)
            raise RunError(f"{key} was registered as node {old} already{cure}")
        del known[old]  # the server's state was lost
    try:
        answer = _flwr(server, "supernode", "register", str(key.resolve()), server.name)
    except RunError as error:
        if "already in use" not in str(error):
            raise
        raise RunError(
            f"the server knows {key} already, registered from elsewhere or revoked for good; "
            "`fedprune server nodes` shows what it knows"
        ) from None
    number = int(answer["node-id"])
    _write(server, {**known, str(number): {"key": own, "name": name}})
    return number


def revoke(server: Server, which: str) -> int:
    """Shut a node out from now on, for good; its number.

    Args:
        which: the file of its public key, its number, or its name.

    Raises:
        RunError: no such node, or a server that does not answer.
    """
    number = _number(server, which)
    try:
        _flwr(server, "supernode", "unregister", str(number), server.name)
    except RunError as error:
        if "not found" not in str(error):
            raise
        raise RunError(f"{which}: the server has no such node, or has revoked it") from None
    return number


def nodes(server: Server) -> list[Node]:
    """All nodes that the server knows, oldest first.

    Raises:
        RunError: the server does not answer.
    """
    known = _known(server)
    answer = _flwr(server, "supernode", "list", server.name, "--verbose")
    listed = []
    for node in answer["nodes"]:
        status = str(node["status"])
        since = {"online": "online-at", "offline": "offline-at", "unregistered": "deleted-at"}
        own = known.get(str(node["node-id"]), {})
        listed.append(
            Node(
                int(node["node-id"]),
                _STATES.get(status, status),
                str(node.get(since.get(status, "created-at"), "")),
                own.get("key", ""),
                own.get("name", ""),
            )
        )
    return listed


def flwr(arguments: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """What one of Flower's commands answers in JSON.

    Raises:
        RunError: it failed; says why in a line.
        UnreachedError: because the SuperLink does not answer.
    """
    done = subprocess.run(
        ["flwr", *arguments, "--format", "json"],
        env={**os.environ, **environment, **PLAIN},
        capture_output=True,
        text=True,
        check=False,
    )
    start = done.stdout.find("{")
    answer = json.loads(done.stdout[start:]) if start >= 0 else {}
    if done.returncode or not answer.get("success"):
        text = answer.get("error-message") or done.stderr or done.stdout
        raise failure(f"flwr {' '.join(arguments[:2])}", str(text))
    return dict(answer)


def failure(command: str, text: str) -> RunError:
    """The error of one of Flower's commands, by what it printed, in a line."""
    if UNREACHED in text:
        where = re.search(r"Using SuperLink: (.+)", text)
        return UnreachedError(f"{where[1] if where else 'the SuperLink'} does not answer")
    words = " ".join(text.translate(dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")).split())
    return RunError(f"{command} failed: {words[-1000:] or 'it says nothing'}")


def _flwr(server: Server, *arguments: str) -> dict[str, Any]:
    if not is_healthy(f"https://{server.local_address}", authority=server.authority):
        raise RunError(
            f"the server of {server.folder} does not answer at {server.local_address}; start it "
            f"with `fedprune server start {server.folder}`"
        )
    return flwr(list(arguments), flower_environment(server.state.resolve()))


def _number(server: Server, which: str) -> int:
    known = _known(server)
    if which.isdecimal():
        return int(which)
    own = fingerprint(Path(which)) if Path(which).is_file() else ""
    found = [n for n, node in known.items() if node["key"] == own or node["name"] == which]
    if len(found) > 1:  # a name passes from a key that was revoked to the next
        gone = {str(node.number) for node in nodes(server) if node.status == REVOKED}
        found = [number for number in found if number not in gone] or found
    if len(found) != 1:
        raise RunError(
            f"{which} names {len(found) or 'none'} of the nodes registered here; give the number "
            "that `fedprune server nodes` shows"
        )
    return int(found[0])


def _known(server: Server) -> dict[str, dict[str, str]]:
    path = server.folder / NODES
    try:
        found: dict[str, dict[str, str]] = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); move it away to go on without it") from None
    return found


def _write(server: Server, known: Mapping[str, Mapping[str, str]]) -> None:
    write_atomically(server.folder / NODES, json.dumps(known, indent=1).encode())
