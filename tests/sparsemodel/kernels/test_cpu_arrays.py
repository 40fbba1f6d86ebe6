"""Native batch norm, pooling, layout and optimiser steps against float64 and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels.cpu import library as cpu

pytestmark = pytest.mark.skipif(
    cpu.library_path() is None,
    reason="the native library is not built; `pip install -e .` with a C++ compiler builds it",
)

Array = NDArray[Any]


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def double(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64))


def assert_near(got: Array, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    scale = 1 + want.detach().abs().max().item()
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("count", [2, 3, 17, 64, 4999, 70000])
@pytest.mark.parametrize("relu", [0, 1])
@pytest.mark.parametrize("with_residual", [False, True])
def test_batch_norm(lib: cpu.CpuLibrary, count: int, relu: int, with_residual: bool) -> None:
    channels = 3
    # A mean far from zero, where a one-pass variance would lose its digits.
    x, dy = normal(1, channels, count) + np.float32(30), normal(2, channels, count)
    residual = normal(3, channels, count) if with_residual else None
    gamma, beta = normal(4, channels), normal(5, channels)
    running_mean, running_var = normal(6, channels), np.abs(normal(7, channels))
    wide = [double(a).requires_grad_() for a in (x, gamma, beta)]
    wide_residual = None if residual is None else double(residual).requires_grad_()
    expected_mean, expected_var = double(running_mean), double(running_var)

    y, mean, invstd = np.empty_like(x), np.empty(3, np.float32), np.empty(3, np.float32)
    lib.batchnorm_train(
        *(channels, count, x, residual, gamma, beta, 1e-5, 0.1, running_mean, running_var),
        *(relu, y, mean, invstd, 2),
    )
    out = functional.batch_norm(
        wide[0].T, expected_mean, expected_var, wide[1], wide[2], True, 0.1, 1e-5
    ).T
    out = out if wide_residual is None else out + wide_residual
    out = out.relu() if relu else out
    assert_near(y, out)
    assert_near(running_mean, expected_mean)
    assert_near(running_var, expected_var)

    # The gate is where our own output is positive: rounding may move a value across zero.
    gated = dy * (y > 0) if relu else dy
    pre = functional.batch_norm(wide[0].T, None, None, wide[1], wide[2], True, 0.1, 1e-5).T
    pre.backward(double(gated))
    dx, dgamma, dbeta = np.empty_like(x), np.empty(3, np.float32), np.empty(3, np.float32)
    dresidual = np.empty_like(x)
    lib.batchnorm_backward(
        *(channels, count, x, y if relu else None, dy, gamma, mean, invstd, relu),
        *(dx, dgamma, dbeta, dresidual, 2),
    )
    np.testing.assert_array_equal(dresidual, gated)
    gradients = [w.grad for w in wide]
    assert all(g is not None for g in gradients)
    if count > 3:  # of two or three values the gradient is a difference of near equals
        assert_near(dx, gradients[0], 2e-4)
        assert_near(dgamma, gradients[1], 2e-4)
    assert_near(dbeta, gradients[2], 2e-4)


def test_batch_norm_in_place(lib: cpu.CpuLibrary) -> None:
    """y may be x or the residual, dx or dresidual may be dy: the same bits as apart."""
    x, residual, dy = (normal(seed, 2, 101) for seed in (1, 2, 3))
    mean, invstd = np.empty(2, np.float32), np.empty(2, np.float32)

    def train(a: Array, r: Array, out: Array) -> Array:
        lib.batchnorm_train(
            2, 101, a, r, None, None, 1e-5, 0.0, None, None, 1, out, mean, invstd, 1
        )
        return out

    y = train(x, residual, np.empty_like(x))
    over_x, over_residual = x.copy(), residual.copy()
    np.testing.assert_array_equal(train(over_x, residual, over_x), y)
    np.testing.assert_array_equal(train(x, over_residual, over_residual), y)

    def backward(gradient: Array, dx: Array, dresidual: Array) -> tuple[Array, Array]:
        lib.batchnorm_backward(
            2, 101, x, y, gradient, None, mean, invstd, 1, dx, None, None, dresidual, 1
        )
        return dx, dresidual

    dx, dresidual = backward(dy, np.empty_like(x), np.empty_like(x))
    once, again = dy.copy(), dy.copy()
    for got in (backward(once, once, np.empty_like(x)), backward(again, np.empty_like(x), again)):
        np.testing.assert_array_equal(got[0], dx)
        np.testing.assert_array_equal(got[1], dresidual)


@pytest.mark.parametrize("relu", [0, 1])
def test_batch_norm_inference(lib: cpu.CpuLibrary, relu: int) -> None:
    x, residual = normal(1, 3, 77), normal(2, 3, 77)
    gamma, beta, mean, var = normal(3, 3), normal(4, 3), normal(5, 3), np.abs(normal(6, 3))
    y = x.copy()
    lib.batchnorm_infer(3, 77, y, residual, gamma, beta, 1e-5, mean, var, relu, y, 1)
    wide = [double(a)[:, None] for a in (gamma, beta, mean, var)]
    out = (double(x) - wide[2]) / (wide[3] + 1e-5).sqrt() * wide[0] + wide[1] + double(residual)
    assert_near(y, out.relu() if relu else out)


def test_batch_norm_of_one_value_is_refused(lib: cpu.CpuLibrary) -> None:
    one = np.ones(1, np.float32)
    with pytest.raises(SparseModelError, match="one value"):
        lib.batchnorm_train(1, 1, one, None, None, None, 1e-5, 0.1, None, None, 0, one, one, one, 1)


POOLS = [
    ((8, 8), (2, 2), (2, 2), (0, 0)),
    ((9, 7), (3, 3), (2, 2), (1, 1)),
    ((5, 6), (3, 2), (1, 3), (1, 0)),
    ((4, 4), (1, 1), (2, 1), (0, 0)),
]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("batch", [1, 5, 16, 64])
def test_pooling(lib: cpu.CpuLibrary, pool: tuple[tuple[int, int], ...], batch: int) -> None:
    size, kernel, stride, padding = pool
    g = cpu.PoolGeometry.pool(batch, 3, size, kernel, stride=stride, padding=padding)
    # Few distinct values, so that windows hold ties.
    x = np.round(normal(1, 3, *size, batch))
    dy = normal(2, 3, g.out_h, g.out_w, batch)

    def compare(got: tuple[Array, Array], dense: Any) -> None:
        wide = double(x).requires_grad_()
        out = dense(wide.permute(3, 0, 1, 2)).permute(1, 2, 3, 0)
        out.backward(double(dy))
        assert wide.grad is not None
        assert_near(got[0], out)
        assert_near(got[1], wide.grad)

    y, dx = np.full_like(dy, np.nan), np.full_like(x, np.nan)
    taps = np.empty(dy.shape, np.uint8)
    lib.maxpool_forward(g, x, y, taps, 2)
    lib.maxpool_backward(g, taps, dy, dx, 2)
    compare((y, dx), lambda t: functional.max_pool2d(t, kernel, stride, padding))
    for include_pad in (0, 1):
        lib.avgpool_forward(g, include_pad, x, y, 2)
        lib.avgpool_backward(g, include_pad, dy, dx, 2)
        compare(
            (y, dx),
            lambda t, i=include_pad: functional.avg_pool2d(
                t, kernel, stride, padding, count_include_pad=bool(i)
            ),
        )


def test_max_pooling_keeps_nan(lib: cpu.CpuLibrary) -> None:
    x = np.array([1, np.nan, 3, 2], np.float32).reshape(1, 2, 2, 1)
    y, taps = np.empty((1, 1, 1, 1), np.float32), np.empty((1, 1, 1, 1), np.uint8)
    g = cpu.PoolGeometry.pool(1, 1, (2, 2), (2, 2), stride=(2, 2))
    lib.maxpool_forward(g, x, y, taps, 1)
    assert np.isnan(y).all()
    assert taps.item() == 1


def test_global_average_pooling(lib: cpu.CpuLibrary) -> None:
    x, dy = normal(1, 5, 49, 20), normal(2, 5, 20)
    y, dx = np.empty_like(dy), np.empty_like(x)
    lib.global_avgpool_forward(5, 49, 20, x, y, 2)
    lib.global_avgpool_backward(5, 49, 20, dy, dx, 2)
    assert_near(y, double(x).mean(1))
    assert_near(dx, (double(dy)[:, None] / 49).expand(5, 49, 20))


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (64, 3072), (1000, 17), (16, 16), (600, 530)])
def test_transpose(lib: cpu.CpuLibrary, shape: tuple[int, int]) -> None:
    x = normal(1, *shape)
    y = np.empty(shape[::-1], np.float32)
    lib.transpose(*shape, x, y, 2)
    np.testing.assert_array_equal(y, x.T)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 70), (6, 64, 16), (2, 17, 600), (40, 3, 8)])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_transpose_of_planes_that_lie_apart(
    lib: cpu.CpuLibrary, shape: tuple[int, int, int], order: tuple[int, int, int]
) -> None:
    """Planes outermost or between the rows, on either side; what lies between stays."""
    planes, rows, cols = shape
    x = normal(1, *(shape[i] for i in order)).transpose(order)
    y = np.zeros([(planes, cols, rows + 1)[i] for i in order], np.float32).transpose(order)
    strides = [step // 4 for step in (*x.strides[:2], *y.strides[:2])]
    lib.transpose_planes(*shape, x.base, *strides[:2], y.base, *strides[2:], 2)
    np.testing.assert_array_equal(y[:, :, :rows], x.transpose(0, 2, 1))
    assert not y[:, :, rows:].any()


@pytest.mark.parametrize("n", [0, 1, 15, 16, 4097, 40000])
def test_relu(lib: cpu.CpuLibrary, n: int) -> None:
    x, dy = normal(1, n), normal(2, n)
    y, dx = np.empty_like(x), np.empty_like(x)
    lib.relu_forward(n, x, y, 2)
    lib.relu_backward(n, y, dy, dx, 2)
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    np.testing.assert_array_equal(dx, np.where(x > 0, dy, 0))


@pytest.mark.parametrize("n", [0, 1, 15, 16, 4097, 40000])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 1e-4), (0.9, 0.0), (0.0, 0.01)])
def test_sgd_is_torchs(lib: cpu.CpuLibrary, n: int, momentum: float, weight_decay: float) -> None:
    """The same bits as torch.optim.SGD, which fuses where we do; by rounding without fusing."""
    values, gradients = normal(1, n), [normal(seed, n) for seed in (2, 3, 4)]
    parameter = torch.nn.Parameter(torch.from_numpy(values.copy()))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=momentum, weight_decay=weight_decay)
    buffer = np.zeros_like(values) if momentum else None
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        lib.sgd_step(n, values, gradient, buffer, 0.1, momentum, weight_decay, 2)
    want = parameter.detach().numpy()
    if lib.isa() == "scalar":
        np.testing.assert_allclose(values, want, rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(values, want)


@pytest.mark.parametrize("decoupled", [0, 1])
@pytest.mark.parametrize("n", [1, 33, 40000])
def test_adam_is_torchs(lib: cpu.CpuLibrary, n: int, decoupled: int) -> None:
    values, gradients = normal(1, n), [normal(seed, n) for seed in (2, 3, 4)]
    parameter = torch.nn.Parameter(double(values))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([parameter], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    mean, square = np.zeros_like(values), np.zeros_like(values)
    for step, gradient in enumerate(gradients, start=1):
        parameter.grad = double(gradient)
        optimizer.step()
        lib.adam_step(
            n, values, gradient, mean, square, 0.01, 0.8, 0.95, 1e-6, 0.1, decoupled, step, 2
        )
    assert_near(values, parameter, 1e-6)


def test_steps_refuse_what_they_cannot_do(lib: cpu.CpuLibrary) -> None:
    v = np.ones(3, np.float32)
    with pytest.raises(SparseModelError, match="momentum"):
        lib.sgd_step(3, v, v, None, 0.1, 0.9, 0.0, 1)
    with pytest.raises(SparseModelError, match="lr"):
        lib.sgd_step(3, v, v, None, -0.1, 0.0, 0.0, 1)
    with pytest.raises(SparseModelError, match="step"):
        lib.adam_step(3, v, v, v, v, 0.1, 0.9, 0.99, 1e-8, 0.0, 0, 0, 1)
