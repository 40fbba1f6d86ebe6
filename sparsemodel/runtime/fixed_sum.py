"""Sums of floating-point numbers as integers: the same bits in whatever order they are added.

A value x is held as (high, low), both int64: x = high / 2¹⁶ + low / 2⁵², high signed,
0 <= low <= 2³⁶. Values of float32 above 1e-8 in magnitude are held exactly. The bounds leave room
for a total weight below 2²⁷ in 64 bits: 2³⁶ · 2²⁷ = 2⁶³.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels.cpu.library import library
from sparsemodel.runtime.state import Array

HIGH_BITS = 16
LOW_BITS = 36
MAX_ABSOLUTE_VALUE = 2.0**20
MAX_TOTAL_WEIGHT = 2**27 - 1
_CHUNK = 1 << 16  # values at a time, so that a large tensor needs little memory besides


def word_width(total_weight: int) -> int:
    """Bytes that hold either word of any sum of that weight.

    >>> word_width(1), word_width(2**11), word_width(2**11 + 1)
    (5, 6, 7)
    """
    return -(-(HIGH_BITS + 20 + 1 + (total_weight - 1).bit_length()) // 8)


class FixedSum:
    """A running sum of weighted arrays of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        size = int(np.prod(shape, dtype=np.int64))
        self._high, self._low = np.zeros(size, np.int64), np.zeros(size, np.int64)

    def add(self, values: Array, means: Array | None, weight: int) -> int:
        """Add weight · (values + means²); a call with -weight takes that back exactly.

        Args:
            values: float32 or float64, of the sum's shape.
            means: of the same shape; None adds the values alone.
            weight: of magnitude below 2³¹.

        Returns:
            How many values were left out: not finite, or of magnitude 2²⁰ or more.
        """
        return FixedSums([self]).add([values], [means], weight)[0]

    def _add(self, values: Array, means: Array | None, weight: int) -> int:
        flat, squared = values.reshape(-1), None if means is None else means.reshape(-1)
        refused = 0
        for start in range(0, len(flat), _CHUNK):
            part = slice(start, start + _CHUNK)
            x = flat[part].astype(np.float64)
            if squared is not None:
                x += squared[part].astype(np.float64) ** 2
            fits = np.abs(x) < MAX_ABSOLUTE_VALUE
            refused += int(len(x) - np.count_nonzero(fits))
            x = np.where(fits, x, 0.0) * 2.0**HIGH_BITS
            whole = np.floor(x)
            # The rest is below 1 and exact; rounding it up to 2^36 is allowed and still adds up.
            rest = np.rint((x - whole) * 2.0**LOW_BITS)
            self._high[part] += weight * whole.astype(np.int64)
            self._low[part] += weight * rest.astype(np.int64)
        return refused

    def take(self, other: FixedSum, positions: NDArray[np.int64]) -> None:
        """Add another sum at these positions, each once."""
        self._high[positions] += other._high
        self._low[positions] += other._low

    def words(self) -> NDArray[np.uint64]:
        """The sum as numbers modulo 2^64: all high ones, then all low ones, uint64 [2 n]."""
        return np.concatenate([self._high, self._low]).view(np.uint64)

    @classmethod
    def of_words(
        cls, shape: tuple[int, ...], words: NDArray[np.uint64], *, width: int = 8
    ) -> FixedSum:
        """The sum whose `words`, modulo 2^(8 · width), these are; see `word_width`.

        >>> total = FixedSum((1,))
        >>> total.add(np.float32([-1.5]), None, 2)
        0
        >>> cut = total.words() % np.uint64(2**40)
        >>> FixedSum.of_words((1,), cut, width=word_width(2)).mean(2)
        array([-1.5])
        """
        total = cls(shape)
        shift = np.int64(64 - 8 * width)
        high, low = (words.view(np.int64) << shift).reshape(2, -1)
        total._high[:] = high >> shift  # with its sign
        total._low[:] = (low.view(np.uint64) >> np.uint64(shift)).view(np.int64)
        return total

    def mean(self, total_weight: int) -> NDArray[np.float64]:
        """The mean that a sum of this weight holds."""
        mean = self._high / 2.0**HIGH_BITS
        mean += self._low / 2.0 ** (HIGH_BITS + LOW_BITS)
        mean /= total_weight
        return mean.reshape(self.shape)


class FixedSums:
    """Several sums that are added to together: by one call of the native library, if it is there.

    The bits are those of `FixedSum.add`, one after the other.
    """

    def __init__(self, sums: Sequence[FixedSum]) -> None:
        self._sums = sums
        self._counts = [len(total._high) for total in sums]
        self._sizes = np.array(self._counts, np.int64)
        self._high = _addresses([total._high for total in sums])
        self._low = _addresses([total._low for total in sums])

    def add(self, values: Sequence[Array], means: Sequence[Array | None], weight: int) -> list[int]:
        """Add to each sum, as `FixedSum.add` does; how many values of each were left out.

        Raises:
            SparseModelError: an array has another size than its sum.
        """
        native = library()
        given = [mean for mean in means if mean is not None]
        if native is None or not all(map(_is_plain, (*values, *given))):
            together = zip(self._sums, values, means, strict=True)
            return [total._add(value, mean, weight) for total, value, mean in together]
        sizes = [value.size for value in values]
        beside = [s for s, mean in zip(sizes, means, strict=True) if mean is not None]
        if sizes != self._counts or [mean.size for mean in given] != beside:
            raise SparseModelError("arrays of other sizes than the sums that they are added to")
        refused = np.empty(len(self._sums), np.int64)
        native.fixed_add(
            len(self._sums), self._sizes, _addresses(values), _addresses(means), weight,
            self._high, self._low, refused, 1,
        )  # fmt: skip
        left_out: list[int] = refused.tolist()
        return left_out


def _is_plain(array: Array) -> bool:
    """Whether the native library takes it as it is."""
    return array.dtype == np.float32 and array.flags.c_contiguous


def _addresses(arrays: Sequence[Array | None]) -> NDArray[np.int64]:
    return np.array(
        [0 if a is None else a.__array_interface__["data"][0] for a in arrays], np.int64
    )
