"""Sparse linear and convolution against torch's dense ones in float64, gradients included."""

# ruff: noqa: PLR0917 - hypothesis passes arguments by name

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch.nn import functional

from sparsemodel.errors import MaskError, SparseModelError
from sparsemodel.kernels.cpu import native
from sparsemodel.kernels.csr import csr_from_mask
from sparsemodel.kernels.functional import (
    SparseIndex,
    conv2d_topk_grad,
    linear_topk_grad,
    sparse_conv2d,
    sparse_linear,
)
from sparsemodel.kernels.geometry import ConvGeometry, is_batch_innermost, is_features_first

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@st.composite
def geometries(draw: st.DrawFn) -> ConvGeometry:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    small = st.integers(1, 3)
    return ConvGeometry(
        draw(small) * groups, draw(small) * groups, draw(small), draw(small), draw(small),
        draw(small), draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.integers(1, 2)),
        draw(st.integers(1, 2)), groups,
    )  # fmt: skip


def index_of(mask: Tensor, geometry: ConvGeometry) -> SparseIndex:
    return SparseIndex.build(*csr_from_mask(mask), geometry)


def random_mask(shape: tuple[int, ...], density: float, generator: torch.Generator) -> Tensor:
    """Random, and its first row is empty unless the mask is full."""
    mask = torch.rand(shape, generator=generator) < density
    if density < 1:
        mask[0] = False
    return mask


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same logical tensor [B, C, H, W], stored in another order."""
    if layout == "batch innermost":
        return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x


def assert_near(
    found: Tensor | None, expected: Tensor | None, *, terms: Tensor | None = None
) -> None:
    """Equal up to float32 rounding of sums of this size.

    A sum of thousands of `terms` that cancel is off by a part of their sizes, not of its own.
    """
    assert found is not None
    assert expected is not None
    atol = 2e-5 if terms is None else 2e-5 + 6e-8 * float(terms.abs().sum()) / len(found)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=atol)


LAYOUTS = st.sampled_from(["nchw", "batch innermost", "channels last", "strided"])
DENSITIES = st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0])


@settings(max_examples=150, deadline=None)
@given(
    g=geometries(),
    batch=st.sampled_from([1, 2, 5, 16, 33]),
    extra=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    density=DENSITIES,
    layout=LAYOUTS,
    bias=st.booleans(),
    dense=st.booleans(),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_conv2d_and_its_gradients_equal_the_dense_ones(
    g: ConvGeometry,
    batch: int,
    extra: tuple[int, int],
    density: float,
    layout: str,
    bias: bool,
    dense: bool,
    threads: int,
    seed: int,
) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    height = max(1, g.dilation_h * (g.kernel_h - 1) + 1 - 2 * g.padding_h) + extra[0]
    width = max(1, g.dilation_w * (g.kernel_w - 1) + 1 - 2 * g.padding_w) + extra[1]
    mask = random_mask(g.weight_shape, density, generator)
    weight = (torch.randn(g.weight_shape, generator=generator) * mask).requires_grad_()
    offsets = torch.randn(g.out_channels, generator=generator).requires_grad_() if bias else None
    x = torch.randn(batch, g.in_channels, height, width, generator=generator)

    wide_x, wide_w = (t.detach().double().requires_grad_() for t in (x, weight))
    wide_b = None if offsets is None else offsets.detach().double().requires_grad_()
    expected = functional.conv2d(wide_x, wide_w, wide_b, g.stride, g.padding, g.dilation, g.groups)
    dy = torch.randn(expected.shape, generator=generator)
    expected.backward(dy.double())

    x = in_layout(x, layout).detach().requires_grad_()
    values = weight.detach()[mask].requires_grad_()
    y = sparse_conv2d(x, values, offsets, index_of(mask, g), g, dense=dense)
    y.backward(in_layout(dy, layout))
    assert_near(y, expected)
    assert_near(x.grad, wide_x.grad)
    assert wide_w.grad is not None
    assert_near(values.grad, wide_w.grad[mask])
    if offsets is not None:
        assert wide_b is not None
        assert_near(offsets.grad, wide_b.grad, terms=dy)
    if native.loaded() and not dense:
        assert is_batch_innermost(y)
        assert x.grad is not None


# Rows that fill pages are where packed planes would lie further apart.
@example([1024], (24, 40), 0.3, False, True, False, 1, 0)
@example([2, 8, 64], (24, 40), 0.3, True, False, False, 2, 0)
@settings(max_examples=100, deadline=None)
@given(
    leading=st.lists(st.integers(1, 5), max_size=3),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    density=DENSITIES,
    features_first=st.booleans(),
    bias=st.booleans(),
    dense=st.booleans(),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_linear_and_its_gradients_equal_the_dense_ones(
    leading: list[int],
    widths: tuple[int, int],
    density: float,
    features_first: bool,
    bias: bool,
    dense: bool,
    threads: int,
    seed: int,
) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    width_out, width_in = widths
    mask = random_mask(widths, density, generator)
    weight = torch.randn(widths, generator=generator) * mask
    offsets = torch.randn(width_out, generator=generator).requires_grad_() if bias else None
    x = torch.randn(*leading, width_in, generator=generator)
    dy = torch.randn(*leading, width_out, generator=generator)

    wide_x, wide_w = (t.double().requires_grad_() for t in (x, weight))
    wide_b = None if offsets is None else offsets.detach().double().requires_grad_()
    expected = functional.linear(wide_x, wide_w, wide_b)
    expected.backward(dy.double())

    if features_first:
        x = x.movedim(-1, 0).contiguous().movedim(0, -1)
    x.requires_grad_()
    values = weight[mask].requires_grad_()
    g = ConvGeometry(width_out, width_in, 1, 1)
    y = sparse_linear(x, values, offsets, index_of(mask, g), g, dense=dense)
    y.backward(dy)
    assert_near(y, expected)
    assert_near(x.grad, wide_x.grad)
    assert wide_w.grad is not None
    assert_near(values.grad, wide_w.grad[mask])
    if offsets is not None:
        assert wide_b is not None
        assert_near(offsets.grad, wide_b.grad, terms=dy)
    if native.loaded() and not dense:
        assert is_features_first(y)


def test_a_convolution_by_hand() -> None:
    """One 2×2 window, active at its first and last place with weights 2 and -1, on 0 … 8.

    Output (i, j) is 2 x(i, j) - x(i + 1, j + 1): 2·0 - 4, 2·1 - 5, 2·3 - 7, 2·4 - 8.
    """
    mask = torch.tensor([[[[True, False], [False, True]]]])
    g = ConvGeometry(1, 1, 2, 2)
    values = torch.tensor([2.0, -1.0], requires_grad=True)
    x = torch.arange(9.0).view(1, 1, 3, 3).requires_grad_()
    y = sparse_conv2d(x, values, None, index_of(mask, g), g)
    assert y.flatten().tolist() == [-4.0, -3.0, -1.0, 0.0]
    y.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0 + 1 + 3 + 4, 4.0 + 5 + 7 + 8]
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [2, 2, 0, 2, 1, -1, 0, -1, -1]


@settings(max_examples=100, deadline=None)
@given(
    g=geometries(),
    batch=st.sampled_from([1, 3, 17]),
    density=DENSITIES,
    k=st.integers(0, 40),
    wide=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_topk_of_a_convolution_equals_sorting_the_dense_gradient(
    g: ConvGeometry, batch: int, density: float, k: int, wide: bool, seed: int
) -> None:
    """Small whole numbers: gradients are exact and ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if wide else torch.float32
    size = [2 * d * n for d, n in zip(g.dilation, (g.kernel_h, g.kernel_w), strict=True)]
    mask = random_mask(g.weight_shape, density, generator)
    x = torch.randint(-2, 3, (batch, g.in_channels, *size), generator=generator).to(dtype)
    weight = torch.zeros(g.weight_shape, dtype=dtype, requires_grad=True)
    y = functional.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups)
    dy = torch.randint(-2, 3, y.shape, generator=generator).to(dtype)
    (gradient,) = torch.autograd.grad(y, weight, dy)
    found = conv2d_topk_grad(x, dy, index_of(mask, g), g, k)
    assert_topk(found, gradient, mask, k)


