"""Native sparse convolution and linear layers against plain float64 loops."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

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
ISAS = ("avx512", "avx2", "neon", "scalar")


def native() -> cpu.CpuLibrary:
    loaded = cpu.library()
    assert loaded is not None
    return loaded


def usable_isas() -> list[str]:
    """Instruction sets of this processor, the library's choice last in force."""
    found = []
    for isa in ISAS:
        try:
            native().set_isa(isa)
        except SparseModelError:
            continue
        found.append(isa)
    native().set_isa("best")
    return found


@dataclass
class Layer:
    """One layer with its data, and its results by plain loops in float64."""

    geometry: cpu.Geometry
    mask: Array  # bool [out, places]
    row_ptr: Array
    cols: Array
    values: Array
    bias: Array
    x: Array
    dy: Array

    def reference(self) -> tuple[Array, Array, Array]:
        """Output, input gradient and dense weight gradient."""
        g = self.geometry
        weight = np.zeros(self.mask.shape)
        weight[self.mask] = self.values
        y = np.broadcast_to(self.bias.astype(float)[:, None, None, None], self.dy.shape).copy()
        dx, dweight = np.zeros(self.x.shape), np.zeros(self.mask.shape)
        x, dy = self.x.astype(float), self.dy.astype(float)
        per_group, outs = g.in_channels // g.groups, g.out_channels // g.groups
        i, j = np.indices((g.out_h, g.out_w))
        for out, place in np.ndindex(*self.mask.shape):
            c, tap = divmod(place, g.kernel_h * g.kernel_w)
            c += out // outs * per_group
            kh, kw = divmod(tap, g.kernel_w)
            h = i * g.stride_h - g.pad_h + kh * g.dilation_h
            w = j * g.stride_w - g.pad_w + kw * g.dilation_w
            inside = (h >= 0) & (h < g.in_h) & (w >= 0) & (w < g.in_w)
            read, written = (c, h[inside], w[inside]), (out, i[inside], j[inside])
            # No position is read or written twice by one weight, so += on indices is safe.
            y[written] += weight[out, place] * x[read]
            dx[read] += weight[out, place] * dy[written]
            dweight[out, place] = (dy[written] * x[read]).sum()
        return y, dx, dweight


def make_layer(geometry: cpu.Geometry, density: float, seed: int) -> Layer:
    rng = np.random.default_rng(seed)
    g = geometry
    places = g.in_channels // g.groups * g.kernel_h * g.kernel_w
    mask = rng.random((g.out_channels, places)) < density
    mask[rng.random(g.out_channels) < 0.1] = False  # empty rows
    cols = np.nonzero(mask)[1].astype(np.int32)
    row_ptr = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int32)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    return Layer(
        g,
        mask,
        row_ptr,
        cols,
        normal(len(cols)),
        normal(g.out_channels),
        normal(g.in_channels, g.in_h, g.in_w, g.batch),
        normal(g.out_channels, g.out_h, g.out_w, g.batch),
    )


def random_layer(seed: int) -> Layer:
    rng = np.random.default_rng(1000 + seed)

    def pair(low: int, high: int) -> tuple[int, int]:
        return int(rng.integers(low, high)), int(rng.integers(low, high))

    while True:
        groups = int(rng.choice([1, 1, 1, 2, 3]))
        depthwise = rng.random() < 0.1
        channels = [groups if depthwise else groups * int(rng.integers(1, 4)) for _ in range(2)]
        geometry = cpu.Geometry.conv(
            int(rng.choice([1, 2, 5, 8, 16, 17, 33, 64, 100])),
            channels[0],
            channels[1],
            pair(1, 9),
            pair(1, 4),
            stride=pair(1, 4),
            padding=pair(0, 3),
            dilation=pair(1, 3),
            groups=groups,
        )
        if geometry.out_h >= 1 and geometry.out_w >= 1:
            return make_layer(geometry, float(rng.choice([0, 0.05, 0.3, 0.7, 1])), seed)


# Enough work that two threads are used, in the shapes that tiling treats apart: rows longer than
# a tile's, a small plane of many channels, one plane with stride, one linear layer.
LARGE = [
    (cpu.Geometry.conv(64, 8, 8, (24, 24), (3, 3), padding=(1, 1)), 0.7),
    (cpu.Geometry.conv(48, 300, 8, (4, 4), (3, 3), padding=(1, 1)), 0.1),
    (cpu.Geometry.conv(64, 16, 16, (15, 15), (3, 3), stride=(2, 2), padding=(1, 1)), 0.7),
    (cpu.Geometry.conv(1, 3, 4, (70, 90), (5, 5), padding=(2, 2)), 0.9),
    (cpu.Geometry.linear(128, 300, 200), 0.3),
]


NUM_RANDOM = 40
LAYERS = range(NUM_RANDOM + len(LARGE))


