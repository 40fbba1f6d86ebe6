"""A node that died tells the SuperLink so, by its key, and can join again at once.

Without it the SuperLink lets no second process with the same key in before the first has missed
its heartbeats for a minute.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor


def leave(address: str, root_certificates: Path, private_key: Path, number: int) -> None:
    """Count a node as offline; nothing happens where it is, or where nobody answers.

    Args:
        number: of the node, as Flower gave it to its key.
    """
    key = load_ssh_private_key(private_key.read_bytes(), password=None)
    assert isinstance(key, EllipticCurvePrivateKey)
    with (
        contextlib.suppress(httpx.HTTPError),
        FleetHttpClient.from_server_address(
            address,
            False,
            root_certificates.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        ) as client,
    ):
        client.DeactivateNode(DeactivateNodeRequest(node_id=number))
