"""When and how much: step -> density or adjustment rate, and which block is adjusted.

A step is a round, an epoch or an iteration, counted from 0 by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparsemodel.errors import DensityError, MaskError, SparseModelError


def cubic(step: float, *, start: float, end: float, final: float, initial: float = 1.0) -> float:
    """The density of gradual pruning: fast at first, slowly towards `final`.

    final + (initial − final) (1 − (step − start) / (end − start))³ from `start` to `end`,
    `initial` before and `final` after. Sparsities along the same curve are one minus it. Source:
    Zhu and Gupta, To prune, or not to prune (2017), equation 1. Jin et al., The Journey Matters
    (ICLR 2025), prune from 25 to 75 % of a run; GraNet (Liu et al., NeurIPS 2021) regrows after
    each step.

    Raises:
        DensityError: a density outside (0, 1].
        SparseModelError: a negative step, or an end that is not after the start.

    >>> [round(cubic(step, start=0, end=10, final=0.1), 4) for step in (0, 1, 2, 10)]
    [1.0, 0.7561, 0.5608, 0.1]
    """
    return _falling(step, start, end, final, initial, power=3)


def linear(step: float, *, start: float, end: float, final: float, initial: float = 1.0) -> float:
    """As `cubic`, at the same pace from `start` to `end`.

    Raises:
        DensityError: a density outside (0, 1].
        SparseModelError: a negative step, or an end that is not after the start.

    >>> linear(5, start=0, end=10, final=0.5)
    0.75
    """
    return _falling(step, start, end, final, initial, power=1)


def average_density(
    schedule: Callable[[int], float], steps: int, *, of_compute: bool = False
) -> float:
    """The mean density of a run's steps, which says how many parameters it trained on average.

    Where a schedule counts compute (25 % of it, say), its steps are equal parts of that, and a
    part at density d trains for 1 / d as many steps: the mean is the harmonic one. Source of the
    mean as a model's size in scaling laws: Jin et al. (ICLR 2025), equation 2.

    Args:
        schedule: step in 0, 1, ..., steps − 1 -> density, in (0, 1].
        steps: of the run, at least 1.
        of_compute: whether the schedule's steps are equal parts of the run's compute.

    Raises:
        SparseModelError: no step.

    >>> average_density([1.0, 0.5].__getitem__, 2)
    0.75
    >>> round(average_density([1.0, 0.5].__getitem__, 2, of_compute=True), 4)
    0.6667
    """
    if steps < 1:
        raise SparseModelError(f"expected one step or more, got {steps}")
    densities = [schedule(step) for step in range(steps)]
    if of_compute:
        return steps / math.fsum(1 / density for density in densities)
    return math.fsum(densities) / steps


def cosine(step: float, *, value: float, end: float, lowest: float = 0.0) -> float:
    """From `value` at step 0 down half a cosine to `lowest` at `end`, and that after it.

    lowest + (value − lowest) / 2 · (1 + cos(π step / end)). FedTiny and RigL let the adjustment
    rate decay so, GraNet the share that it regenerates (from .5 to .005), and learning rates fall
    along it. A step may be a part of one.

    Raises:
        SparseModelError: a negative step, or an end below 1.

    >>> cosine(0, value=0.3, end=100), cosine(100, value=0.3, end=100)
    (0.3, 0.0)
    """
    if step < 0 or end < 1:
        raise SparseModelError(f"expected step >= 0 and end >= 1, got {step} and {end}")
    if step >= end:
        return lowest
    return lowest + (value - lowest) / 2.0 * (1.0 + math.cos(math.pi * step / end))


def adjustment_counts(
    counts: Mapping[str, int], capacities: Mapping[str, int], *, rate: float
) -> dict[str, int]:
    """How many weights of each layer one adjustment may exchange: ⌊rate · active⌋.

    Never more than the layer has pruned weights to grow.

    Args:
        counts: name -> number of active weights.
        capacities: name -> number of weights, active or pruned, at least for these names.
        rate: share of the active weights to exchange, in [0, 1].

    Raises:
        SparseModelError: a rate outside [0, 1], or a count outside [0, capacity].

    >>> adjustment_counts({"a": 10, "b": 10}, {"a": 100, "b": 12}, rate=0.3)
    {'a': 3, 'b': 2}
    """
    if not 0 <= rate <= 1:
        raise SparseModelError(f"an adjustment rate must be in [0, 1], got {rate}")
    for name, count in counts.items():
        if not 0 <= count <= capacities.get(name, -1):
            raise SparseModelError(
                f"{name!r}: {count} active weights do not fit its capacity {capacities.get(name)}"
            )
    return {
        name: min(math.floor(rate * count), capacities[name] - count)
        for name, count in counts.items()
    }


@dataclass(frozen=True)
class GradualPlan:
    """When a mask changes, to which density, and whether weights are exchanged.

    It changes after the optimiser's steps start + every, start + 2 every, ... and `end`.

    Attributes:
        density: from step `end` on, in (0, 1].
        start: the last step of the density that training began with, at least 0.
        end: a step after it.
        every: steps from one change to the next, at least 1.
        within: where magnitudes are ranked against each other: in each "layer", which all reach
            the density, or over "all" layers, which reach it together.
        regeneration: shares of a layer's active weights that are exchanged after each change, the
            first at `start`, falling along a cosine to the second at `end`; (0, 0): none.

    Raises:
        DensityError: a density outside (0, 1].
        MaskError: another value outside its range.
    """

    density: float
    start: int
    end: int
    every: int = 100
    within: str = "layer"
    regeneration: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:  # NaN fails both comparisons
            raise DensityError(f"density must be in (0, 1], got {self.density}")
        if not 0 <= self.start < self.end or self.every < 1:
            raise MaskError(
                f"expected 0 <= start < end and every >= 1, got start {self.start}, end {self.end} "
                f"and every {self.every}"
            )
        if self.within not in {"layer", "all"}:
            raise MaskError(f"within: expected 'layer' or 'all', got {self.within!r}")
        if not all(0 <= share <= 1 for share in self.regeneration):
            raise MaskError(f"shares of regeneration are in [0, 1], got {self.regeneration}")

    def changes_after(self, step: int) -> bool:
        """Whether the mask changes after so many steps of the optimiser."""
        is_in_turn = (step - self.start) % self.every == 0 or step == self.end
        return self.start < step <= self.end and is_in_turn

    def density_after(self, step: int, *, initial: float = 1.0) -> float:
        """The density after so many steps, constant between changes; a schedule."""
        last = step if step >= self.end else step - max(0, step - self.start) % self.every
        return cubic(last, start=self.start, end=self.end, final=self.density, initial=initial)

    def share_after(self, step: int) -> float:
        """Of a layer's active weights, which is exchanged in the change after so many steps."""
        first, last = self.regeneration
        return cosine(step - self.start, value=first, end=self.end - self.start, lowest=last)


