"""Block-sparse linear layers: the Triton kernels, interpreted on the CPU, against dense float64."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels.blocks import ops as block_ops
from sparsemodel.kernels.blocks.index import BlockIndex
from sparsemodel.kernels.csr import csr_from_mask

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction

from sparsemodel.kernels.blocks import triton_blocks

Tensor = torch.Tensor

# Interpreted whether or not TRITON_INTERPRET is set, so that nothing else in the process is.
INTERPRETED = triton_blocks.Kernels(*(InterpretedFunction(k.fn) for k in triton_blocks.KERNELS))
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# (rows of blocks, columns of blocks, side, batch)
SIZES = [(1, 1, 16, 1), (3, 5, 16, 40), (4, 3, 32, 130), (2, 3, 64, 17), (3, 2, 16, 0)]
every_size = pytest.mark.parametrize("size", SIZES)
every_density = pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
every_type = pytest.mark.parametrize("dtype", list(TOLERANCE))


class Case(NamedTuple):
    """A layer of blocks (a row and a column of them empty unless full), input and gradient."""

    weight: Tensor
    mask: Tensor
    values: Tensor
    bias: Tensor
    index: BlockIndex
    x: Tensor
    dy: Tensor

    def operands(self) -> tuple[Any, ...]:
        index = self.index
        return index.row_ptr, index.cols, index.joined(), index.side

    def near(self, found: Tensor, expected: Tensor) -> None:
        """Equal up to rounding of float32 sums and of the result's type."""
        assert found.dtype == self.x.dtype
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        bound = TOLERANCE[self.x.dtype] * max(1.0, scale)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)

    def loss_gradients(self) -> tuple[Tensor, Tensor]:
        """Of the sum of y · dy, for the input and the values, in float64."""
        x, dy = self.x.double(), self.dy.double()
        return dy @ self.weight, (dy.t() @ x)[self.mask]


