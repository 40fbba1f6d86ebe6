"""A node's connection to a SuperLink, by Flower's own client of its fleet interface.

What goes wrong is told apart: what passes (Unreachable, Busy), a run that is over (RunIsOver), and
what a person has to mend (RunError).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.config import get_fused_config_from_fab
from flwr.common.serde import fab_from_proto, run_from_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedprune.flower.node.parcel import Parcel
from prunelab.errors import RunError

HEARTBEAT_SECONDS = 15.0  # a node that is silent for two of them is offline to Flower
PULL_TRIES, PULL_SECONDS = 120, 0.25
SERVER_ERROR = 500

T = TypeVar("T")


class Unreachable(Exception):  # noqa: N818 - it passes
    """The SuperLink does not answer now."""


class RunIsOver(Exception):  # noqa: N818 - an event, not a failure
    """The run that a message belongs to goes on no more."""


class Busy(Exception):  # noqa: N818 - it passes
    """The SuperLink counts a node with this key as online."""


class Link:
    """A node's connection, for one thread that works and one that sends heartbeats.

    Args:
        address: host:port of the SuperLink.
        key: file of the node's private key, as OpenSSH writes it.
        root_certificates: file of the authority that the SuperLink's certificate is from; None:
            not encrypted.

    Raises:
        RunError: a file cannot be read or is of another kind.
    """

    def __init__(self, address: str, *, key: Path, root_certificates: Path | None) -> None:
        private = _private_key(key)
        self._address, self._key = address, key
        self._public = public_key_to_bytes(private.public_key())
        self._node = Node()
        self._plain = root_certificates is None
        try:
            self._client = FleetHttpClient.from_server_address(
                address,
                self._plain,
                None if root_certificates is None else root_certificates.read_bytes(),
                interceptors=[
                    RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                    NodeAuthHttpInterceptor(private, private.public_key()),
                ],
            )
        except (OSError, ValueError) as error:
            raise RunError(f"{root_certificates}: no certificates in it ({error})") from None

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self._client._client.close()  # it has no method for it

    def activate(self, *, last: int = 0) -> int:
        """Say that the node is there; its id, which belongs to its key.

        Args:
            last: the id that an earlier process of this node had. It goes on under it: were it
                signed off first, messages on their way would be answered by the SuperLink.

        Raises:
            Busy: another process uses the key, or was killed and is still counted as online.
            RunError: the key is not registered, or the certificate is not to be trusted.
        """
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_SECONDS)
        if last:
            self._node = Node(node_id=last)
            with contextlib.suppress(RunError):  # another SuperLink, perhaps, at this address
                self.heartbeat()
                return last
        try:
            answer = self._call(self._client.ActivateNode, request)
        except _Failed as failed:
            if failed.code != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                raise
            if not self._register():
                raise Busy("another process uses this node's key, or was killed") from None
            answer = self._call(self._client.ActivateNode, request)
        self._node = Node(node_id=answer.node_id)
        return int(answer.node_id)

    def deactivate(self, node_id: int) -> None:
        """Say that the node is gone, if it is there."""
        with contextlib.suppress(_Failed):
            self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=node_id))

    def heartbeat(self) -> None:
        """Say that the node is still there.

        Raises:
            RunError: the SuperLink does not know it (any more).
        """
        interval = HEARTBEAT_SECONDS
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=interval)
        if not self._call(self._client.SendNodeHeartbeat, request).success:
            raise _Unknown(self._address, self._key)

    def receive(self) -> Parcel | None:
        """The next message for this node, whole; it is not confirmed yet."""
        answer = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        message, tree = answer.messages_list[0], answer.message_object_trees[0]
        run = message.metadata.run_id
        contents = {
            part.object_id: self._pull(run, part.object_id) for part in iterate_object_tree(tree)
        }
        return Parcel(message, tree, contents)

    def confirm(self, parcel: Parcel) -> None:
        """Say that a message was received; the SuperLink forgets its content."""
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=parcel.run_id, message_object_id=parcel.message_id
        )
        self._call(self._client.ConfirmMessageReceived, request)

    def send(self, parcel: Parcel, *, seconds: float) -> None:
        """Send a reply.

        Args:
            seconds: that the answer took, for Flower's own account.

        Raises:
            RunIsOver: nobody waits for it.
        """
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[parcel.message],
            message_object_trees=[parcel.tree],
            clientapp_runtime_list=[seconds],
        )
        try:
            answer = self._call(self._client.PushMessages, request)
            for object_id in answer.objects_to_push:
                content = PushObjectRequest(
                    node=self._node,
                    run_id=parcel.run_id,
                    object_id=object_id,
                    object_content=parcel.contents[object_id],
                    session_id=answer.session_id,
                )
                self._call(self._client.PushObject, content)
        except _Failed as failed:
            raise RunIsOver(str(failed)) from None

    def run_of(self, run_id: int) -> tuple[int, dict[str, Any]]:
        """The series that a run belongs to, and its configuration.

        Raises:
            RunIsOver: the SuperLink says nothing of it.
        """
        request = GetRunRequest(node=self._node, run_id=run_id)
        try:
            run = run_from_proto(self._call(self._client.GetRun, request).run)
            wanted = GetFabRequest(node=self._node, hash_str=run.fab_hash, run_id=run_id)
            fab = fab_from_proto(self._call(self._client.GetFab, wanted).fab)
        except _Failed as failed:
            raise RunIsOver(str(failed)) from None
        return run.series_id, dict(get_fused_config_from_fab(fab.content, run))

    def _register(self) -> bool:
        """Register the key where the SuperLink lets nodes do so themselves."""
        request = RegisterNodeFleetRequest(public_key=self._public)
        try:
            self._call(self._client.RegisterNode, request)
        except _Failed as failed:
            if failed.code == ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                return False
            if failed.code == ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED:
                raise _Unknown(self._address, self._key) from None
            raise
        return True

    def _pull(self, run_id: int, object_id: str) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        for _ in range(PULL_TRIES):
            answer = self._call(self._client.PullObject, request)
            if answer.object_available:
                return bytes(answer.object_content)
            if not answer.object_found:
                break
            time.sleep(PULL_SECONDS)
        raise Unreachable(f"{self._address} lacks a part of a message")

    def _call(self, call: Callable[[Any], T], request: Any) -> T:
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            raise self._told(error.response) from None
        except httpx.TransportError as error:
            if "certificate" in str(error).lower():
                raise RunError(
                    f"{self._address}: its certificate is not one of the authority's that was "
                    f"given with --root-certificates ({error})"
                ) from None
            # What a server with TLS does to whom it does not understand: it closes, and what
            # was still on the way makes a reset of that.
            ends = httpx.RemoteProtocolError | httpx.ReadError | httpx.WriteError
            cut = self._plain and isinstance(error, ends)
            hint = "; if it has TLS, give --root-certificates" if cut else ""
            raise Unreachable(f"{self._address} does not answer ({error}){hint}") from None
        except ValueError as error:
            raise RunError(f"{self._address} is no SuperLink: {error}") from None

    def _told(self, response: httpx.Response) -> Exception:
        """What a status other than 200 means."""
        if response.status_code >= SERVER_ERROR:
            return Unreachable(f"{self._address} answers {response.status_code}")
        if response.status_code == httpx.codes.UNAUTHORIZED:
            return _Unknown(self._address, self._key)
        if response.status_code == httpx.codes.FORBIDDEN:
            return RunIsOver(f"{self._address} answers {response.status_code}")
        error = FlowerError.from_json(response.text)
        if error is None:
            text = " ".join(response.text.split())[:200]
            return _Failed(f"{self._address} answers {response.status_code}: {text}", 0)
        if error.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED:
            return RunIsOver(error.message)
        return _Failed(f"{self._address}: {error.message}", error.code)


class _Unknown(RunError):  # noqa: N818
    def __init__(self, address: str, key: Path) -> None:
        super().__init__(
            f"{address} does not know this node: register {key.with_suffix('.pub')} there "
            "(fedprune server register), or give it a new key if it was revoked; if it is "
            "registered, another process uses the key, or this machine's clock is wrong"
        )


class _Failed(RunError):  # noqa: N818
    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def _private_key(file: Path) -> EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(file.read_bytes(), None)
    except FileNotFoundError:
        raise RunError(f"{file} is missing; fedprune device init makes one") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{file} is no private key of OpenSSH's ({error})") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise RunError(f"{file}: Flower takes ECDSA keys alone; fedprune device init makes one")
    return key
