"""Sparse convolution: conv.cu on the host, compared with torch's in float64."""

from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn import functional

from sparsemodel.kernels.csr import csr_from_mask
from sparsemodel.kernels.cuda import conv as cuda_conv
from sparsemodel.kernels.cuda.launch import Runner
from sparsemodel.kernels.geometry import ConvGeometry

Tensor = torch.Tensor

# Geometry, batch and size of the input.
CASES = {
    "pointwise": (ConvGeometry(5, 3, 1, 1), 1, (1, 1)),
    "3x3": (ConvGeometry(9, 4, 3, 3, 1, 1, 1, 1), 3, (5, 7)),
    "strided": (ConvGeometry(10, 6, 3, 2, 2, 3, 1, 0), 2, (9, 8)),
    "dilated in groups": (ConvGeometry(6, 4, 2, 3, 1, 2, 2, 1, 2, 3, 2), 5, (6, 9)),
    "depthwise": (ConvGeometry(8, 4, 3, 3, 2, 1, 1, 1, 1, 1, 4), 1, (7, 5)),
    "a warp of samples": (ConvGeometry(3, 8, 3, 3, 1, 1, 1, 1), 32, (3, 2)),
    "more than a tile": (ConvGeometry(3, 20, 3, 3, 1, 1, 1, 1), 40, (4, 3)),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
every_case = pytest.mark.parametrize("name", list(CASES))
every_density = pytest.mark.parametrize("density", [0.0, 0.3, 1.0])


class Case(NamedTuple):
    """A layer with a row that is empty (unless it is full), an input and an output gradient."""

    geometry: ConvGeometry
    mask: Tensor
    values: Tensor
    row_ptr: Tensor
    cols: Tensor
    bias: Tensor
    x: Tensor
    dy: Tensor

    def exact_norms(self) -> Tensor:
        """Of each sample's own weight gradient at the mask, in float64."""
        norms = []
        for b in range(self.x.shape[3]):
            alone = self._replace(x=self.x[..., b : b + 1], dy=self.dy[..., b : b + 1])
            norms.append(alone.exact()[2][self.mask].square().sum())
        return torch.stack(norms)

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output, input gradient and dense weight gradient of torch's convolution in float64."""
        g = self.geometry
        weight = torch.zeros(g.weight_shape, dtype=torch.float64)
        weight[self.mask] = self.values.double()
        x = self.x.double().permute(3, 0, 1, 2).requires_grad_()
        weight.requires_grad_()
        y = functional.conv2d(
            x, weight, self.bias.double(), g.stride, g.padding, g.dilation, g.groups
        )
        dx, dweight = torch.autograd.grad(y, (x, weight), self.dy.double().permute(3, 0, 1, 2))
        return y.detach().permute(1, 2, 3, 0), dx.permute(1, 2, 3, 0), dweight

    def near(self, found: Tensor, expected: Tensor) -> None:
        """Equal up to rounding of sums of this many terms, and of the result's type."""
        assert found.dtype == self.x.dtype
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        bound = TOLERANCE[self.x.dtype] * max(1.0, scale)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


def make(name: str, density: float, dtype: torch.dtype = torch.float32) -> Case:
    return random_case(*CASES[name], density, dtype)


def random_case(
    g: ConvGeometry,
    batch: int,
    size: tuple[int, int],
    density: float,
    dtype: torch.dtype = torch.float32,
) -> Case:
    mask = torch.rand(g.weight_shape) < density
    if density < 1:
        mask[g.out_channels // 2] = False
    values, bias = torch.randn(int(mask.sum())), torch.randn(g.out_channels)
    x = torch.randn(g.in_channels, *size, batch)
    dy = torch.randn(g.out_channels, *g.output_size(*size), batch)
    floats = (t.to(dtype) for t in (bias, x, dy))
    return Case(g, mask, values.to(dtype), *csr_from_mask(mask), *floats)


def check(cuda: Runner, c: Case) -> None:
    y, dx, dweight = c.exact()
    pattern = c.row_ptr, c.cols, c.geometry
    found = torch.empty_like(c.dy)
    cuda_conv.forward(cuda, c.x, c.values, c.bias, *pattern, found)
    c.near(found, y)
    found = torch.empty_like(c.dy)
    cuda_conv.forward(cuda, c.x, c.values, None, *pattern, found)
    c.near(found, y - c.bias.double()[:, None, None, None])
    transposed = cuda_conv.transpose(*pattern)
    transposed = cuda_conv.Transposed.split(transposed.joined(), c.cols.numel())
    found = torch.empty_like(c.x)
    cuda_conv.input_gradient(cuda, c.dy, c.values, transposed, c.geometry, found)
    c.near(found, dx)
    c.near(cuda_conv.weight_gradient(cuda, c.dy, c.x, *pattern), dweight[c.mask])
    found = cuda_conv.square_norms(cuda, c.dy, c.x, *pattern)
    assert found.dtype == torch.float32
    expected = c.exact_norms()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@every_case
@every_density
def test_forward_and_gradients(cuda: Runner, name: str, density: float) -> None:
    check(cuda, make(name, density))


@st.composite
def geometries(draw: st.DrawFn) -> tuple[ConvGeometry, int, tuple[int, int]]:
    """A geometry, a batch and a size that the window fits."""
    groups, small = draw(st.sampled_from([1, 1, 2, 3])), st.integers(1, 3)
    padding = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    g = ConvGeometry(
        draw(small) * groups, draw(small) * groups, draw(small), draw(small), draw(small),
        draw(small), *padding, draw(st.integers(1, 2)), draw(st.integers(1, 2)), groups,
    )  # fmt: skip
    least_h = max(1, g.dilation_h * (g.kernel_h - 1) + 1 - 2 * g.padding_h)
    least_w = max(1, g.dilation_w * (g.kernel_w - 1) + 1 - 2 * g.padding_w)
    size = least_h + draw(st.integers(0, 4)), least_w + draw(st.integers(0, 4))
    return g, draw(st.sampled_from([1, 2, 5, 33])), size


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(call=geometries(), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_any_geometry(
    cuda: Runner, call: tuple[ConvGeometry, int, tuple[int, int]], density: float
) -> None:
    check(cuda, random_case(*call, density))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(cuda: Runner, dtype: torch.dtype) -> None:
    check(cuda, make("strided", 0.5, dtype))
