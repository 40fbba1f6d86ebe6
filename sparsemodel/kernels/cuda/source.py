"""Text of the CUDA kernels, csrc/cuda/*.cu: headers in place, and what each kernel takes.

One table of parameters, read from the source, serves the GPU and the tests that run the same
text on a CPU, so that a call that does not fit its kernel fails in both.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsemodel.errors import SparseModelError

FOLDER = Path(__file__).parents[2] / "csrc" / "cuda"
BLOCK = 256  # threads of every block, as in common.cuh

# How each type of activations is chosen in real.cuh.
REALS: dict[torch.dtype, tuple[str, ...]] = {
    torch.float32: (),
    torch.bfloat16: ("REAL_BFLOAT16",),
    torch.float16: ("REAL_FLOAT16",),
}

Parameters = tuple[tuple[str, type[Any]], ...]

_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)
_KERNEL = re.compile(r"^KERNEL (\w+)\(([^)]*)\)", re.MULTILINE)
_TYPES: dict[str, type[Any]] = {
    "int": ctypes.c_int32,
    "uint32": ctypes.c_uint32,
    "int64": ctypes.c_int64,
    "uint64": ctypes.c_uint64,
    "float": ctypes.c_float,
}


@functools.cache
def source(family: str) -> str:
    """The text of a kernel file, each header once, where it is first included."""
    return _flat(FOLDER / f"{family}.cu", set())


@functools.cache
def kernels(family: str) -> dict[str, Parameters]:
    """Name of each kernel of a file -> its parameters: name and ctypes type."""
    found = _KERNEL.findall(source(family))
    return {name: tuple(map(_parameter, text.split(","))) for name, text in found}


def arguments(family: str, kernel: str, given: Sequence[Any]) -> list[Any]:
    """The arguments of a call as ctypes numbers, pointers as integers.

    Args:
        given: a tensor or None for a pointer, a number for a number.

    Raises:
        SparseModelError: a size that its parameter cannot hold.
    """
    parameters = kernels(family)[kernel]
    assert len(given) == len(parameters), f"{kernel} takes {len(parameters)} arguments"
    return [_argument(kernel, p, value) for p, value in zip(parameters, given, strict=True)]


def _argument(kernel: str, parameter: tuple[str, type[Any]], value: Any) -> Any:
    name, kind = parameter
    if kind is ctypes.c_void_p:
        assert value is None or isinstance(value, torch.Tensor), f"{kernel}: {name} is a pointer"
        return 0 if value is None else value.data_ptr()
    assert isinstance(value, int | float), f"{kernel}: {name} is a number"
    number = kind(value)
    if isinstance(value, int) and number.value != value:
        raise SparseModelError(f"{kernel}: {name} = {value:,} is too large; split the call")
    return number


def _parameter(text: str) -> tuple[str, type[Any]]:
    kind, _, name = text.strip().rpartition(" ")
    return name, ctypes.c_void_p if "*" in kind else _TYPES[kind]


def _flat(path: Path, seen: set[Path]) -> str:
    if path in seen:
        return ""
    seen.add(path)
    text = path.read_text().replace("#pragma once\n", "")
    return _INCLUDE.sub(lambda match: _flat(path.parent / match[1], seen), text)
