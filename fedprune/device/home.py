"""A device's home: the folder of its keys, its profile, and what it holds between messages."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w

from fedprune.errors import ConfigError
from prunelab.errors import RunError, check_settings, close_names
from prunelab.runs.folder import write_file
from prunelab.runs.imported import IMPORTED

VARIABLE = "FEDPRUNE_DEVICE_HOME"
DEFAULT = Path("~/.fedprune/device")
PRIVATE, PUBLIC = "node", "node.pub"
PROFILE, LOG = "profile.toml", "node.log"
JOINED, ANSWER, STATE = "joined.json", "answer.json", "state"
_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """What a device may use, and what it trains on.

    Attributes:
        budget: bytes that a whole process of it may hold; 0: no limit.
        threads: of training; 0: as many as a run says.
        data: its own samples: a folder, a file or "module:function"; empty: a share of the run's.
        client: its number in runs, from 0 on; -1: not said yet.
        allow: Python packages of the device whose functions a run may name, with commas between
            them; a run's own code is never run.

    Raises:
        ConfigError: one of them is out of its range.
    """

    budget: int = 0
    threads: int = 0
    data: str = ""
    client: int = -1
    allow: str = ""

    @property
    def packages(self) -> frozenset[str]:
        """Names of the packages in `allow`."""
        return frozenset(filter(None, self.allow.replace(" ", "").split(",")))

    def __post_init__(self) -> None:
        check_settings(
            "the device's profile",
            {
                f"budget: expected 0 bytes or more, got {self.budget}": self.budget >= 0,
                f"threads: expected 0 or more, got {self.threads}": self.threads >= 0,
                f"client: expected 0 or more, got {self.client}": self.client >= -1,
            },
            error=ConfigError,
        )

    @classmethod
    def read(cls, home: Path) -> Profile:
        """The profile in a home.

        Raises:
            ConfigError: it holds something else.
            RunError: there is none.
        """
        path = home / PROFILE
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RunError(
                f"{path}: cannot be read ({error.strerror}); make a device by: fedprune device init"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: no TOML ({error})") from None
        known = {field.name: type(field.default) for field in fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f"{path}: unknown {key!r}{close_names(key, known)}")
            if key == "budget" and isinstance(value, str):
                values[key] = parse_bytes(value)
            elif type(value) is not known[key]:
                raise ConfigError(f"{path}: {key}: expected {known[key].__name__}, got {value!r}")
        return cls(**values)

    def write(self, home: Path) -> None:
        """Put it in a home, in one step."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        write_file(home / PROFILE, tomli_w.dumps(values).encode())


def make_home(home: Path, profile: Profile, *, force: bool = False) -> Path:
    """Make a device's home, with a new pair of keys where it has none; the public key's path.

    Args:
        force: whether a profile that is there is replaced; a private key never is.

    Raises:
        RunError: the home has a profile, or cannot be written.
    """
    if (home / PROFILE).exists() and not force:
        raise RunError(
            f"{home} is a device already; --force replaces its profile and leaves its keys"
        )
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (home / PUBLIC).exists():
            from fedprune.device import keys  # noqa: PLC0415 - 8 MB that others need not

            if (home / PRIVATE).exists():  # a first init was cut short
                keys.write_public(home)
            else:
                keys.write_keys(home)
    except OSError as error:
        raise RunError(f"cannot write to {home} ({error.strerror})") from None
    profile.write(home)
    return home / PUBLIC


def own_data(given: str) -> str:
    """What a profile calls the device's own samples: an absolute path, or "module:function".

    Raises:
        ConfigError: there is no such path.
    """
    path = Path(given).expanduser()
    if path.exists():
        return str(path.resolve())
    if IMPORTED.fullmatch(given):
        return given
    raise ConfigError(f"--data {given}: there is no such folder or file")


def parse_bytes(text: str) -> int:
    """A number of bytes: "128MB" is 128 million, "128MiB" 128 times 1024².

    Raises:
        ConfigError: it is something else.

    >>> parse_bytes("128MB"), parse_bytes("1.5 GiB"), parse_bytes("4096")
    (128000000, 1610612736, 4096)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS:
        raise ConfigError(f"{text!r} is no number of bytes; write 128MB, 128MiB or 1.5GB")
    return int(float(found[1]) * _UNITS[found[2]])


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a small file of a home in one step."""
    write_file(path, (json.dumps(values, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` left; empty where there is nothing that can be read."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
