"""Native plans driven by numpy alone: closed forms, finite differences, memory, refusals."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels.cpu import library as cpu
from sparsemodel.kernels.cpu.library import Geometry, PoolGeometry
from sparsemodel.kernels.cpu.plan_abi import (
    ConvArrays,
    Images,
    NativePlan,
    NormArrays,
    Parameter,
    Sgd,
    TopK,
)

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def _native() -> None:
    if cpu.library() is None:
        pytest.skip("build the native library to run plans")


def address(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data


@dataclass
class Weights:
    """Values with gradient and momentum, kept alive beside the plan."""

    values: Array
    gradient: Array = field(init=False)
    momentum: Array = field(init=False)

    def __post_init__(self) -> None:
        self.values = np.ascontiguousarray(self.values, dtype=np.float32)
        self.gradient = np.zeros_like(self.values)
        self.momentum = np.zeros_like(self.values)

    def parameter(self) -> Parameter:
        return Parameter(address(self.values), address(self.gradient), address(self.momentum))


class Net:
    """Convolution (sparse), batch norm and ReLU, max pool, flattening, sparse linear."""

    def __init__(self, *, batch: int = 6, recompute: bool = False) -> None:
        generator = np.random.default_rng(0)
        self.plan = NativePlan(batch, recompute=recompute)
        self.kept: list[Any] = []
        self.conv_g = Geometry.conv(batch, 2, 3, (6, 4), (3, 3), padding=(1, 1))
        pool_g = PoolGeometry.pool(batch, 3, (6, 4), (2, 2), stride=(2, 2))
        linear_g = Geometry.linear(batch, 18, 4)
        x = self.plan.add("input", 2, 6, 4)
        conv = self.plan.add("conv", x, self.conv_g)
        norm = self.plan.add("batchnorm", conv, -1, 1, 1e-5, 0.1)
        pool = self.plan.add("maxpool", norm, pool_g)
        flat = self.plan.add("flatten", pool)
        self.output = self.plan.add("conv", flat, linear_g)
        self.weights = {
            "conv": self.bind_conv(conv, self.conv_g, generator, 0.5, bias=False)[0],
            "gamma": Weights(generator.uniform(0.5, 1.5, 3)),
            "beta": Weights(generator.uniform(-0.5, 0.5, 3)),
        }
        self.running = [np.zeros(3, np.float32), np.ones(3, np.float32), np.zeros(1, np.int64)]
        arrays = [address(a) for a in self.running]
        gamma, beta = (self.weights[name].parameter() for name in ("gamma", "beta"))
        self.plan.bind_norm(norm, NormArrays(gamma, beta, *arrays))
        weight, bias = self.bind_conv(self.output, linear_g, generator, 0.5, bias=True)
        self.weights |= {"linear": weight, "bias": bias}
        self.images = generator.standard_normal((batch, 2, 6, 4)).astype(np.float32)
        self.labels = generator.integers(0, 4, batch)

    def bind_conv(
        self, node: int, g: Geometry, generator: np.random.Generator, density: float, *, bias: bool
    ) -> tuple[Weights, Weights]:
        length = g.in_channels * g.kernel_h * g.kernel_w
        mask = generator.random((g.out_channels, length)) < density
        mask[0] = False  # an empty row
        row_ptr = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
        cols = np.nonzero(mask)[1].astype(np.int32)
        lib = cpu.library()
        assert lib is not None
        index = [
            np.empty(lib.transposed_rows(g) + 1, np.int32),
            np.empty(len(cols), np.int32),
            np.empty(len(cols), np.int32),
        ]
        lib.transpose_pattern(g, row_ptr, cols, *index)
        self.kept += [row_ptr, cols, *index]
        weight = Weights(generator.standard_normal(len(cols)))
        offset = Weights(generator.standard_normal(g.out_channels))
        places = [address(a) for a in (row_ptr, cols, *index)]
        self.plan.bind_conv(
            node,
            ConvArrays(*places, weight.parameter(), offset.parameter() if bias else Parameter()),
        )
        return weight, offset

    def build(self) -> "Net":
        self.plan.build(self.output)
        return self

    def train(self, size: int, sgd: Sgd | None = None) -> tuple[float, int]:
        images = Images.floats(self.images.ctypes.data)
        return self.plan.train(size, images, self.labels.ctypes.data, sgd=sgd)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [6, 5, 1])
def test_gradients_are_finite_differences(recompute: bool, size: int) -> None:
    net = Net(recompute=recompute).build()
    net.train(size)
    generator = np.random.default_rng(1)
    for name, weights in net.weights.items():
        gradient = weights.gradient.astype(np.float64)
        direction = generator.standard_normal(len(weights.values))
        before, losses, step = weights.values.copy(), [], 2e-3
        for sign in (1, -1):
            weights.values[:] = before + sign * step * direction
            losses.append(net.train(size)[0])
        weights.values[:] = before
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(gradient @ direction, rel=2e-2, abs=2e-4), name


def test_sgd_is_the_written_formula() -> None:
    """m <- 0.9 m + (g + 0.01 v), v <- v - 0.1 m, on every parameter, after each of two steps."""
    net = Net().build()
    buffers = {name: np.zeros(len(w.values)) for name, w in net.weights.items()}
    for _ in range(2):
        before = {name: w.values.astype(np.float64) for name, w in net.weights.items()}
        net.train(6, Sgd(0.1, 0.9, 0.01))
        for name, w in net.weights.items():
            buffers[name] = 0.9 * buffers[name] + w.gradient + 0.01 * before[name]
            np.testing.assert_allclose(
                w.values, before[name] - 0.1 * buffers[name], rtol=1e-5, atol=1e-6
            )
            np.testing.assert_allclose(w.momentum, buffers[name], rtol=1e-5, atol=1e-6)


def test_loss_of_known_logits() -> None:
    """Logits (0, ln 3) for labels 1 and 0: losses ln(4/3) and ln 4, mean 0.8369882, one correct.

    The gradient of the bias is the mean of (1/4, -1/4) and (-3/4, 3/4).
    """
    plan = NativePlan(2)
    g = Geometry.linear(2, 1, 2)
    output = plan.add("conv", plan.add("input", 1, 1, 1), g)
    rows = np.zeros(3, np.int32)
    bias = Weights(np.log([1.0, 3.0]))
    row_ptr = np.zeros(2, np.int32)
    places = [address(a) for a in (rows, None, row_ptr, None, None)]
    plan.bind_conv(output, ConvArrays(*places, Parameter(), bias.parameter()))
    plan.build(output)
    images, labels = np.zeros((2, 1, 1, 1), np.float32), np.array([1, 0])
    loss, correct = plan.train(2, Images.floats(images.ctypes.data), labels.ctypes.data)
    assert loss == pytest.approx(0.8369882, abs=1e-6)
    assert correct == 1
    np.testing.assert_allclose(bias.gradient, [-0.25, 0.25], atol=1e-6)
    logits = np.empty((2, 2), np.float32)
    plan.infer(2, Images.floats(images.ctypes.data), logits=logits.ctypes.data)
    np.testing.assert_allclose(logits, [np.log([1, 3])] * 2, rtol=1e-6)


def test_largest_gradients_of_known_logits() -> None:
    """Without weights the gradients of the logits are as above: (1/4, -1/4) and (-3/4, 3/4).

    For inputs (2, 4) and (0, 8) those of the weights are (0.25, -2.5) and (-0.25, 2.5); of the two
    smaller ones, which are equally large, the first is taken.
    """
    plan = NativePlan(2)
    output = plan.add("conv", plan.add("input", 2, 1, 1), Geometry.linear(2, 2, 2))
    rows = np.zeros(3, np.int32)
    bias = Weights(np.log([1.0, 3.0]))
    places = [address(a) for a in (rows, None, rows, None, None)]
    plan.bind_conv(output, ConvArrays(*places, Parameter(), bias.parameter()))
    plan.build(output)
    images, labels = np.array([[2, 4], [0, 8]], np.float32), np.array([1, 0])
    indices, top = np.full(3, -1), np.zeros(3, np.float32)
    asked = TopK(3, indices.ctypes.data, top.ctypes.data, 0, output)
    floats = Images.floats(images.ctypes.data)
    assert plan.topk_grads(2, floats, labels.ctypes.data, [asked]) == [3]
    assert indices.tolist() == [0, 1, 3]
    np.testing.assert_allclose(top, [0.25, -2.5, 2.5], rtol=1e-6)
    assert not bias.gradient.any()
    images[1, 0] = np.nan
    assert plan.topk_grads(2, floats, labels.ctypes.data, [asked]) == [-1]


def test_the_arena_of_a_small_network_counted_by_hand() -> None:
    """Batch 16; planes of 24 pixels: x 2, conv 3, norm 3; pooled 18; logits 4.

    Kept to the backward pass: x, conv output and norm output, winners (288 bytes) and statistics
    (24), in multiples of 64 bytes. The peak is at the pool's gradient: these, and the gradients
    of pool (18) and norm (3 planes). Recomputing keeps no conv output; but while it is computed
    again, it and the gradient of the norm live beside x and the norm output, when winners and the
    gradient of pool are gone.
    """
    planes, pooled = 16 * 4 * 24, 16 * 4 * 18
    winners, statistics = 320, 64
    net = Net(batch=16).build()
    kept = 2 * planes + 3 * planes + 3 * planes + winners + statistics
    assert net.plan.arena_bytes() == kept + pooled + 3 * planes
    net = Net(batch=16, recompute=True).build()
    assert net.plan.arena_bytes() == 2 * planes + 3 * (3 * planes) + statistics


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return 4096 * int(file.read().split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_step_takes_more_memory_than_the_first() -> None:
    net = Net(batch=512)
    net.images = np.zeros((512, 2, 6, 4), np.float32)
    net.labels = np.zeros(512, np.int64)
    net.build()
    for _ in range(5):
        net.train(512)
    before = resident_bytes()
    for size in (512, 100) * 100:
        net.train(size)
    assert resident_bytes() - before < net.plan.arena_bytes() / 4


def refused(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(SparseModelError, match=message):
        action()


def test_what_a_plan_refuses() -> None:
    refused(lambda: NativePlan(0), "batch >= 1")
    plan = NativePlan(4)
    refused(lambda: plan.add("relu", 0), "no node 0 yet")
    x = plan.add("input", 2, 6, 4)
    refused(lambda: plan.add("input", 2, 6, 4), "first node")
    refused(lambda: plan.add("conv", x, Geometry.conv(4, 3, 5, (6, 4), (3, 3))), "a source of 3")
    refused(lambda: plan.add("conv", x, Geometry.conv(4, 2, 5, (6, 4), (7, 3))), "conv|geometry")
    refused(
        lambda: plan.add("maxpool", x, PoolGeometry.pool(4, 2, (6, 4), (0, 2), stride=(1, 1))),
        "do not fit",
    )
    pooled = plan.add("global_avgpool", x)
    refused(lambda: plan.add("add", x, pooled), "a source of 2 x 6 x 4")
    refused(lambda: plan.add("batchnorm", x, 7, 0, 1e-5, 0.1), "no node 7")
    refused(lambda: plan.add("batchnorm", x, -1, 0, -1.0, 0.1), "eps >= 0")
    refused(lambda: plan.build(x), "expected logits")
    refused(lambda: plan.bind_norm(pooled, NormArrays()), "another kind")
    images = Images.floats(np.zeros(192, np.float32).ctypes.data)
    refused(lambda: plan.infer(4, images), "not built")
    plan.add("relu", x)
    refused(lambda: plan.build(pooled), "node 2 is not used")


def test_what_a_built_plan_refuses() -> None:
    net = Net()
    unbound = NativePlan(4)
    conv = unbound.add("conv", unbound.add("input", 18, 1, 1), Geometry.linear(4, 18, 4))
    refused(lambda: unbound.build(conv), "no arrays are bound to node 1")
    net.build()
    refused(lambda: net.plan.build(net.output), "built already")
    refused(lambda: net.plan.add("relu", 0), "built already")
    refused(lambda: net.train(7), "batch of 1 to 6")
    refused(lambda: net.train(6, Sgd(-1.0, 0.0, 0.0)), "lr")
    images, labels = Images.floats(net.images.ctypes.data), net.labels.ctypes.data
    refused(lambda: net.plan.train(6, images, labels, threads=0), "threads >= 1")
    refused(lambda: net.plan.train(6, Images(None, 0, None, None), labels), "images.data is null")
    refused(lambda: net.plan.train(6, Images(1, 1, None, None), labels), "scale and shift")
    refused(lambda: net.plan.train(6, Images(1, 2, None, None), labels), "unknown type 2")
    refused(lambda: net.plan.bind_conv(1, ConvArrays()), "null")


def test_the_bindings_need_no_torch() -> None:
    code = "import sys, sparsemodel.kernels.cpu.plan_abi; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
