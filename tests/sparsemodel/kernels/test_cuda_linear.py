"""Sparse linear layers: the kernels of linear.cu, run on the host, against dense float64."""

from typing import NamedTuple

import pytest
import torch

from sparsemodel.kernels.csr import csr_from_mask
from sparsemodel.kernels.cuda import linear as cuda_linear
from sparsemodel.kernels.cuda.launch import Runner

Tensor = torch.Tensor

# (out, in, batch): less than a tile, a tile, and no multiples of one.
SIZES = [(1, 1, 1), (5, 7, 1), (9, 70, 33), (20, 3, 128), (13, 40, 300)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
every_size = pytest.mark.parametrize(("out", "width", "batch"), SIZES)
every_density = pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
every_type = pytest.mark.parametrize("dtype", list(TOLERANCE))


class Case(NamedTuple):
    """A layer with rows that are empty (unless it is full), an input and an output gradient."""

    weight: Tensor
    mask: Tensor
    values: Tensor
    row_ptr: Tensor
    cols: Tensor
    bias: Tensor
    x: Tensor
    dy: Tensor

    def transposed(self) -> cuda_linear.Transposed:
        made = cuda_linear.transpose(self.row_ptr, self.cols, self.weight.shape[1])
        return cuda_linear.Transposed.split(made.joined(), self.cols.numel())

    def forward(self, cuda: Runner, bias: Tensor | None) -> Tensor:
        y = torch.empty_like(self.dy)
        cuda_linear.forward(cuda, self.x, self.values, bias, self.row_ptr, self.cols, y)
        return y

    def input_gradient(self, cuda: Runner) -> Tensor:
        dx = torch.empty_like(self.x)
        cuda_linear.input_gradient(cuda, self.dy, self.values, self.transposed(), dx)
        return dx

    def near(self, found: Tensor, expected: Tensor) -> None:
        """Equal up to rounding of sums of this many terms, and of the result's type."""
        assert found.dtype == self.x.dtype
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        bound = TOLERANCE[self.x.dtype] * max(1.0, scale)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


def make(
    out: int, width: int, batch: int, density: float, dtype: torch.dtype = torch.float32
) -> Case:
    mask = torch.rand(out, width) < density
    if density < 1:
        mask[out // 2] = False
    values = torch.randn(int(mask.sum())).to(dtype)
    weight = torch.zeros(out, width, dtype=torch.float64)
    weight[mask] = values.double()
    bias, x, dy = (torch.randn(s).to(dtype) for s in [(out,), (width, batch), (out, batch)])
    return Case(weight, mask, values, *csr_from_mask(mask), bias, x, dy)


@every_size
@every_density
def test_forward(cuda: Runner, out: int, width: int, batch: int, density: float) -> None:
    c = make(out, width, batch, density)
    y = c.forward(cuda, None)
    c.near(y, c.weight @ c.x.double())
    y = c.forward(cuda, c.bias)
    c.near(y, c.weight @ c.x.double() + c.bias.double()[:, None])


@every_size
@every_density
def test_gradients(cuda: Runner, out: int, width: int, batch: int, density: float) -> None:
    c = make(out, width, batch, density)
    dx = c.input_gradient(cuda)
    c.near(dx, c.weight.t() @ c.dy.double())
    dvalues = cuda_linear.weight_gradient(cuda, c.dy, c.x, c.row_ptr, c.cols)
    c.near(dvalues, (c.dy.double() @ c.x.double().t())[c.mask])


@every_type
def test_half_types_are_summed_in_float32(cuda: Runner, dtype: torch.dtype) -> None:
    c = make(12, 300, 40, 0.5, dtype)
    y = c.forward(cuda, c.bias)
    exact = c.weight @ c.x.double() + c.bias.double()[:, None]
    c.near(y, exact)
    terms = c.weight.abs() @ c.x.double().abs() + c.bias.double().abs()[:, None]
    summed = 301 * torch.finfo(torch.float32).eps * terms  # n eps Σ|terms|, however it is added
    rounded = torch.finfo(dtype).eps * exact.abs()
    assert ((y.double() - exact).abs() <= summed + rounded).all()
    c.near(c.input_gradient(cuda), c.weight.t() @ c.dy.double())
    dvalues = cuda_linear.weight_gradient(cuda, c.dy, c.x, c.row_ptr, c.cols)
    c.near(dvalues, (c.dy.double() @ c.x.double().t())[c.mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_round_as_torch_rounds(cuda: Runner, dtype: torch.dtype) -> None:
    """1 · 1 + x over a range: ties, subnormals, infinity and NaN as torch converts them."""
    near_one = torch.arange(1, 41) * torch.finfo(dtype).eps / 8
    special = torch.tensor([0.0, -0.0, 1e-7, 6e4, 7e4, 1e30, float("inf"), float("nan")])
    x = torch.cat([near_one, special]).to(dtype)[None]
    bias = torch.ones(1).to(dtype)
    row_ptr, cols = csr_from_mask(torch.ones(1, 1, dtype=torch.bool))
    found = torch.empty_like(x)
    cuda_linear.forward(cuda, x, bias, bias, row_ptr, cols, found)
    expected = (x.float() + 1).to(dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@every_size
@every_density
def test_square_norms(cuda: Runner, out: int, width: int, batch: int, density: float) -> None:
    """Against each sample's own gradient."""
    c = make(out, width, batch, density)
    own = torch.einsum("ob,ib->boi", c.dy.double(), c.x.double())[:, c.mask]
    found = cuda_linear.square_norms(cuda, c.dy, c.x, c.row_ptr, c.cols)
    c.near(found, own.square().sum(1))


@pytest.mark.parametrize(("positions", "batch"), [(0, 3), (1, 33), (5, 4), (7, 40), (3, 0)])
@every_density
@every_type
def test_norms_of_sequences(
    cuda: Runner, positions: int, batch: int, density: float, dtype: torch.dtype
) -> None:
    """A sample's gradient is the sum over its positions."""
    c = make(9, 14, positions * batch, density, dtype)
    dy, x = (t.view(len(t), positions, batch) for t in (c.dy, c.x))
    found = cuda_linear.sequence_norms(cuda, dy, x, c.row_ptr, c.cols)
    own = torch.einsum("otb,itb->boi", dy.double(), x.double())[:, c.mask].square().sum(1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), own, rtol=1e-5, atol=1e-5)


def test_a_batch_of_none_has_no_output_and_no_gradient(cuda: Runner) -> None:
    c = make(4, 6, 0, 0.5)
    assert c.forward(cuda, c.bias).shape == (4, 0)
    dvalues = cuda_linear.weight_gradient(cuda, c.dy, c.x, c.row_ptr, c.cols)
    assert dvalues.tolist() == [0.0] * c.cols.numel()


def test_the_transposed_pattern_is_that_of_the_transposed_mask(cuda: Runner) -> None:
    c = make(9, 14, 1, 0.4)
    found = c.transposed()
    row_ptr, cols = csr_from_mask(c.mask.t())
    assert torch.equal(found.row_ptr, row_ptr)
    assert torch.equal(found.cols, cols)
    assert torch.equal(c.values[found.order.long()], c.weight.t()[c.mask.t()].float())
