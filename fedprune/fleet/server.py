"""The folder of a federation's server: certificates, settings, state."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import tomli_w

from fedprune.fleet import certificates
from fedprune.fleet.connections import check_name, flower_home, write_connection
from prunelab.errors import RunError, check_settings
from sparsemodel.storage.files import write_atomically

SETTINGS, STATE = "server.toml", "state"
PORT = 8000


@dataclass(frozen=True)
class Server:
    """What `server.toml` says.

    Attributes:
        folder: where everything of this server lies.
        name: of the connection in Flower's configuration.
        hosts: names and addresses by which nodes on other machines reach it; none: it listens on
            127.0.0.1 alone.
        port: that nodes reach.

    Raises:
        RunError: values that cannot be.
    """

    folder: Path
    name: str
    hosts: tuple[str, ...] = ()
    port: int = PORT

    def __post_init__(self) -> None:
        check_name(self.name)
        check_settings(
            str(self.folder / SETTINGS),
            {f"port must be 1 to 65534, got {self.port}": 0 < self.port < 2**16 - 1}
            | {f"not a host: {h!r}": bool(h) and h.isascii() and ":" not in h for h in self.hosts},
        )

    @property
    def authority(self) -> Path:
        """The certificate by which nodes and commands know the server; it may be given away."""
        return self.folder / certificates.AUTHORITY

    @property
    def state(self) -> Path:
        """What the SuperLink keeps: registered nodes, runs, messages."""
        return self.folder / STATE

    @property
    def local_port(self) -> int:
        """That the SuperLink listens on, on this machine alone.

        Where nodes on other machines are served, `port` is the gate's (see gate.py).
        """
        return self.port + 1 if self.hosts else self.port

    @property
    def local_address(self) -> str:
        """Where the commands of this machine reach it."""
        return f"127.0.0.1:{self.local_port}"

    @classmethod
    def read(cls, folder: Path) -> Server:
        """Read `server.toml`.

        Raises:
            RunError: there is none, or it is not what `init` writes.
        """
        path = folder / SETTINGS
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
            hosts = tuple(map(str, values["hosts"]))
            return cls(folder, str(values["name"]), hosts, int(values["port"]))
        except FileNotFoundError:
            raise RunError(
                f"{folder} is not the folder of a server: it has no {SETTINGS}; "
                f"make one with `fedprune server init {folder}`"
            ) from None
        except (KeyError, TypeError, ValueError, OSError) as error:
            if isinstance(error, RunError):
                raise
            raise RunError(f"{path} cannot be read: {error!r}") from None

    def connect(self) -> Path:
        """Tell Flower's commands of this user how to reach it; the file in which that is written.

        The server's own commands find the same in its state, whoever gives them.

        Raises:
            RunError: the name is taken by another federation, or the file cannot be written.
        """
        for home in (self.state, flower_home()):
            path = write_connection(
                home, self.name, address=self.local_address, root_certificates=self.authority
            )
        return path

    def write(self) -> None:
        """Write `server.toml`."""
        values = {key: value for key, value in asdict(self).items() if key != "folder"}
        write_atomically(self.folder / SETTINGS, tomli_w.dumps(values).encode())


def init(folder: Path, *, hosts: tuple[str, ...] = (), name: str = "", port: int = PORT) -> Server:
    """Make the folder of a new server: authority, certificate, settings, state, connection.

    Args:
        hosts: names and addresses by which nodes on other machines reach it.
        name: of the connection in Flower's configuration; by default the folder's.

    Raises:
        RunError: the folder is a server's already or cannot be written to, or the name is taken.
    """
    if (folder / SETTINGS).exists() or (folder / certificates.AUTHORITY_KEY).exists():
        raise RunError(
            f"{folder} is the folder of a server already, which stays as it is; `fedprune server "
            "renew` makes a new certificate in it"
        )
    server = Server(folder, name or folder.resolve().name, tuple(dict.fromkeys(hosts)), port)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        server.state.mkdir(mode=0o700, exist_ok=True)
        server.connect()
        certificates.write_authority(folder, server.name)
        certificates.write_server(folder, server.name, list(server.hosts))
        server.write()
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}") from None
    return server


def renew(folder: Path, *, hosts: tuple[str, ...] = ()) -> tuple[Server, datetime]:
    """Make a new certificate of the server; nodes need nothing new.

    Args:
        hosts: in place of those that it had; none: the same.

    Returns:
        The server, and when the certificate expires.

    Raises:
        RunError: the folder is not a server's, or its authority cannot sign.
    """
    old = Server.read(folder)
    server = replace(old, hosts=tuple(dict.fromkeys(hosts)) or old.hosts)
    expires = certificates.write_server(folder, server.name, list(server.hosts))
    server.connect()
    server.write()
    return server, expires


def move(server: Server, port: int) -> Server:
    """The same server on another port, from now on.

    Raises:
        RunError: no such port, or a file cannot be written.
    """
    moved = replace(server, port=port)
    moved.connect()
    moved.write()
    return moved
