"""The key pair by which a federation knows a device."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from fedprune.device.home import PRIVATE, PUBLIC


def write_keys(folder: Path) -> tuple[Path, Path]:
    """A new pair in `folder`, as OpenSSH writes them and Flower reads them: private, public.

    Raises:
        FileExistsError: there is a private key already; it is left as it is.
    """
    key = generate_private_key(SECP384R1())
    private = folder / PRIVATE
    text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(text)
    return private, write_public(folder)


def write_public(folder: Path) -> Path:
    """The public key of the private one in `folder`."""
    key = load_ssh_private_key((folder / PRIVATE).read_bytes(), None)
    public = folder / PUBLIC
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return public