@functools.cache
def layer_and_reference(number: int) -> tuple[Layer, tuple[Array, Array, Array]]:
    if number < NUM_RANDOM:
        layer = random_layer(number)
    else:
        layer = make_layer(*LARGE[number - NUM_RANDOM], seed=number)
    return layer, layer.reference()


def results(layer: Layer, threads: int, k: int = 7) -> dict[str, Array]:
    g, lib = layer.geometry, native()
    lib.check_pattern(g, layer.row_ptr, layer.cols)
    t_row_ptr = np.empty(lib.transposed_rows(g) + 1, np.int32)
    t_cols, t_perm = np.empty_like(layer.cols), np.empty_like(layer.cols)
    lib.transpose_pattern(g, layer.row_ptr, layer.cols, t_row_ptr, t_cols, t_perm)

    def blank(like: Array) -> Array:
        return np.full_like(like, np.nan)

    y, dx, dx2 = blank(layer.dy), blank(layer.x), blank(layer.x)
    dvalues, dvalues2 = blank(layer.values), blank(layer.values)
    dbias, dbias2 = blank(layer.bias), blank(layer.bias)
    pattern, transposed = (layer.row_ptr, layer.cols), (t_row_ptr, t_cols, t_perm)
    lib.conv_forward(g, *pattern, layer.values, layer.bias, layer.x, y, threads)
    lib.conv_input_grad(g, *transposed, layer.values, layer.dy, dx, threads)
    lib.conv_weight_grad(g, *pattern, layer.x, layer.dy, dvalues, dbias, threads)
    lib.conv_backward(
        g, *transposed, layer.values, layer.x, layer.dy, dx2, dvalues2, dbias2, threads
    )
    indices, top, count = np.empty(k, np.int64), np.empty(k, np.float32), np.empty(1, np.int64)
    lib.topk_grad(g, *pattern, layer.x, layer.dy, k, 300, indices, top, count, threads)
    return {
        "y": y,
        "dx": dx,
        "dvalues": dvalues,
        "dbias": dbias,
        "dx of backward": dx2,
        "dvalues of backward": dvalues2,
        "dbias of backward": dbias2,
        "indices": indices[: count[0]],
        "top": top[: count[0]],
    }


def assert_near(got: Array, want: Array) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * (1 + np.abs(want).max(initial=0)))


@pytest.mark.parametrize("number", LAYERS)
def test_equals_plain_loops(number: int) -> None:
    layer, (y, dx, dweight) = layer_and_reference(number)
    got = results(layer, 2)
    assert_near(got["y"], y)
    assert_near(got["dx"], dx)
    assert_near(got["dvalues"], dweight[layer.mask])
    assert_near(got["dvalues of backward"], dweight[layer.mask])
    assert_near(got["dbias"], layer.dy.astype(float).sum((1, 2, 3)))
    np.testing.assert_array_equal(got["dx of backward"], got["dx"])
    np.testing.assert_array_equal(got["dbias of backward"], got["dbias"])


@pytest.mark.parametrize("number", LAYERS)
def test_largest_gradients_outside_the_mask(number: int) -> None:
    layer, (_, _, dweight) = layer_and_reference(number)
    got = results(layer, 2)
    magnitudes = np.where(layer.mask, -1.0, np.abs(dweight)).reshape(-1)
    k = min(7, int((~layer.mask).sum()))
    best = np.sort(np.argsort(-magnitudes, kind="stable")[:k])
    # Two gradients within rounding may change places; with these data none are.
    np.testing.assert_array_equal(got["indices"], best)
    assert_near(got["top"], dweight.reshape(-1)[best])


@pytest.mark.parametrize("number", LAYERS)
def test_neither_threads_nor_vectors_change_a_bit(number: int) -> None:
    layer, _ = layer_and_reference(number)
    lib = native()
    expected: dict[str, Array] = {}
    for isa in usable_isas():
        lib.set_isa(isa)
        one, two = results(layer, 1), results(layer, 2)
        lib.set_isa("best")
        for name, array in one.items():
            np.testing.assert_array_equal(two[name], array, err_msg=f"{name}, threads, {isa}")
            if isa == "scalar":  # no fused multiply-add: rounds otherwise
                assert name in ("indices", "top") or np.allclose(array, expected[name], atol=1e-2)
            elif expected:
                np.testing.assert_array_equal(array, expected[name], err_msg=f"{name}, {isa}")
        expected = expected or one


