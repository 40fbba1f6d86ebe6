"""Ways to choose a given number of samples by their scores; `select` is the public door.

A policy takes scored samples, a count and a generator and returns int64 [count] positions among
them, none of them twice, or raises SelectionError: it never returns fewer. Equal scores are put
in an order that the generator draws first, so a seed decides them, and a larger count of a
ranking policy contains a smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from datapruning.errors import SelectionError


@dataclass(frozen=True, eq=False)
class Scored:
    """Samples to choose from.

    Attributes:
        scores: float64 [N], high = hard, worth keeping.
        confidence: float64 [N] in [0, 1], mean probability of the label in training, where the
            policy needs one.
    """

    scores: Tensor
    confidence: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, index: Tensor) -> Scored:
        """Those at some positions."""
        confidence = None if self.confidence is None else self.confidence[index]
        return Scored(self.scores[index], confidence)


Policy = Callable[..., Tensor]
"""(scored, count, generator, **options) -> int64 [count]."""


def hardest(scored: Scored, count: int, generator: torch.Generator) -> Tensor:
    """The highest scores."""
    return _ranked(-scored.scores, generator)[:count]


def easiest(scored: Scored, count: int, generator: torch.Generator) -> Tensor:
    """The lowest scores."""
    return _ranked(scored.scores, generator)[:count]


def moderate(scored: Scored, count: int, generator: torch.Generator) -> Tensor:
    """The scores nearest to the median (of an even number: the mean of the middle two).

    Source: Xia et al., Moderate Coreset (ICLR 2023).
    Departs from it: they take the distance to the class centre as the score, and a median for
    each class; here the score is any, and `groups=labels` gives a median for each class.
    """
    return _ranked(_from_the_median(scored.scores), generator)[:count]


def beta_cut(scored: Scored, count: int, generator: torch.Generator, *, cut: float = 0.1) -> Tensor:
    """The highest scores once the ⌊cut · N⌋ highest of all are dropped as likely mislabelled.

    Source: Zheng et al., Coverage-centric Coreset Selection (ICLR 2023), the cutoff β alone.
    """
    left = _without_hardest(scored, count, generator, cut=cut)
    return left[:count]


def coverage(
    scored: Scored,
    count: int,
    generator: torch.Generator,
    *,
    cut: float = 0.1,
    num_groups: int = 50,
) -> Tensor:
    """Random samples from groups of equal width over the range of scores, small groups first.

    The ⌊cut · N⌋ hardest are dropped, the range of the other scores is split into groups of
    equal width, and repeatedly the group with the fewest samples gives
    min(its size, ⌊still to take / groups left⌋), chosen uniformly.

    By hand: six groups of 0, 1, 2, 5, 8 and 9 samples are to give 14.
    0: min(0, ⌊14/6⌋ = 2) = 0, 14 to take; 1: min(1, ⌊14/5⌋ = 2) = 1, 13 to take;
    2: min(2, ⌊13/4⌋ = 3) = 2, 11 to take; 5: min(5, ⌊11/3⌋ = 3) = 3, 8 to take;
    8: min(8, ⌊8/2⌋ = 4) = 4, 4 to take; 9: min(9, 4) = 4.

    Source: Lin et al., Data-efficient Fine-tuning for LLM-based Recommendation (SIGIR 2024),
    coverage-enhanced selection, with its defaults (drop 10 %, 50 groups); the rule is the one
    of Zheng et al. (ICLR 2023).

    >>> group_budgets(torch.tensor([9, 0, 5, 1, 8, 2]), 14)
    tensor([4, 0, 3, 1, 4, 2])
    """
    if num_groups < 1:
        raise SelectionError(f"num_groups must be at least 1, got {num_groups}")
    left = _without_hardest(scored, count, generator, cut=cut)
    left = left[torch.randperm(len(left), generator=generator)]
    group = _equal_width_groups(scored.scores[left], num_groups)
    budgets = group_budgets(torch.bincount(group, minlength=num_groups), count)
    # Positions within their group, in the shuffled order: the first of each are its choice.
    by_group = torch.argsort(group, stable=True)
    sizes = torch.bincount(group, minlength=num_groups)
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    place = torch.arange(len(left)) - starts
    return left[by_group[place < budgets[group[by_group]]]]


def ccs(
    scored: Scored,
    count: int,
    generator: torch.Generator,
    *,
    cut: float | None = None,
    num_groups: int = 50,
) -> Tensor:
    """`coverage` with a cut that grows with the share removed, where none is given.

    The paper searches its cutoff β for each rate and score, and finds that it pays to drop more
    of the hardest the more is removed. Without `cut` a line stands in for the search: 0 where
    half or more is kept, rising to 0.3 at a tenth, and 0.3 below.

    Source: Zheng et al., Coverage-centric Coreset Selection for High Pruning Rates (ICLR 2023),
    algorithm 1.
    Departs from it: β by this rule of thumb instead of a search.
    """
    if cut is None:
        removed = 1 - count / len(scored)
        cut = 0.3 * min(1.0, max(0.0, (removed - 0.5) / 0.4))
    return coverage(scored, count, generator, cut=cut, num_groups=num_groups)


def dual_beta(
    scored: Scored,
    count: int,
    generator: torch.Generator,
    *,
    sharpness: float = 15.0,
    power: float = 4.0,
) -> Tensor:
    """Drawn without replacement with weights score · Beta(confidence; a, b).

    b = C (1 − m) (1 − r^c) and a = C + 1 − b, where r is the share removed, C the sharpness, c
    the power and m the mean confidence of the ten highest scores: around those samples where
    little is removed, moving to the confidently learned ones as r → 1. Samples of score 0 are
    never drawn; confidences are held inside (10⁻⁶, 1 − 10⁻⁶), where the density is finite.

    Source: Cho et al., Lightweight Dataset Pruning without Full Training via Example Difficulty
    and Prediction Uncertainty (ICML 2025), Beta sampling as in the authors' program
    (github.com/behaapyy/dual-pruning: a = 16 − b), C = 15 and c = 4 as for CIFAR-100.
    """
    if scored.confidence is None:
        raise SelectionError(
            "dual-beta needs the mean probability of each sample's label in training: score with "
            "dual (or dyn-unc, aum, forgetting, tdds), whose table has it, or give confidence="
        )
    if not bool(((scored.confidence >= 0) & (scored.confidence <= 1)).all()):
        raise SelectionError("confidence holds values outside [0, 1], or NaN")
    if sharpness <= 0 or power <= 0:
        raise SelectionError(f"sharpness and power must be positive, got {sharpness} and {power}")
    if (scored.scores < 0).any():
        raise SelectionError("dual-beta draws with weights: it needs scores of at least 0")
    mean = float(scored.confidence[torch.topk(scored.scores, min(10, len(scored))).indices].mean())
    b = sharpness * (1 - mean) * (1 - (1 - count / len(scored)) ** power)
    a = sharpness + 1 - b
    confidence = scored.confidence.clamp(1e-6, 1 - 1e-6)
    log_weight = (
        scored.scores.log() + (a - 1) * confidence.log() + (b - 1) * torch.log1p(-confidence)
    )
    drawable = int((log_weight > -math.inf).sum())
    if drawable < count:
        raise SelectionError(
            f"dual-beta can draw {drawable} samples of positive score; asked for {count}"
        )
    # The largest of log w + Gumbel noise are a draw without replacement with weights w.
    uniform = torch.rand(len(scored), generator=generator, dtype=torch.float64)
    return torch.topk(log_weight - (-uniform.log()).log(), count).indices


def random(scored: Scored, count: int, generator: torch.Generator) -> Tensor:
    """A uniform choice, whatever the scores: hard to beat below a third of the data."""
    return torch.randperm(len(scored), generator=generator)[:count]


POLICIES: dict[str, Policy] = {
    "hardest": hardest,
    "easiest": easiest,
    "moderate": moderate,
    "coverage": coverage,
    "ccs": ccs,
    "beta-cut": beta_cut,
    "dual-beta": dual_beta,
    "random": random,
}
"""Name -> policy; `select` takes "auto" besides, and any function of this form."""


def drawn_among_equals(policy: Policy, scored: Scored, chosen: Tensor) -> int:
    """How many of the chosen samples a ranking could not tell from one that was not chosen.

    Equal scores at the edge of what is kept are put in order by the generator: as many of the
    chosen samples might have been others. 0 for policies that draw whatever the scores, and for
    functions of the user's own.

    By hand: the three hardest of 9, 5, 5, 5, 1 are the 9 and two of the three fives: 2.

    >>> scored = Scored(torch.tensor([9.0, 5.0, 5.0, 5.0, 1.0]))
    >>> drawn_among_equals(hardest, scored, torch.tensor([0, 2, 3]))
    2
    """
    if policy not in (hardest, easiest, moderate, beta_cut):
        return 0
    keys = _from_the_median(scored.scores) if policy is moderate else scored.scores
    left = torch.ones(len(scored), dtype=torch.bool)
    left[chosen] = False
    return int(torch.isin(keys[chosen], keys[left]).sum())


def group_budgets(sizes: Tensor, count: int) -> Tensor:
    """How many each group gives by the rule of `coverage`, int64 of the shape of `sizes`.

    Exactly `count` in all where the groups hold as many. A group that is at least as large as
    those before it never leaves more for the later ones than they hold.
    """
    budgets = torch.zeros_like(sizes)
    for taken, group in enumerate(torch.argsort(sizes, stable=True).tolist()):
        budgets[group] = min(int(sizes[group]), count // (len(sizes) - taken))
        count -= int(budgets[group])
    return budgets


def _ranked(keys: Tensor, generator: torch.Generator) -> Tensor:
    """Positions by rising key, equal keys in an order drawn by the generator."""
    order = torch.randperm(len(keys), generator=generator)
    return order[torch.argsort(keys[order], stable=True)]


def _from_the_median(scores: Tensor) -> Tensor:
    """Distance of each score to the median, float64 [N]."""
    ordered, half = scores.sort().values, (len(scores) - 1) / 2
    median = (ordered[math.floor(half)] + ordered[math.ceil(half)]) / 2
    return (scores - median).abs()


def _without_hardest(
    scored: Scored, count: int, generator: torch.Generator, *, cut: float
) -> Tensor:
    """Positions by falling score, the ⌊cut · N⌋ hardest left out."""
    if not 0 <= cut < 1:
        raise SelectionError(f"cut must be a share in [0, 1), got {cut}")
    dropped = math.floor(cut * len(scored) + 1e-9)
    if len(scored) - dropped < count:
        raise SelectionError(
            f"{count} samples are asked for, but dropping the hardest {100 * cut:g} % of "
            f"{len(scored)} leaves {len(scored) - dropped}; lower `cut` or keep fewer"
        )
    return hardest(scored, len(scored), generator)[dropped:]


def _equal_width_groups(scores: Tensor, num_groups: int) -> Tensor:
    """Number of the group of each score, int64 [N]; the highest belongs to the last group."""
    low, high = scores.min(), scores.max()
    if low == high:
        return torch.zeros(len(scores), dtype=torch.int64)
    group = ((scores - low) / (high - low) * num_groups).floor().long()
    return group.clamp(max=num_groups - 1)
