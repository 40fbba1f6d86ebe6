"""The shape of what each kind of node gives, and whether its parameters and inputs fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sparsemodel.errors import ProgramError
from sparsemodel.runtime.pattern import Shape
from sparsemodel.runtime.program_text import MAX_SIZE

if TYPE_CHECKING:
    from sparsemodel.runtime.program import Node

MAX_WINDOW = 256  # places of a pooling window

Shapes = Mapping[str, Shape]


def result_shape(
    node: Node, sources: tuple[Shape, ...], input_shape: Shape, tensors: Shapes
) -> Shape:
    """The shape of a node's result, of one sample, from those of its inputs.

    Raises:
        ProgramError: inputs, parameters or geometry do not fit; the message does not name the node.
    """
    few, many = _NUM_INPUTS.get(node.kind, (1, 1))
    if not few <= len(sources) <= many:
        raise ProgramError(f"expected {few} to {many} inputs, got {len(sources)}")
    if node.kind == "input":
        if len(input_shape) not in {1, 3} or min(input_shape) < 1:
            raise ProgramError(f"expected input [C, H, W] or [features], got {input_shape}")
        result = input_shape
    else:
        result = _RULES[node.kind](node, sources, tensors)
    if math.prod(result) > MAX_SIZE:
        raise ProgramError(f"a result of shape {result} is too large")
    return result


def planes(shape: Shape) -> tuple[int, int, int]:
    """A shape as (C, H, W): features are channels of one pixel."""
    channels, height, width = (*shape, 1, 1)[:3]
    return channels, height, width


def planes_around(shape: Shape, padding: tuple[int, int]) -> tuple[int, int, int]:
    """A shape as (C, H, W) with zeros around."""
    channels, height, width = planes(shape)
    return channels, height + 2 * padding[0], width + 2 * padding[1]


def _conv(node: Node, sources: tuple[Shape, ...], tensors: Shapes) -> Shape:
    (source,) = sources
    if node.weight is None:
        raise ProgramError("a convolution needs a weight")
    weight = _tensor(node.weight, tensors)
    if math.prod(weight) > MAX_SIZE:
        raise ProgramError(f"the weight {node.weight!r} of shape {weight} is too large")
    if len(weight) != len(source) + 1:
        raise ProgramError(
            f"the weight {node.weight!r} of shape {weight} does not fit an input [B, *{source}]"
        )
    out, width, *kernel = weight
    if out % node.groups or width * node.groups != source[0]:
        raise ProgramError(
            f"the weight {node.weight!r} of shape {weight} in {node.groups} groups does not fit "
            f"{source[0]} channels"
        )
    if node.bias is not None:
        _expect(node.bias, (out,), tensors)
    if not kernel:
        plain = (node.stride, node.padding, node.dilation, node.groups)
        if plain != ((1, 1), (0, 0), (1, 1), 1):
            raise ProgramError("a linear layer has stride 1, no padding and one group")
        return (out,)
    if math.prod((*node.stride, source[0])) > MAX_SIZE:
        raise ProgramError(f"the stride {node.stride} is too large")
    sizes = [
        (n + 2 * pad - dilation * (k - 1) - 1) // stride + 1
        for n, k, stride, pad, dilation in zip(
            source[1:], kernel, node.stride, node.padding, node.dilation, strict=True
        )
    ]
    if min(sizes) < 1:
        raise ProgramError(f"the window {tuple(kernel)} does not fit its input [B, *{source}]")
    if math.prod(planes_around(source, node.padding)) > MAX_SIZE:
        raise ProgramError(f"the padding {node.padding} is too large")
    return (out, sizes[0], sizes[1])


def _norm(node: Node, sources: tuple[Shape, ...], tensors: Shapes) -> Shape:
    _same(sources)
    channels = (sources[0][0],)
    for name in node.tensors():
        _expect(name, channels, tensors)
    if (node.mean is None) != (node.variance is None):
        raise ProgramError("only one of mean and variance is there")
    if not (0 <= node.eps <= MAX_SIZE) or not (node.momentum is None or 0 <= node.momentum <= 1):
        raise ProgramError(
            f"expected eps >= 0 and momentum in [0, 1], got {node.eps} and {node.momentum}"
        )
    return sources[0]


def _elementwise(node: Node, sources: tuple[Shape, ...], tensors: Shapes) -> Shape:
    _same(sources)
    return sources[0]


def _pool(node: Node, sources: tuple[Shape, ...], tensors: Shapes) -> Shape:
    channels, *size = _image(sources[0])
    fits = all(
        0 <= 2 * pad <= k <= n + 2 * pad and stride >= 1
        for n, k, stride, pad in zip(size, node.kernel, node.stride, node.padding, strict=True)
    )
    if not fits or math.prod(node.kernel) > MAX_WINDOW:
        raise ProgramError(
            f"a window {node.kernel} with padding {node.padding} does not fit {size[0]}×{size[1]} "
            f"(it has at most {MAX_WINDOW} places, and padding at most half of it)"
        )
    height, width = (
        (n + 2 * pad - k) // stride + 1
        for n, k, stride, pad in zip(size, node.kernel, node.stride, node.padding, strict=True)
    )
    return (channels, height, width)


def _global_pool(node: Node, sources: tuple[Shape, ...], tensors: Shapes) -> Shape:
    return (_image(sources[0])[0], 1, 1)


def _flatten(node: Node, sources: tuple[Shape, ...], tensors: Shapes) -> Shape:
    return (math.prod(_image(sources[0])),)


def _image(shape: Shape) -> Shape:
    if len(shape) != 3:
        raise ProgramError(f"expected an input [B, C, H, W], got [B, *{shape}]")
    return shape


def _same(sources: tuple[Shape, ...]) -> None:
    if sources[-1] != sources[0]:
        raise ProgramError(f"inputs of shapes [B, *{sources[0]}] and [B, *{sources[-1]}]")


def _tensor(name: str, tensors: Shapes) -> Shape:
    if name not in tensors:
        raise ProgramError(f"there is no tensor {name!r}")
    return tensors[name]


def _expect(name: str, shape: Shape, tensors: Shapes) -> None:
    if _tensor(name, tensors) != shape:
        raise ProgramError(f"expected {name!r} of shape {shape}, got {tensors[name]}")


_NUM_INPUTS = {"input": (0, 0), "norm": (1, 2), "add": (2, 2)}  # (least, most); else one
_RULES: dict[str, Callable[[Node, tuple[Shape, ...], Shapes], Shape]] = {
    "conv": _conv,
    "norm": _norm,
    "relu": _elementwise,
    "add": _elementwise,
    "max_pool": _pool,
    "avg_pool": _pool,
    "global_pool": _global_pool,
    "flatten": _flatten,
}
