"""Native computation through the dense weight, and of few samples, against numpy in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels.cpu import library as cpu

pytestmark = pytest.mark.skipif(
    cpu.library_path() is None,
    reason="the native library is not built; `pip install -e .` with a C++ compiler builds it",
)

Array = NDArray[Any]

SHAPES = [(1, 1), (5, 16), (3, 9), (70, 33), (64, 512), (9, 1030)]
DENSITIES = [0.0, 0.03, 0.5, 0.9, 1.0]


class Weight(NamedTuple):
    """A pattern, its values, and the same as a dense matrix."""

    mask: Array
    dense: Array
    row_ptr: Array
    cols: Array
    values: Array
    bits: Array


def make_weight(lib: cpu.CpuLibrary, shape: tuple[int, int], density: float) -> Weight:
    rng = np.random.default_rng(7)
    mask = rng.random(shape) < density
    if density < 1:
        mask[0] = False  # an empty row
    dense = np.where(mask, rng.standard_normal(shape), 0).astype(np.float32)
    row_ptr = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
    cols = np.nonzero(mask)[1].astype(np.int32)
    bits = np.empty((shape[0], -(-shape[1] // 16)), np.uint16)
    lib.pattern_bits(*shape, row_ptr, cols, bits, 2)
    return Weight(mask, dense, row_ptr, cols, dense[mask], bits)


def guarded(count: int) -> Array:
    """`count` numbers and sixteen more that nobody may write."""
    return np.full(count + 16, np.float32(-77))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", DENSITIES)
def test_values_go_to_their_places_and_back(
    lib: cpu.CpuLibrary, shape: tuple[int, int], density: float
) -> None:
    w = make_weight(lib, shape, density)
    words = np.pad(w.mask, ((0, 0), (0, -shape[1] % 16))).reshape(shape[0], -1, 16)
    assert np.array_equal(w.bits, (words * (1 << np.arange(16))).sum(-1))
    for threads in (1, 2):
        weight, values = guarded(w.dense.size), guarded(w.values.size)
        lib.dense_weight(*shape, w.row_ptr, w.bits, w.values, weight, threads)
        assert np.array_equal(weight[:-16].reshape(shape), w.dense)
        full = np.random.default_rng(8).standard_normal(shape).astype(np.float32)
        lib.active_values(*shape, w.row_ptr, w.bits, full, values, threads)
        assert np.array_equal(values[:-16], full[w.mask])
        assert (weight[-16:] == -77).all()
        assert (values[-16:] == -77).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("batch", [1, 3, 8, 21])
def test_few_samples(
    lib: cpu.CpuLibrary, shape: tuple[int, int], density: float, batch: int
) -> None:
    w, (out, width) = make_weight(lib, shape, density), shape
    rng = np.random.default_rng(9)
    x, dy = (rng.standard_normal((batch, n)).astype(np.float32) for n in (width, out))
    bias = rng.standard_normal(out).astype(np.float32)
    sizes, dense = (batch, width, out), w.dense.astype(np.float64)
    y, dx, dvalues, dbias = guarded(dy.size), guarded(x.size), guarded(len(w.values)), guarded(out)
    lib.linear_few(*sizes, w.row_ptr, w.bits, w.values, bias, x, y, 2)
    lib.linear_few_backward(*sizes, w.row_ptr, w.bits, w.values, x, dy, dx, dvalues, dbias, 2)
    near: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(y[:-16].reshape(batch, out), x @ dense.T + bias, **near)
    np.testing.assert_allclose(dx[:-16].reshape(batch, width), dy @ dense, **near)
    full = dy.T.astype(np.float64) @ x
    np.testing.assert_allclose(dvalues[:-16], full[w.mask], **near)
    np.testing.assert_allclose(dbias[:-16], dy.sum(0, dtype=np.float64), **near)
    for array in (y, dx, dvalues, dbias):
        assert (array[-16:] == -77).all()


def test_gradients_of_few_samples_may_be_left_out(lib: cpu.CpuLibrary) -> None:
    w = make_weight(lib, (70, 33), 0.5)
    rng = np.random.default_rng(3)
    x, dy = (rng.standard_normal((5, n)).astype(np.float32) for n in (33, 70))
    both_dx, both_dvalues = np.empty_like(x), np.empty_like(w.values)
    call = (5, 33, 70, w.row_ptr, w.bits)
    lib.linear_few_backward(*call, w.values, x, dy, both_dx, both_dvalues, None, 1)
    dx, dvalues = np.empty_like(x), np.empty_like(w.values)
    lib.linear_few_backward(*call, w.values, None, dy, dx, None, None, 1)
    lib.linear_few_backward(*call, None, x, dy, None, dvalues, None, 1)
    assert np.array_equal(dx, both_dx)
    assert np.array_equal(dvalues, both_dvalues)


@pytest.mark.parametrize("shape", [(64, 512), (9, 1030)])
def test_memory_in_use_outlives_a_release_before_the_call(
    lib: cpu.CpuLibrary, shape: tuple[int, int]
) -> None:
    """Workers free theirs at their next job; the caller, one of them, has some in use by then."""
    w, (out, width) = make_weight(lib, shape, 0.5), shape
    rng = np.random.default_rng(9)
    x, dy = (rng.standard_normal((21, n)).astype(np.float32) for n in (width, out))
    for _ in range(3):
        dx, dvalues = np.empty_like(x), np.empty_like(w.values)
        lib.release_scratch()
        call = (21, width, out, w.row_ptr, w.bits, w.values, x, dy)
        lib.linear_few_backward(*call, dx, dvalues, None, 2)
        near: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4}
        np.testing.assert_allclose(dx, dy @ w.dense.astype(np.float64), **near)
        np.testing.assert_allclose(dvalues, (dy.T.astype(np.float64) @ x)[w.mask], **near)


def test_results_depend_neither_on_threads_nor_on_wide_instruction_sets() -> None:
    lib = cpu.library()
    assert lib is not None
    w = make_weight(lib, (300, 2000), 0.4)
    rng = np.random.default_rng(5)
    x, dy = (rng.standard_normal((13, n)).astype(np.float32) for n in (2000, 300))
    results = []
    for name in ("avx512", "avx2", "neon"):  # the scalar path rounds twice where others fuse
        try:
            lib.set_isa(name)
        except SparseModelError:
            continue
        for threads in (1, 2, 3):
            y, dx, dvalues = np.empty_like(dy), np.empty_like(x), np.empty_like(w.values)
            lib.linear_few(13, 2000, 300, w.row_ptr, w.bits, w.values, None, x, y, threads)
            lib.linear_few_backward(
                *(13, 2000, 300, w.row_ptr, w.bits, w.values, x, dy, dx, dvalues, None, threads)
            )
            results.append((y, dx, dvalues))
    lib.set_isa("best")
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert np.array_equal(a, b)


def test_refusals(lib: cpu.CpuLibrary) -> None:
    w = make_weight(lib, (5, 16), 0.5)
    x, y = np.empty((1, 16), np.float32), np.empty((1, 5), np.float32)
    with pytest.raises(SparseModelError, match=r"linear_few: expected a batch >= 1, got 0"):
        lib.linear_few(0, 16, 5, w.row_ptr, w.bits, w.values, None, x, y, 1)
    with pytest.raises(SparseModelError, match=r"dense_weight: expected 1 to 2\^31 - 1 weights"):
        lib.dense_weight(5, 0, w.row_ptr, w.bits, w.values, x, 1)
    with pytest.raises(SparseModelError, match=r"active_values: row_ptr runs from 0 to"):
        lib.active_values(5, 1, w.row_ptr, w.bits, x, w.values, 1)
    with pytest.raises(SparseModelError, match="linear_few_backward: values or x is null"):
        lib.linear_few_backward(
            1, 16, 5, w.row_ptr, w.bits, w.values, None, y, x, w.values, None, 1
        )
