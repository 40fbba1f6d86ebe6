"""A device joins a real SuperLink, outlives its SuperNode, and ends in words or cleanly."""

from __future__ import annotations

import datetime
import ipaddress
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from filelock import FileLock

from benchmarks.deployment import submit
from fedprune.config import RunConfig
from fedprune.device.home import ANSWER, JOINED, PRIVATE, Profile, make_home, read_json
from fedprune.device.node import join
from fedprune.device.status import rows_of, status_of
from fedprune.errors import ConfigError
from fedprune.flower import simulation
from fedprune.flower.launch import launch_values
from fedprune.flower.node.link import Link, Unreachable
from fedprune.rounds.folder import prepare, read_summary
from fedprune.rounds.setup import lay_out
from prunelab.errors import RunError
from prunelab.runs.folder import LOCK
from prunelab.runs.temporary import temporary_folder


def certificates(folder: Path) -> Path:
    """An authority, and a server's certificate for this machine of it."""
    folder.mkdir()
    now = datetime.datetime.now(datetime.UTC)
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def builder(name: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder().subject_name(named(name)).issuer_name(named("ca"))
            .public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        )  # fmt: skip

    own = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    root = (
        builder("ca", authority).add_extension(x509.BasicConstraints(True, None), critical=True)
        .add_extension(own, critical=False).sign(authority, hashes.SHA384())
    )  # fmt: skip
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = builder("localhost", server).add_extension(here, critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    signed = leaf.add_extension(issuer, critical=False).sign(authority, hashes.SHA384())
    (folder / "ca.crt").write_bytes(root.public_bytes(Encoding.PEM))
    (folder / "server.pem").write_bytes(signed.public_bytes(Encoding.PEM))
    (folder / "server.key").write_bytes(
        server.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    )
    return folder


@contextmanager
def tls_superlink(home: Path, pki: Path) -> Iterator[str]:
    """A SuperLink that asks nodes for their keys; its address."""
    port = simulation.free_port()
    command = ["flower-superlink", "--ssl-ca-certfile", str(pki / "ca.crt"), "--ssl-certfile",
               str(pki / "server.pem"), "--ssl-keyfile", str(pki / "server.key"),
               "--enable-supernode-auth", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    environment = simulation.private_environment(home, commands=simulation.commands(home))
    with (home / "superlink.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while "running on" not in (home / "superlink.log").read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
def test_a_server_or_a_device_that_is_not_trusted_is_told_in_a_line(tmp_path: Path) -> None:
    """Not tried again: nothing would change."""
    home, told = tmp_path / "device", list[str]()
    make_home(home, Profile(client=0))
    ours, others = certificates(tmp_path / "ours"), certificates(tmp_path / "others")
    with temporary_folder() as temporary, tls_superlink(temporary, ours) as address:
        for root, says in (
            (others / "ca.crt", rf"{address}: its certificate is not one of the authority's"),
            (ours / "ca.crt", rf"{address} does not know this node: register .*node\.pub there"),
        ):
            with pytest.raises(RunError, match=says):
                join(home, address, root_certificates=root, say=told.append)
        hint = pytest.raises(Unreachable, match="if it has TLS, give --root-certificates")
        with Link(address, key=home / PRIVATE, root_certificates=None) as link, hint:
            link.activate()
    assert told == []
    rows = dict(rows_of(status_of(home)))
    assert rows["node"] == "given up"
    assert "fedprune server register" in rows["said last"]


def joined(home: Path) -> None:
    deadline = time.monotonic() + 60
    while read_json(home / JOINED).get("state") != "joined":
        assert time.monotonic() < deadline, read_json(home / JOINED)
        time.sleep(0.1)


@pytest.mark.slow
def test_a_device_answers_a_run_and_ends_cleanly(tmp_path: Path) -> None:
    """Under a budget; a second join from its home is refused meanwhile."""
    device = tmp_path / "device"
    make_home(device, Profile(client=0, threads=1, budget=10**9))
    config = RunConfig.parse(
        {
            "data.clients": 1, "data.num_train": 120, "data.num_test": 30, "model.width": 4,
            "training.rounds": 1, "training.local_epochs": 1, "method.name": "magnitude",
            "method.density": 0.3,
        }
    )  # fmt: skip
    with temporary_folder() as home:
        port = simulation.free_port()
        environment = simulation.private_environment(home, commands=simulation.commands(home))
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{port}"\n'
            "insecure = true\n"
        )
        out, setup = tmp_path / "run", home / "setup"
        prepare(out, config, resume=False)
        lay_out(config, setup, with_start=True)
        launch = launch_values(out, resume=False, setup=setup)
        app = simulation.write_app(home / "app", config, launch)
        command = [sys.executable, "-m", "fedprune", "device", "join", f"127.0.0.1:{port}"]
        command += ["--insecure", "--home", str(device)]
        with simulation.superlink(home, port, environment):
            with (tmp_path / "join.log").open("w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                joined(device)
                assert status_of(device)["alive"]
                second = subprocess.run(command, capture_output=True, text=True, check=False)
                assert second.returncode == 1
                assert "another process is running" in second.stderr
                submit([str(app), "own"], environment, home)
            finally:
                process.terminate()
                status = process.wait(timeout=30)
    assert status == 0
    assert read_summary(out)["test_accuracy"] > 0
    answer = read_json(device / ANSWER)
    assert (answer["action"], answer["round"]) == ("train", 0)
    assert answer["samples"]["training"] == 63  # of 120 the server has fifty; less a tenth
    assert answer["fitted"].startswith("as the run is set; ")
    assert "error" not in answer
    assert 5 * 10**7 < answer["peak_rss_bytes"] < 2 * 10**8
    assert not status_of(device)["alive"]
    assert dict(rows_of(status_of(device)))["node"] == "ended"


def test_a_home_without_a_number_or_a_key_is_refused(tmp_path: Path) -> None:
    make_home(tmp_path, Profile())
    with pytest.raises(ConfigError, match="--force --client 0"):
        join(tmp_path, "127.0.0.1:1")
    Profile(client=0).write(tmp_path)
    with pytest.raises(RunError, match="there is no such file"):
        join(tmp_path, "127.0.0.1:1", root_certificates=tmp_path / "ca.crt")


def test_a_look_at_the_status_stops_no_join(tmp_path: Path) -> None:
    make_home(tmp_path, Profile(client=0))
    (tmp_path / PRIVATE).write_bytes(b"nonsense")
    lock = FileLock(tmp_path / LOCK, thread_local=False)
    lock.acquire()
    threading.Timer(0.3, lock.release).start()
    with pytest.raises(RunError, match="is no private key"):  # it came so far
        join(tmp_path, "127.0.0.1:1")


@pytest.mark.parametrize(
    "address", ["fleet", ":8000", "fleet:", "fleet:99999", "fleet:0", "https://fleet:8000"]
)
def test_an_address_that_is_none_is_refused_at_once(address: str, tmp_path: Path) -> None:
    """Else the device would try it for ever."""
    make_home(tmp_path, Profile(client=0))
    with pytest.raises(ConfigError, match="give HOST:PORT"):
        join(tmp_path, address)
