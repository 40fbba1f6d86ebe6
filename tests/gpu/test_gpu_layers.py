"""Sparse layers on a GPU: linear ones run the kernels, and all compute what dense ones do."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from sparsemodel.kernels.cuda import array_ops as cuda_array_ops
from sparsemodel.kernels.cuda import launch as cuda
from sparsemodel.kernels.cuda import measured
from sparsemodel.layers.linear_and_conv import SparseConv2d, SparseLinear

LAYERS = {
    "linear": (lambda: nn.Linear(70, 33), (9, 70)),
    "conv": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2), (5, 8, 9, 7)),
}


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """Convolutions, which torch computes, without TF32."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def pair(name: str) -> tuple[nn.Module, SparseLinear | SparseConv2d, torch.Tensor]:
    """A dense layer with pruned weights, its sparse form forced to sparse kernels, an input."""
    make, shape = LAYERS[name]
    dense = make()
    mask = torch.rand(dense.weight.shape) < 0.3
    with torch.no_grad():
        dense.weight.mul_(mask)
    kind = SparseLinear if name == "linear" else SparseConv2d
    sparse = kind.from_dense(dense, mask, execution="sparse")
    return dense, sparse, torch.randn(shape)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched from now on."""
    launched: list[str] = []
    launch = cuda.DeviceRunner.launch

    def record(self: cuda.DeviceRunner, family: str, kernel: str, *rest: object, **real: object):
        launched.append(kernel)
        launch(self, family, kernel, *rest, **real)

    monkeypatch.setattr(cuda.DeviceRunner, "launch", record)
    return launched


@pytest.mark.parametrize("name", list(LAYERS))
def test_layers_run_the_kernels_and_equal_dense_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, sparse, x = pair(name)
    launched = recorded(monkeypatch)
    monkeypatch.setattr(measured, "MAX_DENSE_GRADIENT", 0)  # so that it is taken at the mask
    exact = dense.double()
    x64 = x.double().requires_grad_()
    expected = exact(x64)
    x.requires_grad_()
    y = sparse(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    at_mask = exact.weight.grad[sparse.mask()]
    torch.testing.assert_close(sparse.values.grad.double(), at_mask, rtol=1e-5, atol=1e-4)
    assert launched == (["spmm", "spmm", "sddmm"] if name == "linear" else [])


@pytest.mark.parametrize("name", list(LAYERS))
def test_layers_are_the_same_under_torch_compile(name: str) -> None:
    _, sparse, x = pair(name)
    found = torch.compile(sparse)(x)
    torch.testing.assert_close(found, sparse(x))


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("k", [0, 7, 10_000])
def test_growth_finds_what_a_sort_finds(name: str, k: int) -> None:
    """Of small whole numbers, whose sums are exact and mostly tie; on the CPU, as ever."""
    _, sparse, x = pair(name)
    x = torch.randint(-1, 2, x.shape).float()
    dy = torch.randint(-1, 2, sparse(x).shape).float()
    plain = sparse.to_dense()
    (gradient,) = torch.autograd.grad(plain(x), plain.weight, dy)
    pruned = torch.nonzero(~sparse.mask().flatten()).flatten().tolist()
    values = gradient.flatten().tolist()
    expected = sorted(sorted(pruned, key=lambda at: (-abs(values[at]), at))[:k])
    positions, gradients = sparse.topk_grad(x, dy, k)
    assert positions.tolist() == expected
    assert gradients.tolist() == [values[at] for at in expected]


@pytest.mark.parametrize("name", list(LAYERS))
def test_left_to_themselves_layers_stay_dense(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, sparse, x = pair(name)
    sparse.execution = "auto"
    monkeypatch.setattr(cuda.DeviceRunner, "launch", lambda *_, **__: pytest.fail("launched"))
    sparse(x)


@pytest.mark.parametrize(("sparse", "expected"), [(1.0, ["spmm", "spmm"]), (3.0, [])])
def test_linear_layers_follow_the_table(
    sparse: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [measured.Timed(o, 1, 1, 0.9, sparse, 2.0) for o in ("forward", "input gradient")]
    gpu = measured.Gpu("any", (9, 0), tuple(rows))
    monkeypatch.setattr(measured, "gpu_of", lambda device: gpu)
    launched = recorded(monkeypatch)
    _, layer, x = pair("linear")
    layer.execution = "auto"
    layer(x.requires_grad_()).sum().backward()
    assert launched == expected


def test_kernels_run_on_the_current_stream() -> None:
    """Work queued before on the same stream is seen, and nothing waits for the default stream."""
    values, gradient = torch.zeros(2, 1 << 24).unbind()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        gradient.fill_(1)
        cuda_array_ops.sgd_step(values, gradient, None, 1.0, 0.0, 0.0)
    stream.synchronize()
    assert bool((values == -1).all())


def test_two_calls_give_the_same_bits() -> None:
    _, sparse, x = pair("linear")
    assert torch.equal(sparse(x), sparse(x))


@pytest.mark.parametrize("name", list(LAYERS))
def test_layers_run_in_a_cuda_graph(name: str) -> None:
    _, sparse, x = pair(name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels load at their first use, which no capture allows
        sparse(x).sum().backward()
        sparse.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse(x)
        y.sum().backward()
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected = sparse(x)
    torch.testing.assert_close(y, expected)
    gradient = torch.autograd.grad(expected.sum(), sparse.values)[0]
    torch.testing.assert_close(sparse.values.grad, gradient)
