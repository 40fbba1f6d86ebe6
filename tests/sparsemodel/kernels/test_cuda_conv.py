"""Sparse convolution and the largest gradients outside the mask: conv.cu and topk.cu on the host.

Convolutions are compared with torch's in float64, selections with a plain sort.
"""

from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn import functional

from sparsemodel.errors import MaskError
from sparsemodel.kernels import reference
from sparsemodel.kernels.csr import csr_from_mask
from sparsemodel.kernels.cuda import conv as cuda_conv
from sparsemodel.kernels.cuda import topk as cuda_topk
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
@given(call=geometries(), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), k=st.integers(0, 40))
def test_any_geometry(
    cuda: Runner, call: tuple[ConvGeometry, int, tuple[int, int]], density: float, k: int
) -> None:
    c = random_case(*call, density)
    check(cuda, c)
    c = whole_numbers(c)
    found = cuda_topk.topk_grad(cuda, c.x, c.dy, c.row_ptr, c.cols, c.geometry, k)
    positions, gradients = selected(c.exact()[2], c.mask, k)
    assert found[0].tolist() == positions
    assert found[1].tolist() == gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(cuda: Runner, dtype: torch.dtype) -> None:
    check(cuda, make("strided", 0.5, dtype))


def selected(dense: Tensor, mask: Tensor, k: int) -> tuple[list[int], list[float]]:
    """The k largest magnitudes outside the mask by a plain sort, in order of position."""
    pruned = [
        (position, value)
        for position, (value, active) in enumerate(
            zip(dense.flatten().tolist(), mask.flatten().tolist(), strict=True)
        )
        if not active
    ]
    best = sorted(pruned, key=lambda item: (-abs(item[1]), item[0]))[:k]
    return [p for p, _ in sorted(best)], [v for _, v in sorted(best)]


def whole_numbers(c: Case) -> Case:
    """The same with small whole numbers: sums are exact, and most magnitudes tie."""
    return c._replace(
        x=torch.randint(-1, 2, c.x.shape).to(c.x.dtype),
        dy=torch.randint(-1, 2, c.dy.shape).to(c.x.dtype),
    )


@every_case
@pytest.mark.parametrize("k", [0, 1, 7, 10_000])
def test_topk_is_exact_with_ties_to_the_lower_index(cuda: Runner, name: str, k: int) -> None:
    c = whole_numbers(make(name, 0.3))
    found = cuda_topk.topk_grad(cuda, c.x, c.dy, c.row_ptr, c.cols, c.geometry, k)
    positions, gradients = selected(c.exact()[2], c.mask, k)
    assert found[0].tolist() == positions
    assert found[1].tolist() == gradients


@pytest.mark.parametrize("k", [1, 40, 300])
def test_topk_goes_on_to_the_last_digit(
    cuda: Runner, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where candidates may never be sorted, ties are told apart by all bits of the position."""
    monkeypatch.setattr(cuda_topk, "_MIN_CANDIDATES", 0)
    c = make("more than a tile", 0.3)
    c = c._replace(dy=torch.ones_like(c.dy), x=torch.ones_like(c.x))
    found = cuda_topk.topk_grad(cuda, c.x, c.dy, c.row_ptr, c.cols, c.geometry, k)
    positions, gradients = selected(c.exact()[2], c.mask, k)
    assert found[0].tolist() == positions
    assert found[1].tolist() == gradients


def test_topk_of_a_dead_layer_takes_the_first_zeros(cuda: Runner) -> None:
    c = make("3x3", 0.3)
    c = c._replace(dy=torch.zeros_like(c.dy))
    positions, gradients = cuda_topk.topk_grad(cuda, c.x, c.dy, c.row_ptr, c.cols, c.geometry, 9)
    assert positions.tolist() == torch.nonzero(~c.mask.flatten()).flatten()[:9].tolist()
    assert gradients.tolist() == [0.0] * 9


def test_topk_without_samples_takes_the_first_zeros(cuda: Runner) -> None:
    c, _ = linear_case()
    x, dy = c.x[..., :0].contiguous(), c.dy[..., :0].contiguous()
    found = cuda_topk.topk_grad(cuda, x, dy, c.row_ptr, c.cols, c.geometry, 2000)
    positions, gradients = selected(torch.zeros(70, 150), c.mask, 2000)
    assert found[0].tolist() == positions
    assert found[1].tolist() == gradients


def linear_case(dtype: torch.dtype = torch.float32) -> tuple[Case, Tensor]:
    """A linear layer of 70 × 150, more than a tile both ways, and its dense gradient."""
    mask = torch.rand(70, 150) < 0.2
    x, dy = torch.randn(150, 33).to(dtype), torch.randn(70, 33).to(dtype)
    geometry = ConvGeometry(70, 150, 1, 1)
    planes = x.view(150, 1, 1, 33), dy.view(70, 1, 1, 33)
    none = torch.empty(0)
    return Case(
        geometry, mask, none, *csr_from_mask(mask), none, *planes
    ), dy.double() @ x.t().double()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_topk_of_a_linear_layer(cuda: Runner, dtype: torch.dtype) -> None:
    c, dense = linear_case(dtype)
    found = cuda_topk.topk_grad(cuda, c.x, c.dy, c.row_ptr, c.cols, c.geometry, 200)
    positions, gradients = selected(dense, c.mask, 200)
    assert found[0].tolist() == positions
    expected = torch.tensor(gradients, dtype=torch.float64)
    torch.testing.assert_close(found[1].double(), expected, rtol=1e-5, atol=1e-5)


def test_topk_is_the_references(cuda: Runner) -> None:
    c, _ = linear_case()
    found = cuda_topk.topk_grad(cuda, c.x, c.dy, c.row_ptr, c.cols, c.geometry, 50)
    x, dy = c.x.view(150, 33).t(), c.dy.view(70, 33).t()
    positions, gradients = reference.linear_topk_grad(x, dy, c.row_ptr, c.cols, 50)
    assert found[0].tolist() == positions.tolist()
    torch.testing.assert_close(found[1].cpu(), gradients)


def test_topk_of_a_full_mask_is_empty(cuda: Runner) -> None:
    c = make("3x3", 1.0)
    positions, gradients = cuda_topk.topk_grad(cuda, c.x, c.dy, c.row_ptr, c.cols, c.geometry, 5)
    assert len(positions) == len(gradients) == 0


def test_topk_refuses_nan_at_pruned_places_alone(cuda: Runner) -> None:
    c, _ = linear_case()
    mask = c.mask.clone()
    mask[3] = True
    c = c._replace(mask=mask, row_ptr=csr_from_mask(mask)[0], cols=csr_from_mask(mask)[1])
    c.dy[3] = float("nan")
    cuda_topk.topk_grad(cuda, c.x, c.dy, c.row_ptr, c.cols, c.geometry, 5)
    c.dy[4, 0, 0, 0] = float("nan")
    with pytest.raises(MaskError, match="has training diverged"):
        cuda_topk.topk_grad(cuda, c.x, c.dy, c.row_ptr, c.cols, c.geometry, 5)
