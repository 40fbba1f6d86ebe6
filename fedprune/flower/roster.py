"""Which node is which client, now: nodes come, go, and come back as others.

Flower gives a node an id for its key. A node with a registered key comes back under the id that it
had; one without makes a new key at each start, and comes back as a node that nobody has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedprune.errors import ClientError
from fedprune.exchange.gate import Gate
from fedprune.exchange.messages import ClientInfo, Reply
from sparsemodel.errors import SparseModelError

LOST = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)


def is_lost(message: Message) -> bool:
    """Whether this is in place of a reply of which parts are missing: its node was killed."""
    return message.has_error() and message.error.code in LOST


class Roster:
    """The clients of a run and the nodes that they are at.

    A node that was not connected at the last look is asked who it is. It becomes the client that
    it says it is where that number is free, or where the node that had it is gone and it has the
    same samples; of several nodes that claim one number at a time, none does. Who is refused or
    has to wait may get the number later, when it is free.

    Args:
        ask: sends the question who it is to a node; gives the message's id, "" where the node is
            gone.
        read: the reply of such a message, decoded.
        note: is told of nodes that cannot take part, with the client's number, or -1.
        node_keys: whether nodes have registered keys: a number is then its node's for good.
        client_of: which client a node is, where that need not be asked, else -1.

    Attributes:
        clients: by number; those whose node is gone stay.
        nodes: client -> node.
    """

    def __init__(
        self,
        grid: Grid,
        gate: Gate,
        *,
        ask: Callable[[int], str],
        read: Callable[[Message], Reply],
        note: Callable[[int, str], None],
        node_keys: bool,
        client_of: Callable[[int], int] = lambda node: -1,
    ) -> None:
        self._grid, self._gate, self._client_of = grid, gate, client_of
        self._ask, self._read, self._note = ask, read, note
        self._node_keys = node_keys
        self._online: range | set[int] = set()
        self._asked: dict[str, int] = {}
        self._claims: dict[int, ClientInfo] = {}
        self._told: set[int] = set()
        self.clients: Mapping[int, ClientInfo] = gate.clients
        self.nodes: dict[int, int] = {}

    def is_connected(self, client: int) -> bool:
        """Whether a client's node was connected at the last look."""
        return self.nodes.get(client) in self._online

    def find(self) -> list[str]:
        """Look which nodes are connected, and ask those that have come who they are.

        Returns:
            Ids of the questions that have no answer yet.
        """
        found = self._grid.get_node_ids()
        online = found if isinstance(found, range) else set(found)  # a range takes no memory
        if online == self._online:
            return list(self._asked)
        for node in sorted(node for node in online if node not in self._online):
            self._claims.pop(node, None)
            self._told.discard(node)
            if (client := self._client_of(node)) >= 0:
                self._gate.introduce(client)
                self.nodes[client] = node
            elif message_id := self._ask(node):
                self._asked[message_id] = node
        self._online = online
        self._asked = {m: node for m, node in self._asked.items() if node in online}
        self._claims = {node: info for node, info in self._claims.items() if node in online}
        return list(self._asked)

    def hear(self, messages: Iterable[tuple[str, Message]]) -> None:
        """Take what nodes answer: (id of the question, reply)."""
        for message_id, message in messages:
            node = self._asked.pop(message_id, None)
            if node is None:
                continue
            if is_lost(message):
                self._forget(node)
                continue
            try:
                self._claims[node] = self._gate.admit(self._read(message))
            except (ClientError, SparseModelError) as error:
                self._note(-1, f"node {node}: {error}")

    def give_up(self, message_id: str) -> None:
        """A question was not answered in time; its node is asked again at the next look."""
        node = self._asked.pop(message_id)
        self._forget(node)
        self._note(-1, f"node {node}: did not say in time who it is")

    def _forget(self, node: int) -> None:
        """Let the next look find a node, and ask it again."""
        self._online = {other for other in self._online if other != node}

    def bind(self) -> None:
        """Give the numbers that nodes have claimed, as far as they can be given."""
        claimed: dict[int, list[int]] = {}
        for node, info in self._claims.items():
            claimed.setdefault(info.client, []).append(node)
        for client, nodes in sorted(claimed.items()):
            self._bind(client, sorted(nodes))

    def _bind(self, client: int, claimants: list[int]) -> None:
        holder = self.nodes.get(client)
        if holder in claimants:  # back under its own id
            claimants.remove(holder)
            self._give(client, holder)
        if len(claimants) == 1 and not self._refusal(client, claimants[0]):
            self._give(client, claimants.pop())
        if self._told.issuperset(claimants):
            return
        self._told.update(claimants)
        if len(claimants) > 1 and holder not in self._online:  # nothing says whom to believe
            who = ", ".join(map(str, claimants))
            self._note(
                client,
                f"nodes {who} all say that they are client {client}; give each node a "
                "partition-id of its own",
            )
            return
        for node in claimants:
            self._note(-1, f"node {node}: {self._refusal(client, node)}")

    def _refusal(self, client: int, node: int) -> str:
        """Why a node cannot have a client's number now; empty where it can."""
        holder = self.nodes.get(client)
        if holder is None:
            return ""
        if holder in self._online:
            return f"it says that it is client {client}, which node {holder} is"
        if self._node_keys:
            return f"it says that it is client {client}, whose node has another key"
        if self._claims[node] != self.clients[client]:
            return f"it says that it is client {client}, which had other samples"
        return ""

    def _give(self, client: int, node: int) -> None:
        info = self._claims.pop(node)
        self._gate.know(info)
        self.nodes[client] = node
