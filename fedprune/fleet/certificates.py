"""A certificate authority of one's own, and the certificate by which nodes know the server."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from prunelab.errors import RunError
from sparsemodel.storage.files import write_atomically

AUTHORITY_KEY, AUTHORITY = "ca.key", "ca.crt"
SERVER_KEY, SERVER = "server.key", "server.pem"
AUTHORITY_DAYS, SERVER_DAYS = 3650, 397
LOCAL = ("localhost", "127.0.0.1")
_CLOCKS = timedelta(hours=1)  # that nodes may be behind


def write_authority(folder: Path, name: str) -> None:
    """Make a certificate authority in `folder`: its key, for its owner alone, and its certificate.

    Raises:
        FileExistsError: there is a key already; it is left as it is.
    """
    key = generate_private_key(SECP384R1())
    subject = _name(f"{name} authority")
    builder = _builder(subject, subject, key, days=AUTHORITY_DAYS)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, SHA384())
    )
    _write_key(folder / AUTHORITY_KEY, key)
    write_atomically(folder / AUTHORITY, certificate.public_bytes(Encoding.PEM))


def write_server(folder: Path, name: str, hosts: list[str]) -> datetime:
    """Make a key and a certificate of the server, signed by the authority in `folder`.

    Those that were there are replaced.

    Args:
        hosts: names and addresses by which nodes reach it; those of this machine are added.

    Returns:
        The day on which it expires.

    Raises:
        RunError: the authority is missing, damaged or has expired.
    """
    authority = _read(folder / AUTHORITY)
    try:
        signer = load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / AUTHORITY_KEY} cannot be read ({error})") from None
    if not isinstance(signer, EllipticCurvePrivateKey):
        raise RunError(f"{folder / AUTHORITY_KEY} is not the key of an authority made here")
    if authority.not_valid_after_utc < datetime.now(UTC):
        raise RunError(
            f"the authority in {folder / AUTHORITY} expired on "
            f"{authority.not_valid_after_utc:%Y-%m-%d}: make a new server folder, and give its "
            f"{AUTHORITY} to every node"
        )
    key = generate_private_key(SECP384R1())
    builder = _builder(_name(name), authority.subject, key, days=SERVER_DAYS)
    builder = (
        builder.add_extension(
            x509.SubjectAlternativeName([_host(host) for host in [*hosts, *LOCAL]]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    certificate = builder.sign(signer, SHA384())
    (folder / SERVER_KEY).unlink(missing_ok=True)
    _write_key(folder / SERVER_KEY, key)
    write_atomically(folder / SERVER, certificate.public_bytes(Encoding.PEM))
    return certificate.not_valid_after_utc


def expiry(certificate: Path) -> datetime:
    """When a certificate (PEM) expires.

    Raises:
        RunError: it cannot be read.
    """
    return _read(certificate).not_valid_after_utc


def _read(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not a certificate that can be read ({error})") from None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_key(path: Path, key: EllipticCurvePrivateKey) -> None:
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)
