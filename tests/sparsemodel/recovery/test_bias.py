"""Bias instead of pruned weights: what is left of the error, against closed forms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparsemodel.calibration.statistics import Moments
from sparsemodel.errors import CalibrationError, MaskError
from sparsemodel.recovery.bias import lost_output, prune_into_bias


def problem(seed: int = 0, *, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    """A layer of five inputs and three outputs, and 64 inputs with a mean, float64."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layer = nn.Linear(5, 3, bias=bias, dtype=torch.float64)
    spread = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1], dtype=torch.float64)
    return layer, 1.5 + spread * torch.randn(64, 5, generator=generator, dtype=torch.float64)


def without(width: int, *pruned: int) -> Tensor:
    pattern = torch.ones(width, dtype=torch.bool)
    pattern[list(pruned)] = False
    return pattern


def error(dense: nn.Linear, pruned: nn.Linear, inputs: Tensor) -> float:
    """Mean over tokens of the squared change, summed over outputs."""
    return (dense(inputs) - pruned(inputs)).square().sum(1).mean().item()


@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_channel_leaves_outputs_identical(*, bias: bool) -> None:
    """Whole numbers, so that no order of adding up rounds: bit for bit."""
    layer = nn.Linear(4, 3, bias=bias, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(-9, 9, (32, 4), generator=generator).double()
    inputs[:, 2] = 7.0
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-9, 9, parameter.shape, generator=generator))
    expected = layer(inputs)
    prune_into_bias(layer, without(4, 2), Moments.of(inputs))
    assert torch.equal(layer(inputs), expected)
    assert torch.equal(layer(torch.where(torch.arange(4) == 2, 1e6, inputs)), expected)
    assert layer.bias is not None
    assert layer.bias.requires_grad


@pytest.mark.parametrize("channel", range(5))
@pytest.mark.parametrize("bias", [True, False])
def test_error_is_the_variance_with_the_bias_and_the_mean_square_without(
    channel: int, *, bias: bool
) -> None:
    dense, inputs = problem(bias=bias)
    x, w = inputs[:, channel], dense.weight.detach()[:, channel]
    mended, cut = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_into_bias(mended, without(5, channel), Moments.of(inputs))
    cut.weight.data[:, channel] = 0.0
    squares = w.square().sum().item()
    variance = x.var(unbiased=False).item()
    assert error(dense, mended, inputs) == pytest.approx(variance * squares, rel=1e-12)
    assert error(dense, cut, inputs) == pytest.approx(x.square().mean().item() * squares, rel=1e-12)
    assert error(dense, mended, inputs) < error(dense, cut, inputs)


def test_no_other_constant_is_better() -> None:
    dense, inputs = problem()
    pattern = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    prune_into_bias(mended := copy.deepcopy(dense), pattern, Moments.of(inputs))
    best = error(dense, mended, inputs)
    centred = inputs - inputs.mean(0)
    pruned = dense.weight.detach().masked_fill(pattern, 0.0)
    expected = (centred @ pruned.T).square().sum(1).mean().item()  # wᵀ Cov w, by rows
    assert best == pytest.approx(expected, rel=1e-12)
    for row in range(3):
        for step in (-1e-3, 1e-3):
            mended.bias.data[row] += step
            assert error(dense, mended, inputs) > best
            mended.bias.data[row] -= step


def test_single_weights_go_by_their_rows() -> None:
    """Row 0 loses 2 · 10, row 1 loses 4 · 20 and row 2 nothing."""
    weight = torch.tensor([[2.0, 3.0], [5.0, 4.0], [1.0, 1.0]])
    pattern = torch.tensor([[False, True], [True, False], [True, True]])
    moments = Moments.of(torch.tensor([[9.0, 25.0], [11.0, 15.0]]))
    assert lost_output(weight, pattern, moments).tolist() == [20.0, 80.0, 0.0]
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    for _ in range(2):  # the second time nothing is left to be moved
        prune_into_bias(layer, pattern, moments)
        assert layer.bias.tolist() == [21.0, 82.0, 3.0]
        assert torch.equal(layer.weight, weight * pattern)


def test_columns_are_patterns_of_equal_rows() -> None:
    layer, inputs = problem()
    columns, moments = without(5, 0, 3), Moments.of(inputs)
    whole = columns.expand(3, 5).clone()
    found = lost_output(layer.weight, columns, moments)
    assert torch.equal(found, lost_output(layer.weight, whole, moments))
    expected = layer.weight.detach()[:, [0, 3]] @ inputs.mean(0)[[0, 3]]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_infinite_weights_that_stay_do_no_harm() -> None:
    weight = torch.tensor([[torch.inf, 1.0]])
    found = lost_output(weight, without(2, 1), Moments.of(torch.tensor([[0.0, 3.0]])))
    assert found.tolist() == [3.0]


def test_half_precision_and_frozen_layers_keep_their_kind() -> None:
    layer = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    prune_into_bias(layer, without(2, 0), Moments.of(torch.ones(3, 2)))
    assert layer.bias.dtype is torch.bfloat16
    assert not layer.bias.requires_grad


def test_what_does_not_fit_is_refused() -> None:
    layer, inputs = problem()
    moments, columns = Moments.of(inputs), without(5, 1)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(CalibrationError, match="has 5 inputs, the moments are of 4"):
        prune_into_bias(layer, columns, Moments.of(inputs[:, :4]))
    with pytest.raises(CalibrationError, match="seen no data"):
        prune_into_bias(layer, columns, Moments.of(inputs[:0]))
    with pytest.raises(MaskError, match=r"pattern of shape \(3, 5\) or \(5,\), got torch.bool"):
        prune_into_bias(layer, columns[:3], moments)
    with pytest.raises(MaskError, match=r"got torch.float32"):
        prune_into_bias(layer, columns.float(), moments)
    with pytest.raises(MaskError, match="got a Conv2d"):
        prune_into_bias(nn.Conv2d(1, 1, 1), columns, moments)  # type: ignore[arg-type]
    with pytest.raises(MaskError, match=r"expected the weight \[out, in\]"):
        lost_output(torch.zeros(5), columns, moments)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(MaskError, match="got a ParametrizedLinear"):
        prune_into_bias(layer, columns, moments)