def test_results_written_past_the_caches_are_the_same() -> None:
    """Large results that begin with a cache line are streamed, those shifted by a float are not."""
    layer = make_layer(cpu.Geometry.conv(64, 24, 24, (28, 28), (3, 3), padding=(1, 1)), 0.1, 0)
    g, lib = layer.geometry, native()
    t_row_ptr = np.empty(lib.transposed_rows(g) + 1, np.int32)
    t_cols, t_perm = np.empty_like(layer.cols), np.empty_like(layer.cols)
    lib.transpose_pattern(g, layer.row_ptr, layer.cols, t_row_ptr, t_cols, t_perm)
    transposed = (t_row_ptr, t_cols, t_perm, layer.values)

    def outputs(shift: int) -> list[Array]:
        arrays = []
        for shape in (layer.dy.shape, layer.x.shape, layer.x.shape):
            room = np.full(int(np.prod(shape)) + 32, np.nan, np.float32)
            start = -room.ctypes.data % 64 // 4 + shift
            arrays.append(room[start : start + int(np.prod(shape))].reshape(shape))
        y, dx, dx2 = arrays
        lib.conv_forward(g, layer.row_ptr, layer.cols, layer.values, None, layer.x, y, 2)
        lib.conv_input_grad(g, *transposed, layer.dy, dx, 2)
        lib.conv_backward(
            g, *transposed, layer.x, layer.dy, dx2, np.empty_like(layer.values), None, 2
        )
        return arrays

    for streamed, stored in zip(outputs(0), outputs(1), strict=True):
        np.testing.assert_array_equal(streamed, stored)


def test_ties_go_to_the_lower_index() -> None:
    """All gradients are 3 or -3: x is 1, dy is 1 or -1, three samples; index 1 is active."""
    layer = make_layer(cpu.Geometry.linear(3, 4, 2), 0.0, 0)
    layer.mask[0, 1] = True
    layer.row_ptr, layer.cols = np.array([0, 1, 1], np.int32), np.array([1], np.int32)
    layer.values = np.ones(1, np.float32)
    layer.x[:] = 1
    layer.dy[0], layer.dy[1] = 1, -1
    got = results(layer, 1, k=5)
    assert got["indices"].tolist() == [0, 2, 3, 4, 5]
    assert got["top"].tolist() == [3, 3, 3, -3, -3]


def test_top_gradients_refuse_nan() -> None:
    layer = make_layer(cpu.Geometry.linear(3, 4, 2), 0.0, 0)
    layer.x[2, 0, 0, 1] = np.nan
    with pytest.raises(SparseModelError, match="NaN"):
        results(layer, 1)


def test_nan_and_infinity_come_through_the_forward_pass() -> None:
    """A plane of ones with one NaN: exactly the nine windows over it are NaN."""
    g = cpu.Geometry.conv(2, 1, 1, (6, 6), (3, 3), padding=(1, 1))
    layer = make_layer(g, 2.0, 0)
    layer.mask[:] = True
    layer.row_ptr, layer.cols = np.array([0, 9], np.int32), np.arange(9, dtype=np.int32)
    layer.values, layer.x[:] = np.ones(9, np.float32), 1
    layer.x[0, 3, 2, 1] = np.nan
    y = np.empty_like(layer.dy)
    native().conv_forward(g, layer.row_ptr, layer.cols, layer.values, None, layer.x, y, 1)
    expected = np.zeros((6, 6), bool)
    expected[2:5, 1:4] = True
    np.testing.assert_array_equal(np.isnan(y[0, :, :, 1]), expected)
    assert not np.isnan(y[0, :, :, 0]).any()


def test_damaged_patterns_are_refused() -> None:
    g = cpu.Geometry.conv(1, 2, 2, (4, 4), (3, 3))
    good = np.array([0, 1, 2], np.int32), np.array([0, 17], np.int32)
    native().check_pattern(g, *good)
    for row_ptr, cols, message in (
        ([0, 1, 2], [0, 18], "column"),
        ([0, 2, 2], [3, 3], "column"),
        ([0, 2, 1], [3, 4], "row_ptr"),
        ([1, 1, 2], [3, 4], "row_ptr"),
    ):
        with pytest.raises(SparseModelError, match=message):
            native().check_pattern(g, np.array(row_ptr, np.int32), np.array(cols, np.int32))


def test_unsound_calls_are_refused() -> None:
    layer = make_layer(cpu.Geometry.conv(2, 2, 2, (4, 4), (3, 3)), 1.0, 0)
    g, y = layer.geometry, np.empty_like(layer.dy)
    arguments = [g, layer.row_ptr, layer.cols, layer.values, None, layer.x, y, 1]
    native().conv_forward(*arguments)
    with pytest.raises(SparseModelError, match="null"):
        native().conv_forward(*arguments[:5], None, y, 1)
    with pytest.raises(SparseModelError, match="threads"):
        native().conv_forward(*arguments[:7], 0)
    with pytest.raises(SparseModelError, match="float32"):
        native().conv_forward(*arguments[:5], layer.x.astype(np.float64), y, 1)
    for field, value in (("out_h", 3), ("groups", 3), ("batch", 0), ("in_channels", 2**30)):
        wrong = cpu.Geometry.from_buffer_copy(g)
        setattr(wrong, field, value)
        with pytest.raises(SparseModelError, match="conv_forward"):
            native().conv_forward(wrong, *arguments[1:])