def make(size: tuple[int, int, int, int], density: float, dtype: torch.dtype) -> Case:
    height, width, side, batch = size
    torch.manual_seed(sum(size))
    blocks = torch.rand(height, width) < density
    if density < 1:
        blocks[height // 2] = False
        blocks[:, width // 2] = False
    mask = blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)
    row_ptr, cols = csr_from_mask(mask)
    out, inputs = mask.shape
    values, bias = torch.randn(len(cols)).to(dtype), torch.randn(out).to(dtype)
    weight = torch.zeros(mask.shape, dtype=torch.float64)
    weight[mask] = values.double()
    x, dy = torch.randn(batch, inputs).to(dtype), torch.randn(batch, out).to(dtype)
    return Case(
        weight, mask, values, bias, BlockIndex.build(row_ptr, cols, inputs, side), x, dy
    )  # fmt: skip


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The operators on this device: by the kernels (on a CPU interpreted) and by the reference."""
    if request.param == "reference":
        monkeypatch.setattr(block_ops, "kernels_for", lambda x: None)
    elif not torch.cuda.is_available():
        monkeypatch.setattr(block_ops, "kernels_for", lambda x: INTERPRETED)
    # Fills what torch.empty makes with NaN; cuBLAS would ask for settings of its own.
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    yield request.param
    torch.use_deterministic_algorithms(False)


@every_size
@every_density
@every_type
def test_forward_and_gradients(
    size: tuple[int, int, int, int], density: float, dtype: torch.dtype, way: str
) -> None:
    if dtype == torch.bfloat16 and way == "kernels" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter cannot multiply bfloat16, which numpy lacks")
    c = make(size, density, dtype)
    x, values, bias = (t.clone().requires_grad_() for t in (c.x, c.values, c.bias))
    y = block_ops.block_linear(x, values, bias, *c.operands())
    c.near(y.detach(), c.x.double() @ c.weight.t() + c.bias.double())
    y.backward(c.dy)
    assert x.grad is not None
    assert values.grad is not None
    assert bias.grad is not None
    dx, dvalues = c.loss_gradients()
    c.near(x.grad, dx)
    c.near(values.grad, dvalues)
    c.near(bias.grad, c.dy.double().sum(0))


def test_what_needs_no_gradient_gets_none_and_no_bias_is_none() -> None:
    c = make((2, 3, 16, 5), 0.5, torch.float32)
    x = c.x.clone().requires_grad_()
    y = block_ops.block_linear(x, c.values, None, *c.operands())
    y.backward(c.dy)
    c.near(y.detach(), c.x.double() @ c.weight.t())
    assert x.grad is not None
    c.near(x.grad, c.loss_gradients()[0])
    values = c.values.clone().requires_grad_()
    block_ops.block_linear(c.x, values, None, *c.operands()).backward(c.dy)
    assert values.grad is not None
    c.near(values.grad, c.loss_gradients()[1])


def test_any_strides_and_leading_dimensions() -> None:
    c = make((3, 2, 16, 12), 0.7, torch.float32)
    values = c.values.clone().requires_grad_()
    features_first = c.x.t().contiguous().t()
    gradient = c.dy.t().contiguous().t()
    y = block_ops.block_linear(features_first, values, None, *c.operands())
    y.backward(gradient)
    c.near(y.detach(), c.x.double() @ c.weight.t())
    assert values.grad is not None
    c.near(values.grad, c.loss_gradients()[1])
    stacked = block_ops.block_linear(c.x.view(3, 4, -1), values, None, *c.operands())
    assert stacked.shape == (3, 4, 48)
    c.near(stacked.detach().view(12, 48), c.x.double() @ c.weight.t())
    single = block_ops.block_linear(c.x[0], values, None, *c.operands())
    assert single.shape == (48,)
    wide = torch.randn(12, 64)
    part = block_ops.block_linear(wide[:, 32:], values, None, *c.operands())
    c.near(part.detach(), wide[:, 32:].double() @ c.weight.t())


def test_a_second_call_gives_the_same_bits() -> None:
    c = make((4, 4, 16, 70), 0.5, torch.float32)
    runs = []
    for _ in range(2):
        x, values = c.x.clone().requires_grad_(), c.values.clone().requires_grad_()
        y = block_ops.block_linear(x, values, c.bias, *c.operands())
        y.backward(c.dy)
        runs.append((y, x.grad, values.grad))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck looks at it
@pytest.mark.parametrize("density", [0.0, 0.5])
def test_schemas_fakes_and_autograd_agree(density: float) -> None:
    c = make((2, 3, 16, 5), density, torch.float32)
    x, values, bias = (t.clone().requires_grad_() for t in (c.x, c.values, c.bias))
    torch.library.opcheck(torch.ops.sparsemodel.block_linear, (x, values, bias, *c.operands()))
    for wanted in ([True, True], [False, True], [True, False]):
        torch.library.opcheck(
            torch.ops.sparsemodel.block_linear_backward,
            (c.dy, c.x, c.values, *c.operands(), wanted),
        )


def test_what_does_not_fit_is_refused() -> None:
    c = make((2, 3, 16, 5), 1.0, torch.float32)
    with pytest.raises(SparseModelError, match=r"expected an input \[\*, 48\].*got \(5, 32\)"):
        block_ops.block_linear(c.x[:, :32], c.values, None, *c.operands())
    for values in (c.values[1:], torch.cat([c.values, c.values[:1]])):
        with pytest.raises(SparseModelError, match="whole blocks of 16×16"):
            block_ops.block_linear(c.x, values, None, *c.operands())
    with pytest.raises(SparseModelError, match=r"input's torch.float16.*torch.float32"):
        block_ops.block_linear(c.x.half(), c.values, None, *c.operands())


def test_the_index_equals_a_plain_loop() -> None:
    c = make((4, 5, 16, 0), 0.5, torch.float32)
    blocks = c.mask[::16, ::16]
    placed, found = [], 0
    for row in range(4):
        in_row = blocks[row].nonzero().flatten().tolist()
        placed += [(col, row, found * 256 + at * 16) for at, col in enumerate(in_row)]
        found += len(in_row)
    placed.sort()
    assert c.index.block_rows.tolist() == [row for _, row, _ in placed]
    assert c.index.starts.tolist() == [start for _, _, start in placed]
    ends = [sum(col < j for col, _, _ in placed) for j in range(6)]
    assert c.index.col_ptr.tolist() == ends
    row_ptr, cols, joined, side = c.operands()
    for one, other in zip(
        c.index, BlockIndex.split(row_ptr, cols, joined, c.x.shape[1], side), strict=True
    ):
        assert one == other if isinstance(one, int) else torch.equal(one, other)
