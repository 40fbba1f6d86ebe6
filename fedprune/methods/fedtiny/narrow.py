"""A narrow network inside a wide one: the mask that keeps the largest channels whole.

At density d a mask of about √d of the channels of every layer has dense blocks of input and output
channels where other masks have a few weights an output. Outputs that one layer keeps are the
inputs that the next one reads, and what a residual stream adds up is one set of channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from prunelab.errors import RunError
from sparsemodel.runtime.adjust import largest
from sparsemodel.runtime.pattern import Pattern, Patterns, Shape
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState

Kept = Mapping[int, NDArray[np.bool_]]
"""Node -> which of its result's channels are kept."""


def narrow_mask(
    dense: SparseState, program: Program, prunable: Mapping[str, Shape], density: float
) -> Patterns:
    """The mask of the channels of largest weights, the same share of every layer's.

    A channel's size is that of the weights that write it, squared and summed over every layer that
    does. Classes and inputs are all kept. The share is the largest that keeps at most
    density · N weights; single channels are then added where they fit.

    Raises:
        RunError: one channel of every layer is too many already.
    """
    groups = channel_groups(program)
    sizes = _sizes(dense, program, groups)
    budget = round(density * sum(int(np.prod(shape)) for shape in prunable.values()))

    def mask(widths: Mapping[int, int]) -> tuple[Patterns, int]:
        kept = {group: largest(sizes[group], width) for group, width in widths.items()}
        patterns = _patterns(program, prunable, groups, kept)
        return patterns, sum(patterns.counts().values())

    def widths_at(share: float) -> dict[int, int]:
        return {group: max(1, int(share * len(size))) for group, size in sizes.items()}

    low, high = 0.0, 1.0
    for _ in range(20):  # to a millionth
        middle = (low + high) / 2
        low, high = (middle, high) if mask(widths_at(middle))[1] <= budget else (low, middle)
    widths = widths_at(low)
    if mask(widths)[1] > budget:
        raise RunError(
            f"candidates: 'narrow' keeps a channel of every layer, {mask(widths)[1]} weights, and "
            f"density {density:g} allows {budget}; leave it out"
        )
    for group in sorted(sizes, key=lambda group: widths[group] / len(sizes[group])):
        wider = {**widths, group: widths[group] + 1}
        if wider[group] <= len(sizes[group]) and mask(wider)[1] <= budget:
            widths = wider
    return mask(widths)[0]


def channel_groups(program: Program) -> list[int]:
    """For each node the group of its result's channels: the first node that has the same ones.

    The inputs' group is 0; the last layer's outputs, the classes, are a group too.
    """
    groups: list[int] = []
    for number, node in enumerate(program.nodes):
        same = [groups[i] for i in node.inputs]
        channels = [program.results[i][0] for i in (number, *node.inputs)]
        by_itself = node.groups > 1 and len(set(channels)) == 1  # each channel
        if not same or (node.kind == "conv" and not by_itself):
            groups.append(number)
            continue
        first = min(same)  # all inputs have one set of channels from here on
        groups = [first if group in same else group for group in groups]
        groups.append(first)
    return groups


def _sizes(
    dense: SparseState, program: Program, groups: list[int]
) -> dict[int, NDArray[np.float64]]:
    """Group -> size of each channel; of the groups that may be narrowed."""
    sizes: dict[int, NDArray[np.float64]] = {}
    for name, number in program.layers().items():
        weight = dense.values[name].astype(np.float64)
        found = (weight.reshape(len(weight), -1) ** 2).sum(1)
        sizes[groups[number]] = sizes.get(groups[number], 0.0) + found
    whole = (groups[0], groups[-1])
    return {group: size for group, size in sizes.items() if group not in whole}


def _patterns(
    program: Program, prunable: Mapping[str, Shape], groups: list[int], kept: Kept
) -> Patterns:
    layers, patterns = program.layers(), {}
    for name, shape in prunable.items():
        node = program.nodes[layers[name]]
        rows = kept.get(groups[layers[name]], np.ones(shape[0], dtype=bool))
        inputs = kept.get(groups[node.inputs[0]])
        length = int(np.prod(shape[1:]))
        if inputs is None or node.groups > 1:
            columns = np.ones(length, dtype=bool)
        else:  # a kernel, or what was flattened, of each channel
            columns = np.repeat(inputs, length // len(inputs))
        places = np.flatnonzero(rows)[:, None] * length + np.flatnonzero(columns)
        patterns[name] = Pattern.from_positions(shape, places.reshape(-1))
    return Patterns(patterns)
