"""Weights measured against their output, where batch norm makes the output's scale mean nothing.

Behind batch norm the weights w_o of an output o and c · w_o are the same function, with gradients
g_o and g_o / c: an output of small weights has large gradients, and one that is constant, without
a weight or with weights that read channels of zeros alone, has them 1 / √ε times too large. So the
largest |g| grow weights where outputs are small, and first of all where they are silent.
|g| · ‖w_o‖ and |w| / ‖w_o‖ say the same at any scale. Source: the invariance is van Laarhoven's (L2
regularization versus batch and weight normalization, 2017); to rank weights by it is our own.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from sparsemodel.runtime.pattern import Pattern
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import Array, SparseState


def normed_layers(program: Program) -> dict[str, str | None]:
    """Weight of each layer whose outputs go to a batch norm alone -> that norm's scale, if any."""
    readers = Counter(number for node in program.nodes for number in node.inputs)
    found: dict[str, str | None] = {}
    for node in program.nodes:
        if node.kind != "norm":
            continue
        layer = program.nodes[node.inputs[0]]
        if layer.kind == "conv" and layer.weight and readers[node.inputs[0]] == 1:
            found[layer.weight] = node.weight
    return found


def output_norms(pattern: Pattern, weights: Array) -> NDArray[np.float64]:
    """‖w_o‖ of each output: float64 [out], 0 of a silent one.

    >>> pattern = Pattern.from_positions((3, 2), np.array([0, 1, 5]))
    >>> output_norms(pattern, np.float32([3, -4, 2]))
    array([5., 0., 2.])
    """
    squares = weights.astype(np.float64) ** 2
    return np.sqrt(np.bincount(_rows(pattern), squares, minlength=len(pattern.row_ptr) - 1))


def shares(pattern: Pattern, weights: Array) -> NDArray[np.float64]:
    """|w| / ‖w_o‖ of each active weight: float64 [active]; 0 where all of an output's are zero.

    >>> pattern = Pattern.from_positions((3, 2), np.array([0, 1, 5]))
    >>> shares(pattern, np.float32([3, -4, 2]))
    array([0.6, 0.8, 1. ])
    """
    norms = output_norms(pattern, weights)[_rows(pattern)]
    return np.abs(weights.astype(np.float64)) / np.where(norms > 0, norms, 1.0)


def constant_outputs(program: Program, state: SparseState) -> dict[str, NDArray[np.bool_]]:
    """Weight of each layer -> which of its outputs are one number, whatever the input: bool [out].

    Those without a weight, and those that read channels of zeros alone. A channel that is another
    number throughout counts as one that varies: at the borders, with the zeros around it, it does.
    """
    silent: list[NDArray[np.bool_]] = []  # of each node: channels of zeros
    found: dict[str, NDArray[np.bool_]] = {}
    for node, result in zip(program.nodes, program.results, strict=True):
        read = [silent[number] for number in node.inputs]
        if node.kind == "input":
            channels = np.zeros(result[0], dtype=bool)
        elif node.kind == "conv":
            name = str(node.weight)
            found[name] = ~_live_rows(state, name, ~read[0], groups=node.groups)
            channels = found[name] & _are_zero(state, node.bias)
        elif node.kind == "norm":
            source = program.nodes[node.inputs[0]]
            constant = found[str(source.weight)] if source.kind == "conv" else read[0]
            shift = 0.0 if node.bias is None else state.values[node.bias]
            channels = constant & (shift <= 0 if node.relu else shift == 0)
            channels = np.logical_and.reduce([channels, *read[1:]])
        elif node.kind == "flatten":
            channels = np.repeat(read[0], result[0] // len(read[0]))
        else:  # a channel reads the same one of all inputs, and makes zeros of zeros
            channels = np.logical_and.reduce(read)
        silent.append(channels)
    return found


def _are_zero(state: SparseState, name: str | None) -> NDArray[np.bool_] | bool:
    return True if name is None else state.values[name] == 0


def _live_rows(
    state: SparseState, name: str, read: NDArray[np.bool_], *, groups: int
) -> NDArray[np.bool_]:
    """Outputs with a weight at one of the inputs `read`."""
    pattern = state.pattern(name) or Pattern.full(state.values[name].shape)
    rows = _rows(pattern)
    columns = pattern.positions() % pattern.row_length
    width = len(read) // groups  # inputs of a group
    inputs = columns // (pattern.row_length // width) + rows // (pattern.shape[0] // groups) * width
    live = np.zeros(pattern.shape[0], dtype=bool)
    live[rows[read[inputs]]] = True
    return live


def unit_outputs(state: SparseState, program: Program) -> SparseState:
    """The same function of a batch, its gradients those of weights of norm 1 at every output.

    Before a batch norm the weights of each output are divided by their norm, so that its gradients
    are g · ‖w_o‖. Of a constant output the norm passes on its shift alone, whatever the scale γ
    is; with γ = 0 it has no gradient either.
    """
    changed: dict[str, Array] = {}
    constant = constant_outputs(program, state)
    for name, scale in normed_layers(program).items():
        pattern = state.pattern(name)
        if pattern is None:
            continue
        norms = output_norms(pattern, state.values[name])
        divided = state.values[name] / np.where(norms > 0, norms, 1.0)[_rows(pattern)]
        changed[name] = divided.astype(np.float32)
        if scale is not None:
            changed[scale] = np.where(constant[name], 0, state.values[scale]).astype(np.float32)
    return state.replace(changed)


def _rows(pattern: Pattern) -> NDArray[np.int64]:
    """The output of each active weight."""
    return np.repeat(np.arange(len(pattern.row_ptr) - 1), np.diff(pattern.row_ptr))
