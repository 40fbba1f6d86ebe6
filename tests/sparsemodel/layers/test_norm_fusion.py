"""Which batch norms take in what follows them, on graphs worked by hand."""

from __future__ import annotations

from collections import Counter

from sparsemodel.layers.norm_fusion import Fusion, find_fusions


class Graph:
    """Node -> (kind, inputs)."""

    def __init__(self, **nodes: tuple[str, ...]) -> None:
        self.nodes = nodes
        self.users = Counter(i for _, *inputs in nodes.values() for i in inputs)

    def is_norm(self, node: str) -> bool:
        return self.nodes[node][0] == "norm" and self.users[node] == 1

    def summands(self, node: str) -> tuple[str, ...]:
        return self.nodes[node][1:] if self.nodes[node][0] == "add" else ()

    def before_relu(self, node: str) -> str | None:
        kind, *inputs = self.nodes[node]
        return inputs[0] if kind == "relu" and self.users[inputs[0]] == 1 else None


def found(**nodes: tuple[str, ...]) -> list[Fusion[str]]:
    return find_fusions(nodes, Graph(x=("input",), **nodes))


def test_a_norm_takes_in_what_follows() -> None:
    n, relu, add = ("norm", "x"), ("relu", "a"), ("add", "n", "x")
    assert found(n=n, r=("relu", "n")) == [Fusion("n", None, "r")]
    assert found(n=n, a=add) == [Fusion("n", "a", None)]
    assert found(n=n, a=add, r=relu) == [Fusion("n", "a", "r")]
    assert found(n=n, a=("add", "x", "n"), r=relu) == [Fusion("n", "a", "r")]


def test_of_two_norms_the_first_takes_in_the_other() -> None:
    fusions = found(m=("norm", "x"), n=("norm", "x"), a=("add", "n", "m"), r=("relu", "a"))
    assert fusions == [Fusion("n", "a", "r")]
    assert fusions[0].last == "r"


def test_what_others_use_stays() -> None:
    """A sum with a second user keeps its ReLU apart; a norm with two users is not moved."""
    n, a, r = ("norm", "x"), ("add", "n", "x"), ("relu", "a")
    assert found(n=n, a=a, r=r, o=("other", "a")) == [Fusion("n", "a", None)]
    assert found(n=n, a=a, o=("other", "n")) == []
    assert found(n=n, r=("relu", "n"), o=("other", "n")) == []
