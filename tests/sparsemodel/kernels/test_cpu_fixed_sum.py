"""Native sums in fixed point: the same integers as by Python's own, in every instruction set."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.runtime import fixed_sum
from sparsemodel.runtime.fixed_sum import MAX_TOTAL_WEIGHT, FixedSum, FixedSums

pytestmark = pytest.mark.skipif(
    cpu.library_path() is None,
    reason="the native library is not built; `pip install -e .` with a C++ compiler builds it",
)

Floats = NDArray[np.float32]
EDGE = np.float32(2.0**20)


def drawn(seed: int, count: int) -> Floats:
    """Of every magnitude, and some that do not fit, or only just."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(count) * 10.0 ** random.integers(-14, 6, count)
    odd = [np.nan, np.inf, -np.inf, EDGE, -EDGE, np.nextafter(EDGE, np.float32(0)), -0.0, -(2**-17)]
    odd += [2.0**-53, 3 * 2.0**-53]  # ties in the last place
    values[: len(odd)] = odd[:count]
    return values.astype(np.float32)


def exactly(values: Floats, means: Floats | None, weight: int) -> tuple[list[int], list[int], int]:
    """High and low of one add by fractions, and how many values were left out."""
    high, low, refused = [], [], 0
    for place, value in enumerate(values.tolist()):
        mean = 0.0 if means is None else float(means[place])
        fits = np.isfinite(value) and np.isfinite(mean) and abs(value + mean * mean) < 2**20
        refused += not fits
        x = Fraction(value + mean * mean if fits else 0.0) * 2**16
        whole = x.numerator // x.denominator
        high.append(weight * whole)
        low.append(weight * round((x - whole) * 2**36))  # to the nearest, ties to even
    return high, low, refused


@pytest.mark.parametrize("weight", [1, -1, 37, MAX_TOTAL_WEIGHT, -MAX_TOTAL_WEIGHT])
@pytest.mark.parametrize("count", [0, 1, 7, 67])
def test_sums_are_those_of_fractions(lib: cpu.CpuLibrary, count: int, weight: int) -> None:
    for means in (None, drawn(1, count)[::-1].copy() / np.float32(1000)):
        values, total = drawn(0, count), FixedSum((count,))
        high, low, refused = exactly(values, means, weight)
        assert total.add(values, means, weight) == refused
        assert total.words().view(np.int64).tolist() == high + low
        total.add(values, means, -weight)
        assert not total.words().any()


def test_several_at_once_are_one_after_the_other_and_those_of_numpy(
    lib: cpu.CpuLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many pieces, one empty; and where an array is not the library's, numpy does it."""
    sizes = (40_000, 0, 3)
    values = [drawn(number, size) for number, size in enumerate(sizes)]
    means = [None, None, np.float32([1, 2, 3])]
    sums = [[FixedSum((size,)) for size in sizes] for _ in range(4)]
    together = FixedSums(sums[0]).add(values, means, 5)
    alone = [s.add(v, m, 5) for s, v, m in zip(sums[1], values, means, strict=True)]
    strided = [np.repeat(value, 2)[::2] for value in values]
    assert FixedSums(sums[2]).add(strided, means, 5) == together == alone
    monkeypatch.setattr(fixed_sum, "library", lambda: None)
    assert FixedSums(sums[3]).add(values, means, 5) == alone
    for others in sums[1:]:
        for one, other in zip(sums[0], others, strict=True):
            assert np.array_equal(one.words(), other.words())


def test_arrays_of_other_sizes_are_refused() -> None:
    total, values = FixedSum((3,)), np.ones(3, np.float32)
    for wrong in ((values[:2], None), (values, values[:2])):
        with pytest.raises(SparseModelError, match="other sizes"):
            total.add(*wrong, 1)
    with pytest.raises(SparseModelError, match=r"fixed_add: expected arrays >= 0 and \|weight\|"):
        total.add(values, None, 2**31)
    assert not total.words().any()