def block_of_adjustment(adjustment: int, num_blocks: int) -> int:
    """The block that adjustment number 0, 1, ... works on: output to input, then round again.

    Adjustments are counted, not rounds: round % num_blocks would skip blocks for ever whenever
    the interval and the number of blocks share a divisor.

    Args:
        adjustment: number of adjustments done before this one.
        num_blocks: number of blocks, at least 1.

    Returns:
        Index of the block in [0, num_blocks), where 0 is nearest to the input.

    Raises:
        SparseModelError: a negative adjustment, or no block.

    >>> [block_of_adjustment(adjustment, 3) for adjustment in range(5)]
    [2, 1, 0, 2, 1]
    """
    if adjustment < 0 or num_blocks < 1:
        raise SparseModelError(
            f"expected adjustment >= 0 and num_blocks >= 1, got {adjustment} and {num_blocks}"
        )
    return num_blocks - 1 - adjustment % num_blocks


def _falling(
    step: float, start: float, end: float, final: float, initial: float, *, power: int
) -> float:
    if not (0 < initial <= 1 and 0 < final <= 1):  # NaN fails
        raise DensityError(f"densities must be in (0, 1], got {initial} and {final}")
    if not (step >= 0 and start < end):
        raise SparseModelError(
            f"expected step >= 0 and start < end, got step {step}, start {start} and end {end}"
        )
    if step >= end:
        return final
    if step <= start:
        return initial
    return final + (initial - final) * (1 - (step - start) / (end - start)) ** power
