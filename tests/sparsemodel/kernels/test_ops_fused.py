"""Fused batch norm, pools and layout changes against torch's own modules in float64."""

# ruff: noqa: PLR0917 - hypothesis passes arguments by name

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import nn

from sparsemodel.kernels.cpu import native
from sparsemodel.kernels.geometry import ConvGeometry, is_batch_innermost, is_features_first
from sparsemodel.kernels.layout import (
    as_stored,
    batch_innermost,
    channels_last,
    contiguous_nchw,
    features_first,
    for_dense_conv,
)
from sparsemodel.layers.norm_and_pool import (
    FusedAdaptiveAvgPool2d,
    FusedAvgPool2d,
    FusedBatchNorm2d,
    FusedMaxPool2d,
)

Tensor = torch.Tensor
SHAPES = st.tuples(
    st.sampled_from([1, 2, 7, 16, 33]), st.integers(1, 5), st.integers(1, 6), st.integers(2, 6)
)


def assert_near(found: Tensor | None, expected: Tensor | None, what: str) -> None:
    assert found is not None, what
    assert expected is not None, what
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=1e-5, atol=2e-5, msg=lambda m: f"{what}: {m}"
    )


def norm_of(channels: int, generator: torch.Generator, **options: object) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **options)  # type: ignore[arg-type]
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return norm


@settings(max_examples=100, deadline=None)
@given(
    shape=SHAPES,
    options=st.sampled_from(
        [
            {},
            {"momentum": 0.3},
            {"momentum": None},
            {"affine": False},
            {"eps": 0.1},
            {"track_running_stats": False},
        ]
    ),
    with_residual=st.booleans(),
    relu=st.booleans(),
    training=st.booleans(),
    layout=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_fused_batch_norm_equals_batch_norm_addition_and_relu(
    shape: tuple[int, int, int, int],
    options: dict[str, object],
    with_residual: bool,
    relu: bool,
    training: bool,
    layout: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    plain = norm_of(shape[1], generator, **options).train(training)
    fused = copy.deepcopy(plain)
    fused.__class__ = FusedBatchNorm2d
    plain.double()
    x = 3 * torch.randn(shape, generator=generator) + 5
    # Where the values of a channel nearly agree, float32 does not hold its gradients to 1e-5.
    assume(float(x.transpose(0, 1).flatten(1).std(1).min()) > 0.5)
    residual = torch.randn(shape, generator=generator) if with_residual else None
    wide = [None if t is None else t.double().requires_grad_() for t in (x, residual)]
    dy = torch.randn(shape, generator=generator)
    for step in range(2):
        expected = plain(wide[0])
        expected = expected if wide[1] is None else expected + wide[1]
        expected = torch.relu(expected) if relu else expected
        x1 = (batch_innermost(x) if layout else x).detach().requires_grad_()
        r1 = None if residual is None else residual.clone().requires_grad_()
        y = fused(x1, r1, relu)
        assert_near(y, expected, "output")
        # Where float32 and float64 disagree about the sign of a value near zero, gradients jump.
        gradient = dy.masked_fill(expected.abs() < 1e-4, 0.0)
        if step == 0:
            y.backward(gradient)
            expected.backward(gradient.double())
            assert wide[0] is not None
            assert_near(x1.grad, wide[0].grad, "gradient of the input")
            if r1 is not None and wide[1] is not None:
                assert_near(r1.grad, wide[1].grad, "gradient of the residual")
            for (name, found), wanted in zip(
                fused.named_parameters(), plain.parameters(), strict=True
            ):
                assert_near(found.grad, wanted.grad, name)
    for (name, found), wanted in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert_near(found, wanted, name)
    with torch.no_grad():
        plain.eval(), fused.eval()
        assert_near(fused(x), plain(x.double()), "evaluation")


def test_fused_batch_norm_keeps_the_layout_and_refuses_one_value() -> None:
    norm = FusedBatchNorm2d(3)
    if native.loaded():
        assert is_batch_innermost(norm(torch.randn(4, 3, 5, 5)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 3, 1, 1))
    with pytest.raises(RuntimeError):
        norm(torch.randn(2, 4, 5, 5))


def test_batch_norm_in_double_is_differentiable_in_eval_mode() -> None:
    norm = FusedBatchNorm2d(3).double().eval()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: norm(t, t * 2, True), (x,))


@settings(max_examples=100, deadline=None)
@given(
    shape=SHAPES,
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.none() | st.integers(1, 3),
    padded=st.booleans(),
    ceil=st.booleans(),
    include_pad=st.booleans(),
    layout=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_pools_equal_torchs(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    stride: int | None,
    padded: bool,
    ceil: bool,
    include_pad: bool,
    layout: bool,
    seed: int,
) -> None:
    """Whole numbers, so that windows have ties: the first of equals takes the gradient."""
    padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
    kernel = (min(kernel[0], shape[2]), min(kernel[1], shape[3]))
    padding = (min(padding[0], kernel[0] // 2), min(padding[1], kernel[1] // 2))
    x = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (
            FusedMaxPool2d(kernel, stride, padding, ceil_mode=ceil),
            nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil),
        ),
        (
            FusedAvgPool2d(kernel, stride, padding, ceil, include_pad),
            nn.AvgPool2d(kernel, stride, padding, ceil, include_pad),
        ),
        (FusedAdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(1)),
        (FusedAdaptiveAvgPool2d((2, 1)), nn.AdaptiveAvgPool2d((2, 1))),
    ]
    for fused, plain in pairs:
        x1 = (batch_innermost(x) if layout else x).detach().requires_grad_()
        x2 = x.double().requires_grad_()
        y, expected = fused(x1), plain(x2)
        dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed))
        y.backward(dy)
        expected.backward(dy.double())
        assert_near(y, expected, str(fused))
        assert_near(x1.grad, x2.grad, f"gradient of {fused}")


