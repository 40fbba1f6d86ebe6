"""The sums of `runtime.fixed_sum` on torch tensors, on any device: the same bits."""
# ruff: noqa: PLR0917 - arrays by position, in the order of the operator

from __future__ import annotations

import torch

from sparsemodel.runtime.fixed_sum import (
    HIGH_BITS,
    LOW_BITS,
    MAX_ABSOLUTE_VALUE,
    MAX_TOTAL_WEIGHT,
)

__all__ = ["MAX_ABSOLUTE_VALUE", "MAX_TOTAL_WEIGHT", "add", "value"]

Tensor = torch.Tensor


def add(
    high: Tensor,
    low: Tensor,
    values: Tensor,
    means: Tensor | None,
    positions: Tensor | None,
    weight: int,
    refused: Tensor,
) -> None:
    """Add weight · (values + means²), in place; a call with -weight takes that back exactly.

    Args:
        high, low: int64, contiguous, of one size.
        values: floating, of as many entries [n].
        means: of the values' shape; None adds the values alone.
        positions: int64 [n], ascending: where in `high` and `low` each value goes. None: all.
        refused: int64 [2], counts what is left out: values that are not finite or of magnitude
            2²⁰ or more, and positions out of range or not above the one before.
    """
    x = values.reshape(-1).double()
    if means is not None:
        x = x + means.reshape(-1).double() ** 2
    fits = x.abs() < MAX_ABSOLUTE_VALUE
    refused[0] += (~fits).sum()
    x = torch.where(fits, x, 0.0).mul_(2.0**HIGH_BITS)
    whole = x.floor()
    # The rest is below 1 and exact; rounding it up to 2^36 is allowed and still adds up.
    rest = x.sub_(whole).mul_(2.0**LOW_BITS).round_()
    parts = whole.long(), rest.long()
    if positions is None:
        for total, part in zip((high, low), parts, strict=True):
            total.view(-1).add_(part, alpha=weight)
        return
    good = (positions >= 0) & (positions < high.numel())
    good[1:] &= positions.diff() > 0
    refused[1] += (~good).sum()
    for total, part in zip((high, low), parts, strict=True):
        total.view(-1).index_add_(0, positions[good], part[good], alpha=weight)


def value(high: Tensor, low: Tensor, total_weight: int) -> Tensor:
    """The mean that sums of this weight hold: float64."""
    # A tensor, because by a plain number torch multiplies with its reciprocal on a GPU.
    divisor = torch.full((), total_weight, dtype=torch.float64, device=high.device)
    sums = high.double() / 2**HIGH_BITS + low.double() / 2.0 ** (HIGH_BITS + LOW_BITS)
    mean: Tensor = sums / divisor
    return mean
