"""A message with all its parts, as bytes that a file may keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import cast

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents


@dataclass(frozen=True)
class Parcel:
    """A message as Flower's fleet interface carries it.

    Attributes:
        message: without its content.
        tree: of the parts of the content.
        contents: id of a part -> its bytes.
    """

    message: ProtoMessage
    tree: ObjectTree
    contents: Mapping[str, bytes]

    @classmethod
    def of(cls, message: Message) -> Parcel:
        """A message to be sent."""
        message.metadata.__dict__["_message_id"] = message.object_id
        with no_object_id_recompute():
            tree = get_object_tree(message)
            parts = get_all_nested_objects(message).items()
            contents = {name: part.deflate() for name, part in parts}
        return cls(message_to_proto(remove_content_from_message(message)), tree, contents)

    @property
    def run_id(self) -> int:
        """Of the run that it belongs to."""
        return int(self.message.metadata.run_id)

    @property
    def message_id(self) -> str:
        """Flower's name of it."""
        return str(self.tree.object_id)

    def open(self) -> Message:
        """The message with its content."""
        message = cast(Message, inflate_object_from_contents(self.message_id, dict(self.contents)))
        message.metadata.__dict__["_message_id"] = self.message_id
        return message

    def to_bytes(self) -> bytes:
        """For a file; `from_bytes` reads it."""
        head = PullMessagesResponse(messages_list=[self.message], message_object_trees=[self.tree])
        parts = [head.SerializeToString()]
        parts += [
            PushObjectRequest(object_id=name, object_content=content).SerializeToString()
            for name, content in self.contents.items()
        ]
        return seal(*parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Parcel:
        """What `to_bytes` gave.

        Raises:
            ValueError: it is damaged.
        """
        first, *rest = unseal(data)
        head = PullMessagesResponse.FromString(first)
        objects = [PushObjectRequest.FromString(part) for part in rest]
        contents = {each.object_id: each.object_content for each in objects}
        return cls(head.messages_list[0], head.message_object_trees[0], contents)


def seal(*parts: bytes) -> bytes:
    """Parts in one file, under a checksum; `unseal` reads them."""
    body = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return sha256(body).digest() + body


def unseal(data: bytes) -> list[bytes]:
    """The parts.

    Raises:
        ValueError: they are damaged.

    >>> unseal(seal(b"one", b"", b"three"))
    [b'one', b'', b'three']
    """
    body, place, parts = data[32:], 0, []
    if sha256(body).digest() != data[:32]:
        raise ValueError("damaged: the checksum does not fit")
    while place < len(body):
        size = int.from_bytes(body[place : place + 8], "big")
        parts.append(body[place + 8 : place + 8 + size])
        place += 8 + size
    return parts
