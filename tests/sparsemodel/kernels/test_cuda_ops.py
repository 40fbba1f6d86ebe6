"""The operators around the CUDA kernels: with kernels (on the host) and with the reference."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from sparsemodel.errors import SparseModelError
from sparsemodel.kernels import functional as sparse
from sparsemodel.kernels import ops as layer_ops
from sparsemodel.kernels.csr import csr_from_mask
from sparsemodel.kernels.cuda import array_ops as ops
from sparsemodel.kernels.cuda import layer_ops as cuda_ops
from sparsemodel.kernels.cuda import measured
from sparsemodel.kernels.cuda.launch import Runner
from sparsemodel.kernels.functional import SparseIndex, sparse_linear
from sparsemodel.kernels.geometry import ConvGeometry

Tensor = torch.Tensor


@pytest.fixture(params=["kernels", "kernels where they won", "reference"])
def _computed_by(
    request: pytest.FixtureRequest, cuda: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the operators do on a GPU, with kernels or without, on CPU tensors."""
    runner = None if request.param == "reference" else cuda
    monkeypatch.setattr(ops.cuda, "runner", lambda device: runner)
    if request.param == "kernels":
        monkeypatch.setattr(measured, "MAX_DENSE_GRADIENT", 0)
    monkeypatch.setattr(sparse, "_native", lambda values, index: True)
    for name in ("linear", "linear_backward"):
        monkeypatch.setattr(layer_ops, name, getattr(cuda_ops, name))


def index_of(mask: Tensor) -> SparseIndex:
    row_ptr, cols = csr_from_mask(mask)
    transposed = cuda_ops.transposed_index(row_ptr, cols, mask.shape[1])
    return SparseIndex(row_ptr, cols, transposed, torch.empty(0, dtype=torch.int16))


def check_layer(
    found: Callable[[Tensor, Tensor, Tensor], Tensor],
    exact: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    mask: Tensor,
) -> None:
    """Output and the three gradients of a sparse layer against the dense one in float64."""
    values, bias = torch.randn(int(mask.sum())), torch.randn(mask.shape[0])
    weight = torch.zeros(mask.shape, dtype=torch.float64)
    weight[mask] = values.double()
    dense = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = exact(*dense)
    own = [t.requires_grad_() for t in (x, values, bias)]
    y = found(*own)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn(y.shape)
    gradients = torch.autograd.grad(y, own, dy)
    dx, dweight, dbias = torch.autograd.grad(expected, dense, dy.double())
    for g, e in zip(gradients, (dx, dweight[mask], dbias), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("_computed_by")
@pytest.mark.parametrize("shape", [(7,), (0, 7), (5, 7), (2, 3, 7)])
def test_linear_layers_are_differentiable(shape: tuple[int, ...]) -> None:
    geometry, mask = ConvGeometry(4, 7, 1, 1), torch.rand(4, 7) < 0.5
    index = index_of(mask)
    check_layer(
        lambda x, v, b: sparse_linear(x, v, b, index, geometry),
        functional.linear,
        torch.randn(shape),
        mask,
    )


@pytest.mark.usefixtures("_computed_by")
def test_steps_are_torchs() -> None:
    for kind, options in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})):
        expected = torch.randn(9).requires_grad_()
        values, first, second = expected.detach().clone(), torch.zeros(9), torch.zeros(9)
        optimizer = kind([expected], lr=0.1, weight_decay=0.1, **options)
        for step in (1, 2):
            expected.grad = torch.randn(9)
            optimizer.step()
            if kind is torch.optim.SGD:
                ops.sgd_step(values, expected.grad, first, 0.1, 0.9, 0.1)
            else:
                ops.adam_step(
                    values, expected.grad, first, second, 0.1, 0.9, 0.999, 1e-8, 0.1, True, step
                )
        torch.testing.assert_close(values, expected.detach())


@pytest.mark.usefixtures("_computed_by")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_updates_are_added_in_fixed_point(dtype: torch.dtype) -> None:
    """0.5 + 3 (1.25 + 2^2) = 16.25 at place [1, 2], and the high part of 0.25 is 2^14."""
    high, low = torch.zeros(2, 2, 3, dtype=torch.int64)
    refused = torch.zeros(2, dtype=torch.int64)
    first = torch.tensor([0.25, 0.5]).to(dtype)
    ops.fixed_add(high, low, first, None, torch.tensor([1, 5]), 1, refused)
    values, means = torch.full((2, 2, 3), 2.0).to(dtype).unbind()
    values = torch.full_like(values, 1.25)
    ops.fixed_add(high, low, values, means, None, 3, refused)
    found = high.double() / 2**16
    assert found.tolist() == [[15.75, 16, 15.75], [15.75, 15.75, 16.25]]
    assert not low.any()
    assert refused.tolist() == [0, 0]


