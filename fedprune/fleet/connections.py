"""Names by which Flower's commands reach a SuperLink: tables of its own configuration file."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from prunelab.errors import RunError
from sparsemodel.storage.files import write_atomically

# What Flower writes where there is no file yet; without it `flwr run .` would know no simulation.
_FIRST = '[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local:"\n'
CONFIG = "config.toml"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def flower_home() -> Path:
    """The folder in which Flower's commands of this user keep their configuration."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")


def connection(name: str) -> dict[str, Any]:
    """What the user's configuration of Flower says of a connection.

    Raises:
        RunError: there is no such connection, or the file cannot be read.
    """
    path = flower_home() / CONFIG
    known = _connections(path)
    found = known.get(name)
    if not isinstance(found, dict):
        names = sorted(key for key, value in known.items() if isinstance(value, dict))
        raise RunError(
            f"{path} has no connection {name!r}; it has {', '.join(names) or 'none'} "
            "(`fedprune server init` and `fedprune fleet up` make one)"
        )
    return found


def check_name(name: str) -> None:
    """Raise RunError unless a connection may be called that."""
    if not _NAME.fullmatch(name) or name == "default":
        raise RunError(
            f"a connection of Flower's cannot be called {name!r}: use letters, digits, - and _ "
            "(--name)"
        )


def write_connection(home: Path, name: str, *, address: str, root_certificates: Path) -> Path:
    """Add a connection to Flower's configuration, or change its address; the rest is untouched.

    Args:
        home: Flower's folder, of a user (see `flower_home`) or of a server.

    Returns:
        The file.

    Raises:
        RunError: the name is taken by another federation, or the file cannot be read or written.
    """
    check_name(name)
    path = home / CONFIG
    known, values = _connections(path), _values(address, root_certificates)
    if known.get(name) == values:
        return path
    text = path.read_text(encoding="utf-8") if path.exists() else _FIRST
    if name in known:
        if known[name].get("root-certificates") != values["root-certificates"]:
            raise RunError(
                f"{path} has a connection {name!r} to another federation, which stays as it is; "
                "choose another name with --name"
            )
        text = _without(text, name)
    table = tomli_w.dumps({"superlink": {name: values}})
    text = f"{text.rstrip()}\n\n{table[table.index(f'[superlink.{name}]') :]}"
    if path.exists() and not _says(text, {**known, name: values}):
        raise RunError(f"{path} is written in a way that cannot be added to; add yourself: {table}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise RunError(f"cannot write to {path}: {error.strerror}") from None
    return path


def _values(address: str, root_certificates: Path) -> dict[str, Any]:
    return {"address": address, "root-certificates": str(root_certificates.resolve())}


def _connections(path: Path) -> dict[str, Any]:
    return _parsed(path.read_text(encoding="utf-8"), path) if path.exists() else {}


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(text).get("superlink", {})
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{path} is not a TOML file: {error}; correct it or move it away") from None
    return found if isinstance(found, dict) else {}


def _says(text: str, connections: dict[str, Any]) -> bool:
    try:
        return tomllib.loads(text).get("superlink") == connections
    except tomllib.TOMLDecodeError:
        return False


def _without(text: str, name: str) -> str:
    """The text without the lines of one connection's table."""
    kept, inside = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("["):
            inside = line.strip() == f"[superlink.{name}]"
        if not inside:
            kept.append(line)
    return "\n".join(kept)