def test_pools_keep_the_layout_and_nan() -> None:
    if not native.loaded():
        pytest.skip("build the native library to check its pools")
    x = batch_innermost(torch.randn(4, 3, 6, 6))
    x[1, 2, 3, 3] = float("nan")
    for fused in (FusedMaxPool2d(2), FusedAvgPool2d(2), FusedAdaptiveAvgPool2d(1)):
        y = fused(x)
        assert is_batch_innermost(y)
        plain = type(fused).__mro__[1].forward(fused, x.contiguous())  # type: ignore[attr-defined]
        assert torch.equal(y.isnan(), plain.isnan())
        assert int(y.isnan().sum()) == 1


def test_layouts_change_the_order_alone() -> None:
    stored = {
        batch_innermost: is_batch_innermost,
        contiguous_nchw: lambda t: t.is_contiguous(),
        channels_last: lambda t: t.is_contiguous(memory_format=torch.channels_last),
    }
    for shape in [(1, 1, 1, 1), (5, 3, 4, 2), (33, 17, 3, 5), (0, 2, 3, 3), (16, 32, 5, 1)]:
        x = torch.randn(shape)
        for source in (*(move(x) for move in stored), x.double(), x.flip(0), x.mT):
            for move, is_stored in stored.items():
                moved = move(source)
                assert torch.equal(moved, source)
                assert is_stored(moved)
                assert move(moved) is moved


def test_a_dense_convolution_gets_the_layout_that_pays() -> None:
    """Channels last where activations outweigh weights; what is there already stays."""
    few, many = (ConvGeometry(out, 64, 3, 3, 1, 1, 1, 1) for out in (8, 2048))
    x = torch.randn(8, 64, 32, 32)
    innermost, last = batch_innermost(x), channels_last(x)
    assert for_dense_conv(x, few).is_contiguous(), "too small to move"
    assert for_dense_conv(last, many) is last
    assert for_dense_conv(innermost, many).is_contiguous()
    assert for_dense_conv(innermost, few).is_contiguous(memory_format=torch.channels_last)
    large = torch.randn(16, 64, 32, 32)
    assert for_dense_conv(large, few).is_contiguous(memory_format=torch.channels_last)
    assert as_stored(innermost, x).is_contiguous()
    assert as_stored(innermost, last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry(8, 64, 3, 3, 1, 1, 1, 1, 2, 2),
        ConvGeometry(8, 64, 3, 3, 1, 1, 3, 3),
        ConvGeometry(8, 64, 40, 3, 1, 1, 20, 1),
        ConvGeometry(16, 15, 1, 1, 2, 2),
        ConvGeometry(16, 8, 1, 1, 2, 1),
    ],
)
def test_windows_that_torch_crashes_on_channels_last_get_plain_strides(
    geometry: ConvGeometry,
) -> None:
    x = channels_last(torch.randn(8, geometry.in_channels, 32, 32))
    assert for_dense_conv(x, geometry).is_contiguous()
    one = torch.randn(5, 1, 4, 4).to(memory_format=torch.channels_last)
    assert for_dense_conv(one, ConvGeometry(2, 1, 3, 3)).stride() == (16, 16, 4, 1)


def test_features_first_changes_the_order_alone() -> None:
    for lead in [(), (4,), (3, 1, 5)]:
        x = torch.randn(*lead, 7)
        moved = features_first(x)
        assert torch.equal(moved, x)
        assert is_features_first(moved)
        assert features_first(moved) is moved
