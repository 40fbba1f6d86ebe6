"""Which batch norms of a graph take in the addition and the ReLU that follow them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Node = TypeVar("Node", bound=Hashable)


class GraphView(Protocol[Node]):
    """What has to be known of a graph's nodes."""

    def is_norm(self, node: Node) -> bool:
        """Whether it is a batch norm that may be computed later, where its one user stands."""
        ...

    def summands(self, node: Node) -> Sequence[Node]:
        """Of an addition of two different results those that it may take in; else nothing."""
        ...

    def before_relu(self, node: Node) -> Node | None:
        """What a ReLU is taken of, if nothing else uses that; None for what is no ReLU."""
        ...


@dataclass(frozen=True)
class Fusion(Generic[Node]):
    """A batch norm and what follows it: an addition to its result, a ReLU, or both."""

    norm: Node
    addition: Node | None
    relu: Node | None

    @property
    def last(self) -> Node:
        """In whose place the fused norm is computed."""
        last = self.addition if self.relu is None else self.relu
        assert last is not None, "something follows"
        return last


def find_fusions(nodes: Iterable[Node], view: GraphView[Node]) -> list[Fusion[Node]]:
    """All fusions of a graph, each node in one of them at most.

    ReLU goes first: an addition whose ReLU is fused is fused with it, in the same pass. Of two
    norms that are added the first takes in the other as its residual.

    Args:
        nodes: in the order in which they run.
    """
    nodes = list(nodes)
    found: list[Fusion[Node]] = []
    taken: set[Node] = set()

    def take(start: Node, relu: Node | None) -> None:
        """Fuse what ends in `start` and the ReLU of it."""
        if relu is not None and view.is_norm(start):
            fusion = Fusion(start, None, relu)
        else:
            norms = [n for n in view.summands(start) if view.is_norm(n) and n not in taken]
            if not norms:
                return
            fusion = Fusion(norms[0], start, relu)
        found.append(fusion)
        taken.update(n for n in (fusion.norm, fusion.addition, relu) if n is not None)

    for node in nodes:
        before = view.before_relu(node)
        if before is not None:
            take(before, node)
    for node in nodes:
        if node not in taken:
            take(node, None)
    return found
