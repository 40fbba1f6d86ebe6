"""Networks within a network: programs of fewer channels, whose states are leading slices.

A layer of c channels has the first ceil(rate · c) of them; inputs and classes are all there. So
the state of a narrower network is the beginning of each tensor of the wider one along every axis,
and networks of several rates are nested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sparsemodel.errors import ProgramError
from sparsemodel.runtime.pattern import Shape
from sparsemodel.runtime.program import Node, Program
from sparsemodel.runtime.program_shapes import result_shape
from sparsemodel.runtime.state import SparseState

_ROUNDING = 1e-9  # 0.2 · 15 is 3, whatever floats make of it


def narrowed(program: Program, rate: float) -> Program:
    """The program of a share of the channels, in (0, 1].

    Raises:
        ProgramError: its widths do not nest; says where and why.
    """
    return narrowed_to(program, channels_of(program, rate))


def channels_of(program: Program, rate: float) -> list[int]:
    """Channels of each convolution and linear layer at a rate, in the order of the nodes."""
    last = output_layer(program)
    found = []
    for number in program.layers().values():
        channels = program.results[number][0]
        found.append(channels if number == last else math.ceil(rate * channels * (1 - _ROUNDING)))
    return found


def narrowed_to(program: Program, channels: Sequence[int]) -> Program:
    """The program whose layers have so many channels; see `channels_of`.

    Raises:
        ProgramError: a number of channels that a layer cannot have, or widths that do not nest.
    """
    layers = program.layers()
    if len(channels) != len(layers):
        raise ProgramError(f"expected channels of {len(layers)} layers, got {len(channels)}")
    wanted = dict(zip(layers.values(), channels, strict=True))
    tensors, results, nodes = program.shapes(), list[Shape](), list[Node]()
    for number, node in enumerate(program.nodes):
        sources = tuple(results[i] for i in node.inputs)
        if number in wanted:
            nodes.append(_layer(program, number, sources[0][0], wanted[number], tensors))
        else:
            nodes.append(node)
            if node.kind == "norm":
                tensors |= dict.fromkeys(node.tensors(), (sources[0][0],))
        try:
            results.append(result_shape(nodes[-1], sources, program.input_shape, tensors))
        except ProgramError as error:
            raise ProgramError(
                f"{program.title(number)}: the network's widths do not nest ({error})"
            ) from None
    return Program(program.input_shape, tuple(nodes), tuple(tensors.items()))


def output_layer(program: Program) -> int:
    """The number of the layer whose outputs are the logits.

    Raises:
        ProgramError: there is more than pooling and shapes behind the last layer.
    """
    number = len(program.nodes) - 1
    while (node := program.nodes[number]).kind in {"flatten", "global_pool", "avg_pool"}:
        (number,) = node.inputs
    if node.kind != "conv":
        raise ProgramError(f"{program.title(number)}: expected a layer that gives the logits")
    return number


def scaled_norms(program: Program, rate: float) -> Program:
    """The program whose batch norms see their inputs divided by `rate` while it trains.

    The norm of x / r is that of x with r² ε in place of ε, and statistics are those of x.

    Raises:
        ProgramError: an output of a hidden layer is read by something else than a norm.
    """
    last, scaled = output_layer(program), []
    for node in program.nodes:
        sources = node.inputs[1:] if node.kind == "norm" else node.inputs
        bare = [i for i in sources if program.nodes[i].kind == "conv" and i != last]
        if bare:
            raise ProgramError(f"{program.title(bare[0])}: no batch norm follows it")
        scaled.append(replace(node, eps=node.eps * rate**2) if node.kind == "norm" else node)
    return replace(program, nodes=tuple(scaled))


def leading(state: SparseState, shapes: Mapping[str, Shape]) -> SparseState:
    """The first entries of each tensor of a dense state along every axis, copied."""
    assert state.patterns is None, "slices are of dense states"
    return SparseState(
        {
            name: state.values[name][tuple(slice(size) for size in shape)].copy()
            for name, shape in shapes.items()
        }
    )


def _layer(
    program: Program, number: int, inputs: int, outputs: int, tensors: dict[str, Shape]
) -> Node:
    """A layer of so many channels; its tensors' shapes are put in place."""
    node, shapes = program.nodes[number], program.shapes()
    assert node.weight is not None, "a layer has a weight"
    out, width, *kernel = shapes[node.weight]
    groups = node.groups
    if groups > 1:
        if width > 1:
            raise ProgramError(
                f"{program.title(number)}: its {groups} groups of {width} channels do not nest"
            )
        groups, outputs = inputs, inputs * (out // groups)  # each channel by itself
    if not 1 <= outputs <= out:
        raise ProgramError(f"{program.title(number)}: expected 1 to {out} channels, got {outputs}")
    tensors[node.weight] = (outputs, inputs // groups, *kernel)
    if node.bias is not None:
        tensors[node.bias] = (outputs,)
    return replace(node, groups=groups)
