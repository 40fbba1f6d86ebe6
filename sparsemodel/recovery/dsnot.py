"""DSnoT: a better mask for the same weights, by swaps that need no gradients.

Source: Zhang et al., Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs
(ICLR 2024), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemodel.calibration.statistics import Moments
from sparsemodel.errors import MaskError
from sparsemodel.recovery.bias import check_moments, full_pattern


@torch.no_grad()
def dsnot(
    weight: Tensor,
    pattern: Tensor,
    moments: Moments,
    *,
    max_cycles: int = 50,
    threshold: float = 0.1 / 2048,
    gamma: float = 1.0,
    m: int | None = None,
) -> Tensor:
    """A pattern under which the mean output of each row comes closer to the dense one.

    Of one row, with the mean inputs x̄: ε = Σ over pruned j of w_j x̄_j is what the mean output
    lacks. While |ε| > threshold, the pruned weight with the largest w x̄ / Var(x)^γ of ε's sign is
    grown, and of the active weights whose w x̄ has the other sign that with the smallest
    |w| ‖x‖ (Wanda's score) is pruned; both bring ε nearer to zero. The row is done as well when
    one of the two is missing, or when ε would pass zero. A weight changes once at most. So the
    active weights of every row stay as many as they were, and no |ε| grows.

    Departs from the published code as follows. Its guard against passing zero is off by default
    where there are no groups, and without it rows can lose or gain weights; here it is always on,
    and ε may become exactly zero. Its variance is averaged over batches; this one is of all tokens.
    Its ε is of the inputs' sum over a sequence: its threshold of 0.1 with 2,048 tokens is one of
    0.1 / 2048 of a mean output, the default here. For n:m patterns it prunes whatever
    scores lowest in the group of the grown weight, which can make ε grow; here the same two rules
    hold inside the group, and a pruned weight without a partner there is passed over.

    Args:
        weight: [out, in], dense: pruned weights with their values.
        pattern: bool [out, in], True for active weights.
        moments: of the layer's inputs.
        max_cycles: swaps in a row at most.
        threshold: of |ε|, in units of the layer's output.
        gamma: γ, how much an input that fluctuates is distrusted; 0 for not at all.
        m: weights are swapped inside groups of m neighbours of a row alone, as an n:m pattern
            asks; None: inside rows.

    Returns:
        The new pattern, bool [out, in], on the weight's device.

    Raises:
        MaskError: shapes that do not fit, rows that are no multiple of m, weights or moments that
            are not finite, or a negative number.
        CalibrationError: moments of another number of inputs, or of no data.

    >>> weight = torch.tensor([[1.0, 2.0, -1.0, 4.0]])
    >>> moments = Moments.of(torch.tensor([[0.5, 1.5, 1.0, 1.0], [1.5, 0.5, 1.0, 1.0]]))
    >>> dsnot(weight, torch.tensor([[False, False, True, True]]), moments)
    tensor([[False,  True, False,  True]])
    """
    rows, width = weight.shape if weight.dim() == 2 else (0, 0)
    pattern = full_pattern(weight, pattern)
    check_moments(weight, moments)
    group = width if m is None else m
    if group < 1 or width % group:
        raise MaskError(f"groups of {m} need rows of a multiple of {m} weights, these have {width}")
    if max_cycles < 0 or not threshold >= 0 or not gamma >= 0:
        raise MaskError(
            "expected max_cycles, threshold and gamma >= 0, got "
            f"{max_cycles}, {threshold} and {gamma}"
        )
    dense = weight.detach().double()
    mean, variance, norms = (
        one.to(dense.device) for one in (moments.mean, moments.variance, moments.norms)
    )
    effects = dense * mean
    if not torch.isfinite(effects).all() or not torch.isfinite(norms).all():
        raise MaskError("weights or moments hold NaN or infinity: no order can be made of them")
    error = effects.masked_fill(pattern, 0.0).sum(1)
    # From here on every row is looked at as if its ε were positive.
    effects *= error.sign().unsqueeze(1)
    error = error.abs()
    growth = (effects / variance**gamma).masked_fill(pattern | (effects <= 0), -torch.inf)
    scores = (dense.abs() * norms).masked_fill(~pattern | (effects >= 0), torch.inf)

    refined, is_open = pattern.clone(), torch.ones_like(error, dtype=torch.bool)
    for _ in range(max_cycles):
        lowest, place = scores.view(rows, -1, group).min(2)
        with_partner = growth.view(rows, -1, group).masked_fill(
            torch.isinf(lowest).unsqueeze(2), -torch.inf
        )
        best, grown = with_partner.view(rows, width).max(1, keepdim=True)
        chosen = grown // group
        pruned = chosen * group + place.gather(1, chosen)
        after = error + (effects.gather(1, pruned) - effects.gather(1, grown)).squeeze(1)
        is_open &= (best.squeeze(1) > -torch.inf) & (error > threshold) & (after >= 0)
        if not is_open.any():
            break
        swapped = is_open.nonzero().squeeze(1)
        grown, pruned = grown[swapped, 0], pruned[swapped, 0]
        refined[swapped, grown], refined[swapped, pruned] = True, False
        growth[swapped, grown], scores[swapped, pruned] = -torch.inf, torch.inf
        error = torch.where(is_open, after, error)
    return refined
