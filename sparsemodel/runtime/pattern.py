"""Patterns: which weights of a layer exist, as CSR rows, never as a dense array of booleans."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparsemodel.errors import MaskError

DIGEST_BYTES = 16
_BITMAP_CHUNK = 1 << 19  # weights whose bits are packed at a time; a multiple of 8

Ints = NDArray[np.int32]
Shape = tuple[int, ...]


class Pattern:
    """Which weights of one layer exist, in CSR form of the weight flattened to [rows, row_length].

    A weight of two dimensions or more has a row for each output; one of fewer is a single row.

    Attributes:
        shape: of the dense weight.
        row_ptr: int32 [rows + 1], where each row's entries begin.
        cols: int32 [nnz], the flat index of each active weight inside its row, ascending.
    """

    __slots__ = ("cols", "row_ptr", "shape")

    def __init__(self, shape: Shape, row_ptr: Ints, cols: Ints) -> None:
        self.shape = tuple(int(size) for size in shape)
        self.row_ptr = row_ptr
        self.cols = cols

    @classmethod
    def from_positions(cls, shape: Shape, positions: NDArray[np.integer[Any]]) -> Pattern:
        """The pattern of ascending flat indices [nnz] into a weight of that shape.

        >>> Pattern.from_positions((2, 3), np.array([0, 2, 4])).cols
        array([0, 2, 1], dtype=int32)
        """
        rows, length = _rows(shape)
        ends = np.arange(0, (rows + 1) * length, length, dtype=np.int64)
        row_ptr = np.searchsorted(positions, ends).astype(np.int32)
        cols = np.repeat(ends[:-1], np.diff(row_ptr))
        np.subtract(positions, cols, out=cols)
        return cls(shape, row_ptr, cols.astype(np.int32))

    @classmethod
    def full(cls, shape: Shape) -> Pattern:
        """The pattern that keeps every weight."""
        rows, length = _rows(shape)
        row_ptr = np.arange(0, rows * length + 1, length, dtype=np.int32)
        return cls(shape, row_ptr, np.tile(np.arange(length, dtype=np.int32), rows))

    @property
    def num_active(self) -> int:
        """Number of active weights."""
        return len(self.cols)

    @property
    def num_weights(self) -> int:
        """Number of weights, active or pruned."""
        return math.prod(self.shape)

    @property
    def row_length(self) -> int:
        """Weights of a row, active or pruned."""
        return _rows(self.shape)[1]

    def positions(self) -> NDArray[np.int64]:
        """Flat index of each active weight in the dense weight: int64 [nnz], ascending."""
        starts = np.arange(len(self.row_ptr) - 1, dtype=np.int64) * self.row_length
        return np.repeat(starts, np.diff(self.row_ptr)) + self.cols

    def subset(self, kept: NDArray[np.bool_]) -> Pattern:
        """The pattern of some of its active weights.

        Args:
            kept: [nnz], in their order.

        >>> Pattern((2, 3), np.int32([0, 2, 3]), np.int32([0, 2, 1])).subset(
        ...     np.array([False, True, True])
        ... ).positions()
        array([2, 4])
        """
        ends = np.zeros(len(kept) + 1, dtype=np.int32)
        np.cumsum(kept, out=ends[1:])
        return Pattern(self.shape, ends[self.row_ptr], self.cols[kept])

    def bitmap(self) -> Iterator[NDArray[np.uint8]]:
        """A bit for each weight, first weight highest, packed a chunk at a time."""
        positions, total = self.positions(), self.num_weights
        starts = range(0, total, _BITMAP_CHUNK)
        cuts = np.searchsorted(positions, [*starts, total])
        for number, start in enumerate(starts):
            bits = np.zeros(min(_BITMAP_CHUNK, total - start), dtype=np.uint8)
            bits[positions[cuts[number] : cuts[number + 1]] - start] = 1
            yield np.packbits(bits)

    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return int(self.row_ptr.nbytes + self.cols.nbytes)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Pattern)
            and self.shape == other.shape
            and np.array_equal(self.row_ptr, other.row_ptr)
            and np.array_equal(self.cols, other.cols)
        )

    # It holds arrays; the digest of a whole set names them.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Pattern({self.shape}, {self.num_active:,} of {self.num_weights:,} active)"


P = TypeVar("P")


class PatternSet(Mapping[str, P]):
    """What a mask is in every form: one pattern a name, in a fixed order."""

    def __init__(self, patterns: Mapping[str, P]) -> None:
        if not patterns:
            raise MaskError("a mask needs at least one parameter; got none")
        self._patterns = dict(patterns)

    @abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape, in order."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Name -> number of active weights, in order."""

    @abstractmethod
    def digest(self) -> str:
        """32 hexadecimal digits: a hash of names, shapes and bits.

        Two masks are equal exactly when their digests are (up to a 128-bit hash collision).
        """

    def __getitem__(self, name: str) -> P:
        return self._patterns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} layers, "
            f"{self.num_active:,} of {self.num_weights:,} active, "
            f"density {self.density:.4g}, digest {self.digest()[:8]})"
        )

    @property
    def num_active(self) -> int:
        """Number of active weights."""
        return sum(self.counts().values())

    @property
    def num_weights(self) -> int:
        """Number of weights, active or pruned."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    @property
    def density(self) -> float:
        """Active weights over all weights, in [0, 1]."""
        return self.num_active / self.num_weights

    def densities(self) -> dict[str, float]:
        """Name -> density of that layer, in order."""
        shapes = self.shapes()
        return {name: count / math.prod(shapes[name]) for name, count in self.counts().items()}


class Patterns(PatternSet[Pattern]):
    """The patterns of a model's prunable parameters by name, in a fixed order: a mask's content.

    Raises:
        MaskError: there is none.
    """

    def __init__(self, patterns: Mapping[str, Pattern]) -> None:
        super().__init__(patterns)
        self._digest: str | None = None
        self._key: bytes | None = None

    def __eq__(self, other: object) -> bool:
        """By the patterns themselves, which is quicker than to make a digest."""
        return self is other or (
            isinstance(other, Patterns)
            and list(self) == list(other)
            and all(pattern == other[name] for name, pattern in self.items())
        )

    __hash__ = PatternSet.__hash__

    def shapes(self) -> dict[str, Shape]:
        """Name -> shape, in order."""
        return {name: pattern.shape for name, pattern in self._patterns.items()}

    def counts(self) -> dict[str, int]:
        """Name -> number of active weights, in order."""
        return {name: pattern.num_active for name, pattern in self._patterns.items()}

    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(pattern.nbytes() for pattern in self._patterns.values())

    def replace(self, patterns: Mapping[str, Pattern]) -> Patterns:
        """New patterns for some layers.

        Raises:
            MaskError: a name that is not here, or a pattern of another shape.
        """
        for name, pattern in patterns.items():
            if name not in self._patterns:
                raise MaskError(f"no layer {name!r} in this mask; it has {list(self._patterns)}")
            if pattern.shape != self._patterns[name].shape:
                raise MaskError(
                    f"mask of {name!r}: expected shape {self._patterns[name].shape}, "
                    f"got {pattern.shape}"
                )
        return Patterns({**self._patterns, **patterns})

    def digest(self) -> str:
        """32 hexadecimal digits: a hash of names, shapes and bits, that of the equal `Mask`."""
        if self._digest is None:
            sha = hashlib.sha256()
            for name, pattern in self._patterns.items():
                sha.update(f"{len(name.encode())}:{name}:{pattern.shape}:".encode())
                for chunk in pattern.bitmap():
                    sha.update(chunk.data)
            self._digest = sha.hexdigest()[: 2 * DIGEST_BYTES]
        return self._digest

    def key(self) -> bytes:
        """What equal patterns share, as a digest, but quicker made; good in this process alone."""
        if self._key is None:
            sha = hashlib.sha256()
            for name, pattern in self._patterns.items():
                sha.update(f"{len(name.encode())}:{name}:{pattern.shape}:".encode())
                sha.update(pattern.row_ptr.data)
                sha.update(pattern.cols.data)
            self._key = sha.digest()
        return self._key


def _rows(shape: Shape) -> tuple[int, int]:
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // rows
