"""Programs: the operations of a network as plain data, to be run without its code."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from sparsemodel.errors import ProgramError
from sparsemodel.runtime.pattern import Shape
from sparsemodel.runtime.program_shapes import planes_around, result_shape
from sparsemodel.runtime.program_text import FIELDS, VERSION, ProgramLimits, read_program

Kind = Literal[
    "input", "conv", "norm", "relu", "add", "max_pool", "avg_pool", "global_pool", "flatten"
]
Pair = tuple[int, int]

DIGEST_DIGITS = 32


@dataclass(frozen=True)
class Node:
    """One operation on results of earlier ones.

    Attributes:
        kind: what it does. "conv" is a linear layer too, "norm" a batch norm with what is fused
            to it: relu(batch norm of the first input + the second).
        inputs: numbers of the nodes that it reads; of a norm one or two.
        name: for messages: the module's path or the function's name.
        weight, bias: names of parameters; None where there is none. A norm without them scales by
            1 and shifts by 0.
        mean, variance: names of a norm's running statistics; both None: it always takes the
            batch's own.
        kernel: height and width of a pooling window; a convolution's is in its weight's shape.
        stride, padding, dilation: height and width.
        groups: of a convolution.
        eps: added to a norm's variance.
        momentum: of its running statistics, in [0, 1]; None: their mean over all batches.
        relu: whether a norm ends in a ReLU.
        include_pad: whether an average counts the zeros around the input.
    """

    kind: Kind
    inputs: tuple[int, ...] = ()
    name: str = ""
    weight: str | None = None
    bias: str | None = None
    mean: str | None = None
    variance: str | None = None
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    eps: float = 1e-5
    momentum: float | None = 0.1
    relu: bool = False
    include_pad: bool = True

    def parameters(self) -> list[str]:
        """Names of the parameters that it has."""
        return [name for name in (self.weight, self.bias) if name is not None]

    def tensors(self) -> list[str]:
        """Names of all that it reads: parameters and statistics."""
        statistics = [name for name in (self.mean, self.variance) if name is not None]
        return [*self.parameters(), *statistics]


@dataclass(frozen=True)
class Program:
    """A network: operations in the order in which they run, and the tensors of its state.

    It is data alone, checked as a whole when it is made: what exists can be run.

    Attributes:
        input_shape: of one sample, (C, H, W) or (features,).
        nodes: the first is the input, the last gives the logits [classes]; each result is read.
        tensors: name and shape of every tensor of the model's float state, in its order: dense
            shapes, under the names of the dense model. Nodes need not read all of them.

    Raises:
        ProgramError: it cannot be run; the message names the node and what is wrong.
    """

    input_shape: Shape
    nodes: tuple[Node, ...]
    tensors: tuple[tuple[str, Shape], ...]

    def __post_init__(self) -> None:
        if len(self._shapes) != len(self.tensors):
            raise ProgramError("tensors: a name occurs twice")
        results = self.results
        read = {number for node in self.nodes for number in node.inputs}
        for number in range(len(self.nodes) - 1):
            if number not in read:
                raise ProgramError(f"{self.title(number)}: its result is not used")
        if len(results[-1]) != 1 or len(self.nodes) < 2:
            raise ProgramError(
                f"{self.title(len(self.nodes) - 1)}: expected logits [B, classes], got an output "
                f"of shape [B, *{results[-1]}]"
            )
        seen: set[str] = set()
        for number, node in enumerate(self.nodes):
            for name in node.tensors():
                if name in seen:
                    raise ProgramError(f"{self.title(number)}: {name!r} is read a second time")
                seen.add(name)

    @classmethod
    def parse(cls, text: str | bytes, *, limits: ProgramLimits | None = None) -> Program:
        """The program that a text describes; whatever is given, a program or an error.

        Args:
            text: JSON as `text` writes it, UTF-8 where it is bytes.
            limits: of what may be asked for; `ProgramLimits()` without.

        Raises:
            ProgramError: no program, or one beyond the limits; the message says what and where.
        """
        limits = ProgramLimits() if limits is None else limits
        input_shape, nodes, tensors = read_program(text, limits)
        program = cls(input_shape, tuple(Node(**node) for node in nodes), tensors)
        needed = program.activation_bytes()
        if needed > limits.activation_bytes:
            raise ProgramError(
                f"the results of one sample take {needed:,} bytes; the limit is "
                f"{limits.activation_bytes:,}"
            )
        return program

    def text(self) -> str:
        """The program as JSON; equal programs have equal texts."""
        nodes = [
            {"kind": node.kind} | {field: getattr(node, field) for field in FIELDS[node.kind]}
            for node in self.nodes
        ]
        content: dict[str, Any] = {
            "program": VERSION,
            "input": self.input_shape,
            "nodes": nodes,
            "tensors": self.tensors,
        }
        return json.dumps(content, separators=(",", ":"), allow_nan=False)

    def digest(self) -> str:
        """32 hexadecimal digits: a hash of the text."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:DIGEST_DIGITS]

    @property
    def classes(self) -> int:
        """Number of logits."""
        return self.results[-1][0]

    def shapes(self) -> dict[str, Shape]:
        """Name -> shape of every tensor of the state, in its order."""
        return dict(self._shapes)

    @cached_property
    def results(self) -> tuple[Shape, ...]:
        """The shape of each node's result, of one sample."""
        shapes: list[Shape] = []
        for number, node in enumerate(self.nodes):
            later = [i for i in node.inputs if not 0 <= i < number]
            if later or (node.kind == "input") != (number == 0):
                raise ProgramError(
                    f"{self.title(number)}: it reads node {later[0]}, which is not before it"
                    if later
                    else f"{self.title(number)}: the first node, and no other, is the input"
                )
            sources = tuple(shapes[i] for i in node.inputs)
            try:
                shapes.append(result_shape(node, sources, self.input_shape, self._shapes))
            except ProgramError as error:
                raise ProgramError(f"{self.title(number)}: {error}") from None
        if not shapes:
            raise ProgramError("expected nodes, got none")
        return tuple(shapes)

    def title(self, number: int) -> str:
        """What messages call a node."""
        node = self.nodes[number]
        return f"node {number} ({node.kind}{f' {node.name!r}' if node.name else ''})"

    def activation_bytes(self) -> int:
        """Bytes of all results, and of zeros around them, for one sample, as float32."""
        padded = sum(
            math.prod(planes_around(self.results[node.inputs[0]], node.padding))
            - math.prod(self.results[node.inputs[0]])
            for node in self.nodes
            if node.kind == "conv"
        )
        return 4 * (padded + sum(math.prod(shape) for shape in self.results))

    def layers(self) -> dict[str, int]:
        """The weight of each convolution and linear layer -> the number of its node."""
        return {
            node.weight: number
            for number, node in enumerate(self.nodes)
            if node.kind == "conv" and node.weight is not None
        }

    def layer_macs(self) -> dict[str, int]:
        """The weight of each layer -> its multiply-accumulates for one sample, when dense."""
        return {
            name: math.prod(self._shapes[name]) * math.prod(self.results[number][1:])
            for name, number in self.layers().items()
        }

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return dict(self.tensors)
