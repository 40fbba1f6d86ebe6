"""The state of a sparse model: of layers under a pattern the active values, the rest whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsemodel.runtime.pattern import Pattern, Patterns, Shape

Array = NDArray[Any]
Tensors = Mapping[str, Array]
"""Name -> float32 array, each tensor whole."""
LayerEntries = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Single weights of a layer: flat positions, ascending, and values, both [k]."""
Entries = Mapping[str, LayerEntries]
"""Single weights of some layers, by the layer's name."""


def is_counter(name: str) -> bool:
    """Whether an entry of a torch state counts the batches of a batch norm: no state has it."""
    return name.rpartition(".")[2] == "num_batches_tracked"


@dataclass(frozen=True, eq=False)
class SparseState:
    """The float state of a model, parameters and running statistics, in the model's order.

    Attributes:
        values: name -> float32 array; of a layer in `patterns` its active values [nnz], in the
            order of its positions, else the whole tensor.
        patterns: of the pruned layers; None for a dense model.
    """

    values: Mapping[str, Array]
    patterns: Patterns | None = None

    def shapes(self) -> dict[str, Shape]:
        """Name -> shape of the whole tensor, in order."""
        return {
            name: value.shape if (pattern := self.pattern(name)) is None else pattern.shape
            for name, value in self.values.items()
        }

    def dense(self) -> dict[str, Array]:
        """Name -> whole tensor, zeros at pruned places; what is whole is not copied."""
        return {name: self.dense_layer(name) for name in self.values}

    def dense_layer(self, name: str) -> Array:
        """One tensor as a whole, zeros at pruned places."""
        value, pattern = self.values[name], self.pattern(name)
        if pattern is None:
            return value
        whole = np.zeros(pattern.num_weights, dtype=value.dtype)
        whole[pattern.positions()] = value
        return whole.reshape(pattern.shape)

    def replace(self, values: Mapping[str, Array]) -> SparseState:
        """The same with other values for some names."""
        return SparseState({**self.values, **values}, self.patterns)

    def ordered(self, names: Iterable[str]) -> SparseState:
        """The same with its tensors in the order of `names`, which are its own."""
        return SparseState({name: self.values[name] for name in names}, self.patterns)

    def nbytes(self) -> int:
        """Bytes of values and patterns."""
        held = sum(value.nbytes for value in self.values.values())
        return held + (self.patterns.nbytes() if self.patterns is not None else 0)

    def pattern(self, name: str) -> Pattern | None:
        """The pattern of a tensor; None where it is whole."""
        return None if self.patterns is None else self.patterns.get(name)