@settings(max_examples=60, deadline=None)
@given(
    widths=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    leading=st.lists(st.integers(1, 4), max_size=2),
    density=DENSITIES,
    k=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
def test_topk_of_a_linear_layer_equals_sorting_the_dense_gradient(
    widths: tuple[int, int], leading: list[int], density: float, k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(widths, density, generator)
    x = torch.randint(-2, 3, (*leading, widths[1]), generator=generator).float()
    dy = torch.randint(-2, 3, (*leading, widths[0]), generator=generator).float()
    gradient = dy.reshape(-1, widths[0]).t() @ x.reshape(-1, widths[1])
    g = ConvGeometry(*widths, 1, 1)
    assert_topk(linear_topk_grad(x, dy, index_of(mask, g), g, k), gradient, mask, k)


def assert_topk(found: tuple[Tensor, Tensor], gradient: Tensor, mask: Tensor, k: int) -> None:
    entries = [
        (i, value)
        for i, (value, active) in enumerate(
            zip(gradient.flatten().tolist(), mask.flatten().tolist(), strict=True)
        )
        if not active
    ]
    expected = sorted(sorted(entries, key=lambda e: (-abs(e[1]), e[0]))[:k])
    indices, values = found
    assert indices.dtype == torch.int64
    assert values.dtype == torch.float32
    assert list(zip(indices.tolist(), values.tolist(), strict=True)) == expected


def test_topk_refuses_nan() -> None:
    mask = torch.eye(3, dtype=torch.bool)
    g = ConvGeometry(3, 3, 1, 1)
    x, dy = torch.ones(2, 3), torch.full((2, 3), float("nan"))
    with pytest.raises(MaskError, match="has training diverged"):
        linear_topk_grad(x, dy, index_of(mask, g), g, 2)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck_of_conv2d_in_float64(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    g = ConvGeometry(4, 4, 3, 2, 2, 1, 1, 0, 1, 2, groups)
    mask = random_mask(g.weight_shape, 0.4, generator)
    index = index_of(mask, g)
    tensors = (
        torch.randn(2, 4, 5, 6, dtype=torch.float64, generator=generator),
        torch.randn(int(mask.sum()), dtype=torch.float64, generator=generator),
        torch.randn(4, dtype=torch.float64, generator=generator),
    )
    inputs = tuple(t.requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(lambda *a: sparse_conv2d(*a, index, g), inputs)


def test_gradcheck_of_linear_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = random_mask((5, 7), 0.4, generator)
    g = ConvGeometry(5, 7, 1, 1)
    index = index_of(mask, g)
    tensors = (
        torch.randn(2, 3, 7, dtype=torch.float64, generator=generator),
        torch.randn(int(mask.sum()), dtype=torch.float64, generator=generator),
        torch.randn(5, dtype=torch.float64, generator=generator),
    )
    inputs = tuple(t.requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(lambda *a: sparse_linear(*a, index, g), inputs)


def test_schemas_and_shape_rules_hold() -> None:
    """torch's own checks: no hidden aliasing, and fake tensors get the real shapes and strides."""
    if not native.loaded():
        pytest.skip("build the native library to check its operators")
    g = ConvGeometry(4, 3, 3, 3, 2, 1, 1, 1)
    mask = random_mask(g.weight_shape, 0.3, torch.Generator().manual_seed(0))
    row_ptr, cols, by_input, _ = index_of(mask, g)
    values, x, dy = torch.randn(len(cols)), torch.randn(5, 3, 6, 7), torch.randn(5, 4, 3, 7)
    flat_mask = random_mask((6, 8), 0.3, torch.Generator().manual_seed(1))
    rows, columns, by_width, _ = index_of(flat_mask, ConvGeometry(6, 8, 1, 1))
    v, a, b = torch.randn(len(columns)), torch.randn(5, 8), torch.randn(5, 6)
    operators = torch.ops.sparsemodel
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (operators.conv2d, (x, values, torch.randn(4), row_ptr, cols, g)),
        (operators.conv2d_topk_grad, (x, dy, row_ptr, cols, g, 5)),
        (operators.linear, (a, v, None, rows, columns)),
        (operators.linear_topk_grad, (a, b, rows, columns, 5)),
    ]
    for wanted in [(True, True, True), (True, False, False), (False, True, False)]:
        conv_index = (row_ptr, cols, by_input, g, (6, 7), wanted)
        calls.append((operators.conv2d_backward, (dy, x, values, *conv_index)))
        calls.append((operators.linear_backward, (b, a, v, rows, columns, by_width, 8, wanted)))
    for operator, arguments in calls:
        torch.library.opcheck(
            operator.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_frozen_values_and_inputs_get_no_gradient() -> None:
    g = ConvGeometry(2, 2, 1, 1)
    mask = torch.eye(2, dtype=torch.bool).view(2, 2, 1, 1)
    index = index_of(mask, g)
    x, bias = torch.ones(3, 2, 2, 2), torch.zeros(2, requires_grad=True)
    sparse_conv2d(x, torch.ones(2), bias, index, g).sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [12.0, 12.0]
    values = torch.ones(2, requires_grad=True)
    sparse_conv2d(x, values, None, index, g).sum().backward()
    assert x.grad is None
    assert values.grad is not None
    assert values.grad.tolist() == [12.0, 12.0]


def test_an_empty_batch_gives_zero_gradients() -> None:
    g = ConvGeometry(3, 3, 1, 1)
    index = index_of(torch.eye(3, dtype=torch.bool), g)
    values = torch.ones(3, requires_grad=True)
    y = sparse_linear(torch.empty(0, 3), values, None, index, g)
    assert y.shape == (0, 3)
    y.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 0.0, 0.0]


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    if not native.loaded():
        pytest.skip("build the native library to check its threads")
    g = ConvGeometry(32, 32, 3, 3, 1, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(g.weight_shape, 0.1, generator)
    index = index_of(mask, g)
    x = torch.randn(16, 32, 16, 16, generator=generator)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        inputs = [x.clone().requires_grad_(), torch.ones(int(mask.sum()), requires_grad=True)]
        y = sparse_conv2d(*inputs, None, index, g)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in inputs)])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_second_derivatives_are_refused() -> None:
    g = ConvGeometry(3, 3, 1, 1)
    index = index_of(torch.eye(3, dtype=torch.bool), g)
    x = torch.ones(2, 3, requires_grad=True)
    y = sparse_linear(x, torch.ones(3), None, index, g).square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_arguments_that_do_not_fit_are_named() -> None:
    g = ConvGeometry(2, 3, 3, 3)
    index = index_of(torch.ones(g.weight_shape, dtype=torch.bool), g)
    values = torch.ones(len(index.cols))
    with pytest.raises(SparseModelError, match=r"float64.*values torch\.float32"):
        sparse_conv2d(torch.ones(1, 3, 4, 4).double(), values, None, index, g)
    with pytest.raises(SparseModelError, match="on meta"):
        sparse_conv2d(torch.ones(1, 3, 4, 4, device="meta"), values, None, index, g)
    with pytest.raises(SparseModelError, match=r"expected a tensor \[B, 3, H, W\]"):
        sparse_conv2d(torch.ones(1, 2, 4, 4), values, None, index, g)
    x = torch.ones(1, 3, 4, 4)
    with pytest.raises(SparseModelError, match="expected 54 values"):
        sparse_conv2d(x, values[1:], None, index, g)
    with pytest.raises(SparseModelError, match=r"a bias of 2 torch\.float32 numbers"):
        sparse_conv2d(x, values, torch.ones(3), index, g)
    with pytest.raises(SparseModelError, match=r"expected a tensor \[B, 2, H, W\]"):
        conv2d_topk_grad(x, torch.ones(1, 3, 2, 2), index, g, 1)
    with pytest.raises(SparseModelError, match="3×3 window does not fit"):
        sparse_conv2d(torch.ones(1, 3, 2, 4), values, None, index, g)
