"""What pruned weights gave on average, moved into the bias.

Source: An et al., FLAP: Fluctuation-based Adaptive Structured Pruning for Large Language Models
(AAAI 2024), section "Bias compensation".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsemodel.calibration.statistics import Moments
from sparsemodel.errors import CalibrationError, MaskError


def lost_output(weight: Tensor, pattern: Tensor, moments: Moments) -> Tensor:
    """The mean of what the pruned weights of a linear layer add to its output.

    Σ over pruned j of w_ij · mean(x_j), for each output i: the constant that, put in their place,
    leaves the smallest mean squared error. That error is the variance of what they added (of one
    pruned input Var(x_j) · Σ_i w_ij²), where without the constant it is the mean square.
    Departs from the paper, which prunes whole input channels, in that a pattern may be of single
    weights as well.

    Args:
        weight: [out, in], before anything was set to zero.
        pattern: True for what stays: bool [in], of whole inputs, or bool [out, in].
        moments: of the layer's inputs.

    Returns:
        [out], float64, on the weight's device.

    Raises:
        MaskError: a weight that is no matrix, or a pattern of another shape.
        CalibrationError: moments of another number of inputs, or of no data.

    >>> moments = Moments.of(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    >>> lost_output(torch.tensor([[5.0, 7.0]]), torch.tensor([True, False]), moments)
    tensor([14.], dtype=torch.float64)
    """
    pattern = full_pattern(weight, pattern)
    check_moments(weight, moments)
    # Filled, not multiplied: 0 * inf would leave a NaN behind.
    pruned = weight.detach().double().masked_fill(pattern, 0.0)
    return pruned @ moments.mean.to(weight.device)


@torch.no_grad()
def prune_into_bias(layer: nn.Linear, pattern: Tensor, moments: Moments) -> None:
    """Set the pruned weights of a linear layer to zero and add what they gave on average.

    A layer without a bias is given one, of the weight's type; formats that know of no bias there
    (a model whose configuration has none) lose it. Once more with the same pattern changes nothing.

    Args:
        layer: with its weights as they were before pruning; changed in place.
        pattern: True for what stays: bool [in], of whole inputs, or bool [out, in].
        moments: of its inputs, as `calibrate` collects them (kind INPUTS).

    Raises:
        MaskError: another class of layer, a parametrised one, or a pattern that does not fit.
        CalibrationError: moments of another number of inputs, or of no data.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> moments = Moments.of(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    >>> nn.init.ones_(layer.weight).tolist()
    [[1.0, 1.0]]
    >>> prune_into_bias(layer, torch.tensor([True, False]), moments)
    >>> layer.weight.tolist(), layer.bias.tolist()
    ([[1.0, 0.0]], [2.0])
    """
    if not isinstance(layer, nn.Linear) or parametrize.is_parametrized(layer):
        raise MaskError(
            f"expected a plain torch.nn.Linear, got a {type(layer).__name__}: merge "
            "parametrisations first, and exchange other classes for nn.Linear"
        )
    weight = layer.weight
    lost = lost_output(weight, pattern, moments)
    weight.masked_fill_(~full_pattern(weight, pattern), 0.0)
    if layer.bias is None:
        bias = nn.Parameter(lost.to(weight.dtype), requires_grad=weight.requires_grad)
        layer.register_parameter("bias", bias)
    else:
        layer.bias.copy_(layer.bias.double() + lost)


def full_pattern(weight: Tensor, pattern: Tensor) -> Tensor:
    """A pattern of inputs or of weights as one of weights, [out, in], on the weight's device.

    Raises:
        MaskError: a weight that is no matrix, or a pattern that is not bool or does not fit.
    """
    if weight.dim() != 2:
        raise MaskError(
            f"expected the weight [out, in] of a linear layer, got {tuple(weight.shape)}"
        )
    if pattern.dtype != torch.bool or tuple(pattern.shape) not in {
        tuple(weight.shape),
        (weight.shape[1],),
    }:
        raise MaskError(
            f"expected a bool pattern of shape {tuple(weight.shape)} or ({weight.shape[1]},), got "
            f"{pattern.dtype} of {tuple(pattern.shape)}"
        )
    return pattern.to(weight.device).expand(weight.shape)


def check_moments(weight: Tensor, moments: Moments) -> None:
    """Raise CalibrationError unless moments are of a weight's inputs, and of some data."""
    if moments.mean.numel() != weight.shape[1]:
        raise CalibrationError(
            f"the weight has {weight.shape[1]} inputs, the moments are of {moments.mean.numel()}: "
            "give those of this layer's inputs"
        )
    if not moments.count:
        raise CalibrationError("the moments have seen no data: calibrate on one batch or more")
