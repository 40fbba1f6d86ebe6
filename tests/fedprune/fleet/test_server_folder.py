"""The folder of a server: keys, certificates, settings, connection, gate."""

from __future__ import annotations

import asyncio
import socket
import ssl
import stat
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import uvicorn

from fedprune.device.keys import write_keys
from fedprune.fleet import certificates, nodes, server, superlink
from fedprune.fleet.connections import connection, write_connection
from fedprune.fleet.gate import Gate
from fedprune.flower.simulation import free_port
from prunelab.errors import RunError


@pytest.fixture(autouse=True)
def _own_flower_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))


def handshake(folder: Path, authority: Path, host: str) -> str:
    """What a client that trusts `authority` finds when it reaches the server as `host`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / certificates.SERVER, folder / certificates.SERVER_KEY)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connected, _ = listening.accept()
            try:
                context.wrap_socket(connected, server_side=True).close()
            except OSError:
                connected.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            trusting = ssl.create_default_context(cafile=str(authority))
            with socket.create_connection(listening.getsockname()) as plain:
                trusting.wrap_socket(plain, server_hostname=host).close()
        except ssl.SSLError as error:
            return str(error)
        finally:
            thread.join()
    return "trusted"


def test_a_server_has_a_certificate_for_its_hosts_and_keys_that_nobody_else_reads(
    tmp_path: Path,
) -> None:
    made = server.init(tmp_path / "fleet", hosts=("fleet.example", "192.0.2.7"), port=8123)
    for key in (certificates.AUTHORITY_KEY, certificates.SERVER_KEY):
        assert stat.S_IMODE((made.folder / key).stat().st_mode) == 0o600
    for host in ("fleet.example", "192.0.2.7", "localhost", "127.0.0.1"):
        assert handshake(made.folder, made.authority, host) == "trusted"
    assert "not valid for" in handshake(made.folder, made.authority, "other.example")
    other = server.init(tmp_path / "other")
    assert "CERTIFICATE_VERIFY_FAILED" in handshake(made.folder, other.authority, "localhost")
    assert server.Server.read(made.folder) == made
    # Nodes reach the gate; commands of this machine the SuperLink behind it.
    assert connection("fleet")["address"] == "127.0.0.1:8124"


def test_a_renewed_certificate_is_trusted_by_the_nodes_that_there_are(tmp_path: Path) -> None:
    made = server.init(tmp_path / "fleet", hosts=("old.example",))
    authority = made.authority.read_bytes()
    before = (made.folder / certificates.SERVER).read_bytes()
    renewed, expires = server.renew(made.folder, hosts=("new.example",))
    assert renewed.hosts == ("new.example",)
    assert expires == certificates.expiry(made.folder / certificates.SERVER)
    assert made.authority.read_bytes() == authority
    assert (made.folder / certificates.SERVER).read_bytes() != before
    assert handshake(made.folder, made.authority, "new.example") == "trusted"
    assert "not valid for" in handshake(made.folder, made.authority, "old.example")


def test_a_connection_leaves_the_rest_of_flowers_configuration_as_it_is(tmp_path: Path) -> None:
    home = tmp_path / "flower"
    home.mkdir()
    text = '# mine\n[superlink]\ndefault = "far"\n\n[superlink.far]  # remote\naddress = "a:1"\n'
    (home / "config.toml").write_text(text)
    made = server.init(tmp_path / "fleet", port=8200)
    assert (home / "config.toml").read_text().startswith(text)
    server.move(made, 8300)
    assert (home / "config.toml").read_text().startswith(text)
    assert connection("fleet") == {
        "address": "127.0.0.1:8300",
        "root-certificates": str(made.authority),
    }
    with pytest.raises(RunError, match="another federation"):
        server.init(tmp_path / "elsewhere" / "fleet")
    assert not (tmp_path / "elsewhere" / "fleet" / certificates.AUTHORITY_KEY).exists()
    with pytest.raises(RunError, match="no connection 'near'; it has far, fleet"):
        connection("near")
    (home / "config.toml").write_text("superlink = {}\n")
    with pytest.raises(RunError, match="add yourself"):
        write_connection(home, "x", address="b:2", root_certificates=made.authority)


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    made = server.init(tmp_path / "fleet")
    key = (made.folder / certificates.AUTHORITY_KEY).read_bytes()
    with pytest.raises(RunError, match="already"):
        server.init(made.folder)
    assert (made.folder / certificates.AUTHORITY_KEY).read_bytes() == key
    with pytest.raises(RunError, match="fedprune server init"):
        server.Server.read(tmp_path)
    with pytest.raises(RunError, match="port must be"):
        server.init(tmp_path / "odd", port=0)
    with pytest.raises(RunError, match="cannot be called"):
        server.init(tmp_path / "two words")


@pytest.mark.parametrize("place", ["new user", "a,b"])
def test_no_superlink_is_started_where_flower_makes_no_data_base(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / place / "flwr"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    made = server.init(tmp_path / "fleet", port=free_port())
    link = superlink.superlink(made)
    monkeypatch.delitem(sys.modules, "flwr")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(RunError, match=rf"space or a comma, {package}; install"):
        superlink.start(made, link)
    assert link.status() is None


def test_keys_are_known_by_their_fingerprints_and_other_files_refused(tmp_path: Path) -> None:
    _, public = write_keys(tmp_path)
    shown = nodes.fingerprint(public)
    try:
        told = subprocess.run(
            ["ssh-keygen", "-lf", str(public)], capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        pytest.skip("no ssh-keygen to compare with")
    assert told.stdout.split()[1] == shown
    (tmp_path / "text").write_text("no key\n")
    for file, why in (("text", "is not a public key"), ("node", "is not a public key")):
        with pytest.raises(RunError, match=why):
            nodes.fingerprint(tmp_path / file)
    with pytest.raises(RunError, match="cannot be read"):
        nodes.fingerprint(tmp_path / "missing")


def test_a_server_that_does_not_run_is_named(tmp_path: Path) -> None:
    made = server.init(tmp_path / "fleet", port=free_port())
    _, public = write_keys(tmp_path)
    with pytest.raises(RunError, match=r"does not answer.*fedprune server start"):
        nodes.register(made, public)


def test_flower_answers_without_colours_inside_jupyter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels force colours upon commands; an answer with colours is no JSON."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(RunError, match="flwr list nowhere failed"):
        nodes.flwr(["list", "nowhere"], {"FLWR_HOME": str(tmp_path)})


def test_the_gate_hands_through_what_nodes_ask_and_nothing_else(tmp_path: Path) -> None:
    made = server.init(tmp_path / "fleet", port=free_port())
    seen: list[tuple[str, bytes, bytes]] = []

    async def superlink(scope, receive, send):  # type: ignore[no-untyped-def]
        body = (await receive()).get("body", b"")
        seen.append((scope["path"], dict(scope["headers"]).get(b"x-key", b""), body))
        await send({"type": "http.response.start", "status": 418, "headers": [(b"x-a", b"b")]})
        await send({"type": "http.response.body", "body": body[::-1]})

    behind = uvicorn.Server(
        uvicorn.Config(
            superlink, port=made.local_port, lifespan="off", ws="none", log_level="error",
            ssl_certfile=made.folder / certificates.SERVER,
            ssl_keyfile=str(made.folder / certificates.SERVER_KEY),
        )
    )  # fmt: skip
    thread = threading.Thread(target=behind.run)
    thread.start()
    while not behind.started:
        assert thread.is_alive()
        thread.join(0.05)

    async def asked() -> list[httpx.Response]:
        gate = Gate(made.local_address, str(made.authority))
        through = httpx.ASGITransport(gate)
        async with httpx.AsyncClient(transport=through, base_url="https://gate") as client:
            good = await client.post(
                "/v1/fleet/pull-messages", content=b"abc", headers={"x-key": "k"}
            )
            refused = [
                await client.post(path, content=b"")
                for path in (
                    "/v1/control/start-run",
                    "/v1/runtime/acquire-task",
                    "/v1/fleet/%2e%2e/control/start-run",
                    "/v1/fleet/a/b",
                    "/docs",
                )
            ]
        await gate.close()
        return [good, *refused]

    try:
        good, *refused = asyncio.run(asked())
    finally:
        behind.should_exit = True
        thread.join()
    assert (good.status_code, good.headers["x-a"], good.content) == (418, "b", b"cba")
    assert [answer.status_code for answer in refused] == [404] * 5
    assert seen == [("/v1/fleet/pull-messages", b"k", b"abc")]
