"""What training a sparse model will hold, told before any of it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sparsemodel.runtime.bound import BoundProgram, LayerArrays, ParameterArrays, layer_geometry
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.program import Program

# Of the library's scratch memory (csrc/cpu): the entries of a layer in the forms that kernels read,
# and what a thread stages of a layer's input. Found by measuring, and held to it by a test.
_ENTRY_BYTES = 48
_STAGED, _MOST_STAGED = 3 << 19, 8 << 20


@dataclass(frozen=True)
class Footprint:
    """Bytes that a `Trainer` comes to hold in a step.

    Attributes:
        values: parameters and statistics; gradients and momentum have `arrays` of their own.
        arrays: gradients and momentum.
        patterns: of layers that are whole; those of the mask are the caller's.
        index: of the patterns by input.
        arena: activations and their gradients.
        scratch: of the native library, at most.
    """

    values: int
    arrays: int
    patterns: int
    index: int
    arena: int
    scratch: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.values + self.arrays + self.patterns + self.index + self.arena + self.scratch


def training_footprint(
    program: Program,
    patterns: Patterns | None,
    *,
    batch_size: int,
    recompute: bool = False,
    threads: int = 1,
    momentum: bool = True,
) -> Footprint:
    """What a `Trainer` of this program and mask comes to hold in a step.

    Args:
        batch_size: the largest batch.
        momentum: whether steps have momentum.

    Raises:
        SparseModelError: numbers outside their range, or the native library is not in use.
    """
    shapes = program.shapes()
    counts = {} if patterns is None else patterns.counts()
    stored = {name: counts.get(name, math.prod(shape)) for name, shape in shapes.items()}
    trained = sum(stored[name] for node in program.nodes for name in node.parameters())
    index = whole = 0
    for name, number in program.layers().items():
        geometry = layer_geometry(program, number, 1)
        sources = geometry.stride_h * geometry.stride_w * geometry.in_channels
        index += 4 * (2 * stored[name] + sources + 1)
        if name not in counts:
            whole += 4 * (stored[name] + geometry.out_channels + 1)
    largest = max((stored[name] for name in program.layers()), default=0)
    planes = (program.results[node.inputs[0]] for node in program.nodes if node.kind == "conv")
    staged = min(4 * batch_size * max(map(math.prod, planes), default=0), _MOST_STAGED)
    return Footprint(
        values=4 * sum(stored.values()),
        arrays=4 * trained * (2 if momentum else 1),
        patterns=whole,
        index=index,
        arena=_arena_bytes(program, stored, batch_size=batch_size, recompute=recompute),
        scratch=_ENTRY_BYTES * largest + threads * (_STAGED + staged),
    )


def _arena_bytes(
    program: Program, stored: dict[str, int], *, batch_size: int, recompute: bool
) -> int:
    """Of a plan bound to arrays that nobody touches, and which so take no memory."""
    plan = BoundProgram(program, batch_size=batch_size, recompute=recompute)

    def parameter(name: str | None) -> ParameterArrays | None:
        if name is None:
            return None
        return ParameterArrays(*(np.empty(stored[name], np.float32) for _ in range(2)))

    for number, node in enumerate(program.nodes):
        if node.kind == "conv":
            weight = parameter(node.weight)
            assert weight is not None, "a layer has a weight"
            rows, nnz = layer_geometry(program, number, 1).out_channels, len(weight.values)
            row_ptr = np.full(rows + 1, nnz, np.int32)
            row_ptr[0] = 0
            cols = np.empty(nnz, np.int32)
            plan.bind_layer(number, LayerArrays(row_ptr, cols, None, weight, parameter(node.bias)))
        elif node.kind == "norm":
            mean, variance = (
                None if name is None else np.empty(stored[name], np.float32)
                for name in (node.mean, node.variance)
            )
            batches = np.zeros(1, np.int64)
            plan.bind_norm(
                number, parameter(node.weight), parameter(node.bias), (mean, variance, batches)
            )
    plan.build()
    return plan.arena_bytes()
