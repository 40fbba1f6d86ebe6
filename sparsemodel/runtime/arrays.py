"""Arrays by name in one allocation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemodel.runtime.pattern import Shape

Array = NDArray[Any]


class NamedArrays:
    """float32 arrays by name, zeros at first, side by side in one allocation."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._memory = np.zeros(sum(math.prod(s) for s in shapes.values()), np.float32)
        self._views: dict[str, Array] = {}
        start = 0
        for name, shape in shapes.items():
            stop = start + math.prod(shape)
            self._views[name] = self._memory[start:stop].reshape(shape)
            start = stop

    def __bool__(self) -> bool:
        return bool(self._views)

    def __getitem__(self, name: str) -> Array:
        return self._views[name]

    def get(self, name: str | None) -> Array | None:
        """The array of a name; None where there is none."""
        return None if name is None else self._views.get(name)

    def items(self) -> Iterable[tuple[str, Array]]:
        """Names and arrays, in order."""
        return self._views.items()

    def clear(self) -> None:
        """Zeros again."""
        self._memory[:] = 0

    def nbytes(self) -> int:
        """Bytes of all."""
        return self._memory.nbytes
