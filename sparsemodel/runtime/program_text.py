"""Reading a program's text: JSON of the expected structure and sizes, or an error."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsemodel.errors import ProgramError
from sparsemodel.runtime.pattern import Shape

VERSION = 1
MAX_SIZE = 2**31 - 1  # of the library's integers
_MAX_NAME = 256
_MAX_DIMENSIONS = 8

# What a node of each kind says besides its kind.
_WINDOW = ("inputs", "name", "kernel", "stride", "padding")
FIELDS: dict[str, tuple[str, ...]] = {
    "input": ("name",),
    "conv": (*("inputs", "name", "weight", "bias", "stride", "padding", "dilation", "groups"),),
    "norm": (*("inputs", "name", "weight", "bias", "mean", "variance", "eps", "momentum", "relu"),),
    "relu": ("inputs", "name"),
    "add": ("inputs", "name"),
    "max_pool": _WINDOW,
    "avg_pool": (*_WINDOW, "include_pad"),
    "global_pool": ("inputs", "name"),
    "flatten": ("inputs", "name"),
}


@dataclass(frozen=True)
class ProgramLimits:
    """What a program that comes from elsewhere may ask for.

    Attributes:
        text_bytes: of its text.
        nodes: how many operations.
        tensors: how many tensors.
        weights: numbers in all tensors together, were they dense.
        activation_bytes: of the results of all nodes for one sample, as float32. The arena of a
            training step is smaller than about twice as much times the batch.
    """

    text_bytes: int = 1 << 20
    nodes: int = 4096
    tensors: int = 16384
    weights: int = 1 << 30
    activation_bytes: int = 1 << 30


Parts = tuple[Shape, list[dict[str, Any]], tuple[tuple[str, Shape], ...]]


def read_program(text: object, limits: ProgramLimits) -> Parts:
    """Input shape, fields of the nodes, and tensors of a text.

    Raises:
        ProgramError: another structure, a wrong type, or a number beyond the limits.
    """
    content = _fields(_json(text, limits), "the program", ("program", "input", "nodes", "tensors"))
    if type(content["program"]) is not int or content["program"] != VERSION:
        raise ProgramError(
            f"expected a program of version {VERSION}, got {reprlib.repr(content['program'])}"
        )
    nodes = [
        _node(node, f"node {number}")
        for number, node in enumerate(_list(content["nodes"], "nodes", limits.nodes))
    ]
    tensors = tuple(
        _tensor(pair, f"tensor {number}")
        for number, pair in enumerate(_list(content["tensors"], "tensors", limits.tensors))
    )
    weights = sum(math.prod(shape) for _, shape in tensors)
    if weights > limits.weights:
        raise ProgramError(f"the tensors have {weights:,} numbers; the limit is {limits.weights:,}")
    return _shape(content["input"], "input"), nodes, tensors


def _json(text: object, limits: ProgramLimits) -> Any:
    if not isinstance(text, str | bytes):
        raise ProgramError(f"expected a text, got {type(text).__name__}")
    try:
        data = text.encode() if isinstance(text, str) else text
        if len(data) > limits.text_bytes:
            raise ProgramError(
                f"the text has {len(data):,} bytes; the limit is {limits.text_bytes:,}"
            )
        return json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except ProgramError:
        raise
    except (ValueError, RecursionError) as error:
        raise ProgramError(f"expected JSON in UTF-8: {str(error)[:200]}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ProgramError(f"a key occurs twice among {reprlib.repr([key for key, _ in pairs])}")
    return content


def _refuse_constant(constant: str) -> Any:
    raise ProgramError(f"expected finite numbers, got {constant}")


def _fields(value: Any, where: str, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProgramError(f"{where}: expected an object, got {reprlib.repr(value)}")
    if value.keys() != set(names):
        odd = reprlib.repr(sorted(value.keys() ^ set(names)))
        raise ProgramError(f"{where}: missing or unknown fields {odd}; expected {list(names)}")
    return value


def _node(value: Any, where: str) -> dict[str, Any]:
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ProgramError(
            f"{where}: expected an object whose kind is one of {list(FIELDS)}, got "
            f"{reprlib.repr(value)}"
        )
    names = FIELDS[kind]
    given = _fields(value, f"{where} ({kind})", ("kind", *names))
    read = {name: _READERS[name](given[name], f"{where} ({kind}), {name}") for name in names}
    return {"kind": kind} | read


def _tensor(value: Any, where: str) -> tuple[str, Shape]:
    pair = _list(value, where, 2)
    if len(pair) != 2:
        raise ProgramError(f"{where}: expected a name and a shape, got {reprlib.repr(value)}")
    return _name(pair[0], where), _shape(pair[1], where)


def _list(value: Any, where: str, limit: int) -> list[Any]:
    if not isinstance(value, list):
        raise ProgramError(f"{where}: expected a list, got {reprlib.repr(value)}")
    if len(value) > limit:
        raise ProgramError(f"{where}: {len(value):,} of them; the limit is {limit:,}")
    return value


def _shape(value: Any, where: str) -> Shape:
    sizes = _list(value, where, _MAX_DIMENSIONS)
    return tuple(_integer(size, where, least=1) for size in sizes)


def _integer(value: Any, where: str, *, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= MAX_SIZE:
        raise ProgramError(
            f"{where}: expected an integer of {least} to {MAX_SIZE}, got {reprlib.repr(value)}"
        )
    return value


def _inputs(value: Any, where: str) -> tuple[int, ...]:
    return tuple(_integer(number, where) for number in _list(value, where, 2))


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME or not value.isprintable():
        raise ProgramError(
            f"{where}: expected a name of 1 to {_MAX_NAME} printable characters, got "
            f"{reprlib.repr(value)}"
        )
    return value


def _optional_name(value: Any, where: str) -> str | None:
    return None if value is None else _name(value, where)


def _title(value: Any, where: str) -> str:
    return "" if isinstance(value, str) and not value else _name(value, where)


def _pair(value: Any, where: str, least: int) -> tuple[int, int]:
    sizes = _list(value, where, 2)
    if len(sizes) != 2:
        raise ProgramError(f"{where}: expected height and width, got {reprlib.repr(value)}")
    return _integer(sizes[0], where, least=least), _integer(sizes[1], where, least=least)


def _sizes(value: Any, where: str) -> tuple[int, int]:
    return _pair(value, where, 1)


def _padding(value: Any, where: str) -> tuple[int, int]:
    return _pair(value, where, 0)


def _groups(value: Any, where: str) -> int:
    return _integer(value, where, least=1)


def _real(value: Any, where: str) -> float:
    # A comparison of integers alone: a huge one has no float.
    if type(value) not in {int, float} or not 0 <= value <= MAX_SIZE:
        raise ProgramError(
            f"{where}: expected a number of 0 to {MAX_SIZE}, got {reprlib.repr(value)}"
        )
    return float(value)


def _optional_real(value: Any, where: str) -> float | None:
    return None if value is None else _real(value, where)


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ProgramError(f"{where}: expected true or false, got {reprlib.repr(value)}")
    return value


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "inputs": _inputs,
    "name": _title,
    "weight": _optional_name,
    "bias": _optional_name,
    "mean": _optional_name,
    "variance": _optional_name,
    "kernel": _sizes,
    "stride": _sizes,
    "padding": _padding,
    "dilation": _sizes,
    "groups": _groups,
    "eps": _real,
    "momentum": _optional_real,
    "relu": _flag,
    "include_pad": _flag,
}
