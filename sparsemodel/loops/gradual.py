"""Pruning while a network trains: its mask shrinks step by step, and may exchange weights.

Gradual magnitude pruning (`gmp`), the same in the middle half of a run (`journey`), and GraNet,
which grows weights again after each step (`granet`). They are one loop with three plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from sparsemodel.errors import DensityError, MaskError
from sparsemodel.loops.hold import HeldMask, masked_weights
from sparsemodel.masks.distribution import global_ranking
from sparsemodel.masks.mask import Mask, mask_from_scores, num_not_zero, prunable_parameters
from sparsemodel.masks.schedule import GradualPlan, adjustment_counts


def gmp(
    density: float, *, start: int, end: int, every: int = 100, within: str = "layer"
) -> GradualPlan:
    """Gradual magnitude pruning along a cubic.

    Source: Zhu and Gupta, To prune, or not to prune (2017), equation 1; a layer's density is
    the schedule's. "all" is one threshold for all layers.
    """
    return GradualPlan(density, start, end, every, within)


def journey(density: float, *, steps: int, every: int = 100, within: str = "layer") -> GradualPlan:
    """`gmp` from 25 to 75 % of a run of so many steps.

    It is compared with a dense network of `GradualPruner.average_parameters`.
    Source: Jin et al., The Journey Matters (ICLR 2025). Departs from it in that the window is of
    steps: theirs is of compute, and a sparse step that costs less takes less of that.
    """
    return GradualPlan(density, steps // 4, max(1, 3 * steps // 4), every, within)


def granet(
    density: float,
    *,
    start: int,
    end: int,
    every: int = 100,
    regeneration: tuple[float, float] = (0.5, 0.005),
) -> GradualPlan:
    """One threshold for all layers along a cubic, and weights exchanged after each change.

    In each layer the smallest active weights are dropped, and as many grow where the last step's
    gradient is largest among the weights that are zero then, dropped ones included. From a mask of
    the final density it is RigL. Never more are exchanged than were pruned before, so a dense layer
    stays as it is.
    Source: Liu et al., Sparse Training via Boosting Pruning Plasticity with Neuroregeneration
    (NeurIPS 2021); Evci et al., Rigging the Lottery (ICML 2020). Departs from the first in that
    counts are exact whatever magnitudes or gradients are equal, zeros too.
    """
    return GradualPlan(density, start, end, every, "all", regeneration)


class GradualPruner:
    """A mask over a plain dense network in training, which changes by a plan.

    Call `step` after each step of the optimisers. In between, pruned weights get no update and are
    exactly zero (see `HeldMask`); when a weight is pruned, what the optimisers remember of it
    becomes zero, and a weight that grows starts at zero. Without regeneration a pruned weight stays
    pruned. The network stays dense in memory; `sparsify` it with `mask` when training is over.

    To go on from a checkpoint, read network and optimisers, make the pruner as before, then
    `load_state_dict`: the weights are those of a run in one go.

    Args:
        model: as `HeldMask` takes it.
        optimizers: those that step on the weights.
        plan: `gmp`, `journey` or `granet`.
        mask: to begin with, of `plan.density` or more (in each layer, where those are ranked by
            themselves); None: all of `prunable_parameters` are active.

    Raises:
        MaskError: the mask does not fit the model, has a layer without active weights, or begins
            below the plan's density; or weights are to grow in one of several processes, whose
            gradients differ.
        DensityError: the plan's density is too low for one weight in every layer.

    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> pruner = GradualPruner(model, optimizer, plan=gmp(0.25, start=0, end=3, every=1))
    >>> for _ in range(3):
    ...     model(torch.ones(1, 4)).sum().backward()
    ...     optimizer.step()
    ...     pruner.step()
    ...     print(pruner.mask.num_active)
    4
    2
    2
    """

    def __init__(
        self, model: nn.Module, *optimizers: Optimizer, plan: GradualPlan, mask: Mask | None = None
    ) -> None:
        if mask is None:
            weights = prunable_parameters(model)
            mask = Mask({n: torch.ones(w.shape, dtype=torch.bool) for n, w in weights.items()})
        self.plan, self.mask, self.num_steps = plan, mask, 0
        self._model, self._optimizers = model, optimizers
        self._weights = masked_weights(model, mask)
        self._num_others = sum(p.numel() for p in model.parameters()) - mask.num_weights
        self._num_trained = 0
        self._initial = mask.counts()
        self._check_start()
        # Made before the mask is held, so that they see gradients before it takes them.
        self._gradients = _Gradients(self._weights if max(plan.regeneration) > 0 else {})
        self._gradients.wanted = plan.changes_after(1)
        self._held = HeldMask(model, mask, *optimizers)

    @property
    def average_parameters(self) -> float:
        """The network's parameters but for pruned ones, averaged over the steps so far."""
        return self._num_others + self._num_trained / max(1, self.num_steps)

    def step(self) -> None:
        """Call after each step of the optimisers.

        Raises:
            MaskError: a weight, or a gradient that growth goes by, is NaN.
        """
        self.num_steps += 1
        self._num_trained += self.mask.num_active
        if self.plan.changes_after(self.num_steps):
            self._change()
        self._gradients.seen.clear()
        self._gradients.wanted = self.plan.changes_after(self.num_steps + 1)

    def release(self) -> None:
        """Remove the hooks; the weights stay as they are."""
        self._held.release()
        self._gradients.release()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from; ask between steps."""
        return {
            "plan": asdict(self.plan),
            "num_steps": self.num_steps,
            "num_trained": self._num_trained,
            "initial": dict(self._initial),
            "mask": dict(self.mask),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; network and optimisers have been read before.

        Raises:
            MaskError: the state is of another plan or other layers, or the network's weights are
                not zero where the mask prunes.
        """
        if state["plan"] != asdict(self.plan):
            raise MaskError(f"the state is of the plan {state['plan']}, not {asdict(self.plan)}")
        mask = Mask(state["mask"])
        if mask.shapes() != self.mask.shapes():
            raise MaskError(f"the state is of {mask.shapes()}, the pruner of {self.mask.shapes()}")
        if count := sum(num_not_zero(mask, self._weights).values()):
            raise MaskError(
                f"{count} weights are not zero that the state's mask prunes: read the network of "
                "the same checkpoint first"
            )
        self.num_steps, self._num_trained = state["num_steps"], state["num_trained"]
        self._initial = dict(state["initial"])
        self._gradients.wanted = self.plan.changes_after(self.num_steps + 1)
        self._hold(mask)

    def _check_start(self) -> None:
        counts, final = self.mask.counts(), self.plan.density
        if empty := [name for name, count in counts.items() if count == 0]:
            raise MaskError(f"the first mask has no active weight in {empty[:4]}")
        parts = {name: (count, self.mask[name].numel()) for name, count in counts.items()}
        if self.plan.within == "all":
            num_weights = self.mask.num_weights
            if round(final * num_weights) < len(counts):
                raise DensityError(
                    f"density {final:g} keeps {round(final * num_weights)} of {num_weights} "
                    f"weights, fewer than the {len(counts)} layers"
                )
            parts = {"all layers": (self.mask.num_active, num_weights)}
        for name, (count, size) in parts.items():
            if count < round(final * size):
                raise MaskError(
                    f"the first mask's density of {name} is {count / size:g}, below the plan's "
                    f"{final:g}: gradual pruning adds no weights"
                )
        if max(self.plan.regeneration) > 0 and _num_processes() > 1:
            raise MaskError("weights grow by gradients of one process; train in a single one")

    @torch.no_grad()
    def _change(self) -> None:
        sizes = {
            name: weight.detach().abs().masked_fill(~self.mask[name].to(weight.device), -torch.inf)
            for name, weight in self._weights.items()
        }
        mask = mask_from_scores(sizes, self._counts(sizes))
        counts = mask.counts()
        if max(self.plan.regeneration) > 0:
            capacities = {name: size.numel() for name, size in sizes.items()}
            exchanged = adjustment_counts(
                counts, capacities, rate=self.plan.share_after(self.num_steps)
            )
            left = {name: count - exchanged[name] for name, count in counts.items()}
            mask = mask_from_scores(sizes, left)  # a part of the one before
            self._hold(mask)  # what is dropped becomes zero, and forgotten, though it may grow
            gains = {name: self._gain(name).masked_fill(mask[name], torch.inf) for name in mask}
            mask = mask_from_scores(gains, counts)
        self._hold(mask)

    def _counts(self, sizes: Mapping[str, Tensor]) -> dict[str, int]:
        """How many weights of each layer are active after this change, before any exchange."""
        if self.plan.within == "all":
            num_weights = self.mask.num_weights
            initial = sum(self._initial.values()) / num_weights
            return global_ranking(sizes, self.plan.density_after(self.num_steps, initial=initial))
        counts = {}
        for name, size in sizes.items():
            initial = self._initial[name] / size.numel()
            density = self.plan.density_after(self.num_steps, initial=initial)
            counts[name] = max(1, round(density * size.numel()))
        return counts

    def _gain(self, name: str) -> Tensor:
        """|gradient| of the last step, on the CPU; zero where the loss did not use the layer."""
        seen = self._gradients.seen.get(name)
        if seen is None:
            return torch.zeros(self.mask[name].shape)
        return seen.abs().cpu().clamp_(max=torch.finfo(seen.dtype).max)  # below the kept ones

    def _hold(self, mask: Mask) -> None:
        self._held.release()
        self.mask = mask
        self._held = HeldMask(self._model, mask, *self._optimizers)


class _Gradients:
    """Sums of weights' gradients of a step, as they are before those of pruned ones become zero.

    Attributes:
        wanted: whether to look at them.
        seen: name -> sum since it was cleared.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.wanted = False
        self.seen: dict[str, Tensor] = {}
        self._handles = [
            weight.register_hook(partial(self._add, name))
            for name, weight in weights.items()
            if weight.requires_grad
        ]

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, name: str, gradient: Tensor) -> None:
        if self.wanted:
            own, known = gradient.detach(), self.seen.get(name)
            self.seen[name] = own.clone() if known is None else known + own


def _num_processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1