@pytest.mark.usefixtures("_computed_by")
def test_square_norms_are_those_of_each_sample() -> None:
    mask, dy, x = torch.rand(5, 8) < 0.5, torch.randn(5, 3), torch.randn(8, 3)
    found = ops.square_norms(dy, x, *csr_from_mask(mask))
    own = torch.einsum("ob,ib->boi", dy, x)[:, mask].square().sum(1)
    torch.testing.assert_close(found, own)


@pytest.mark.usefixtures("_computed_by")
def test_square_norms_add_over_the_positions_of_a_sample() -> None:
    mask, dy, x = torch.rand(5, 8) < 0.5, torch.randn(5, 7, 3), torch.randn(8, 7, 3)
    found = ops.square_norms(dy, x, *csr_from_mask(mask))
    own = torch.einsum("otb,itb->boi", dy.double(), x.double())[:, mask].square().sum(1)
    torch.testing.assert_close(found.double(), own, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_computed_by")
@pytest.mark.parametrize(("batch", "density"), [(0, 0.5), (2, 0.0)])
def test_square_norms_of_nothing(batch: int, density: float) -> None:
    mask = torch.rand(5, 8) < density
    dy, x = torch.randn(5, 6, batch), torch.randn(8, 6, batch)
    found = ops.square_norms(dy, x, *csr_from_mask(mask))
    assert found.tolist() == [0.0] * batch


@pytest.mark.usefixtures("_computed_by")
def test_the_loss_has_a_gradient() -> None:
    logits, teacher = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    labels = torch.tensor([2, -100, 0])
    (gradient,) = torch.autograd.grad(
        ops.kd_loss(logits, teacher, labels, 0.4, 2.0)[0].sum(), logits
    )
    z = logits.detach().double().requires_grad_()
    hard = functional.cross_entropy(z, labels, reduction="sum")
    student = torch.log_softmax(z / 2, 1)
    guide = torch.log_softmax(teacher.double() / 2, 1)
    kept = labels != -100  # the others count in neither term
    soft = functional.kl_div(student[kept], guide[kept], reduction="sum", log_target=True)
    (expected,) = torch.autograd.grad(0.6 * hard + 0.4 * 4 * soft, z)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, inside opcheck
def test_schemas_shapes_and_autograd_hold() -> None:
    """torch's own checks of an operator: mutations, fake shapes, autograd registration."""
    n = torch.arange(3)
    row_ptr, cols = csr_from_mask(torch.rand(5, 8) < 0.5)
    check = torch.library.opcheck
    check(ops.sgd_step, (torch.rand(3), torch.rand(3), torch.rand(3), 0.1, 0.9, 0.1))
    check(ops.adam_step, (*torch.rand(4, 3), 0.1, 0.9, 0.999, 1e-8, 0.0, False, 1))
    sums = [torch.zeros(size, dtype=torch.int64) for size in (5, 5, 2)]
    check(ops.fixed_add, (*sums[:2], torch.rand(3), torch.rand(3), n, 7, sums[2]))
    check(ops.fixed_add, (*sums[:2], torch.rand(5), None, None, 7, sums[2]))
    check(ops.square_norms, (torch.rand(5, 3), torch.rand(8, 3), row_ptr, cols))
    check(ops.square_norms, (torch.rand(5, 4, 3), torch.rand(8, 4, 3), row_ptr, cols))
    logits = torch.rand(3, 4, requires_grad=True)
    check(ops.kd_loss, (logits, torch.rand(3, 4), n, 0.5, 2.0))


def add_to(n: int, values: Tensor, positions: Tensor | None, weight: int) -> None:
    high, low = torch.zeros(2, n, dtype=torch.int64)
    refused = torch.zeros(2, dtype=torch.int64)
    ops.fixed_add(high, low, values, None, positions, weight, refused)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.sgd_step(*torch.zeros(2, 3, 2).mT.unbind(), None, 1.0, 0.0, 0.0),
            "contiguous",
        ),
        (lambda: ops.sgd_step(torch.zeros(3), torch.zeros(2), None, 1.0, 0.0, 0.0), "shape"),
        (lambda: add_to(3, torch.zeros(2), None, 1), "expected 3 values"),
        (lambda: add_to(3, torch.zeros(2), torch.arange(3), 1), "one shape"),
        (lambda: add_to(3, torch.zeros(3), torch.arange(3).int(), 1), "expected torch.int64"),
        (lambda: add_to(3, torch.zeros(3), None, 2**27), "overflow"),
        (
            lambda: ops.square_norms(
                torch.zeros(2, 4, 3), torch.zeros(3, 5, 3), torch.zeros(3).int(),
                torch.zeros(0).int(),
            ),
            "expected dy",
        ),
        (lambda: ops.square_norms(*torch.zeros(2, 3), *torch.zeros(2, 1).int()), "dy"),
        (
            lambda: ops.kd_loss(*torch.zeros(2, 1, 3), torch.zeros(2).long(), 0.5, 1.0),
            "labels",
        ),
        (
            lambda: ops.kd_loss(*torch.zeros(2, 1, 3), torch.zeros(1).long(), 0.5, 0.0),
            "temperature > 0",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SparseModelError, match=message):
        call()
