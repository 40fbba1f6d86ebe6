"""What a pruned network has to beat: the same network trained in other ways, or under other masks.

Source: Liu et al., Rethinking the Value of Network Pruning (ICLR 2019), section 3: a pruned network
that is trained from scratch, as long as the dense one (Scratch-E) or for the same computation
(Scratch-B), often is as good as one that keeps its weights and is fine-tuned.

| control | starts from | under | steps |
| --- | --- | --- | --- |
| fine-tuned | the trained weights | the mask | fine-tuning |
| scratch-e | new weights | the mask | the dense network's |
| scratch-b | new weights | the mask | those, times what a step costs less, to a cap |
| rewound | the first weights of the dense network | the mask | the dense network's |
| random | the trained weights | a random mask, as many weights in each layer | fine-tuning |
| reversed | the trained weights | the lowest scores, as many in each layer | fine-tuning |
| dense | the trained weights | no mask | fine-tuning |
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparsemodel.errors import ProtocolError
from sparsemodel.masks.mask import Mask, mask_from_scores, weights_under

Weights = Mapping[str, Tensor]
"""A model's state dict."""
Trained = TypeVar("Trained")
Train = Callable[[nn.Module, Mask | None, int], Trained]
"""(model, which it may change; its mask, which has been applied, or None; steps) -> trained model,
or what it scores."""


@dataclass(frozen=True)
class Budget:
    """How long the networks train, in optimiser steps.

    Attributes:
        steps: that the dense network was trained, and Scratch-E is.
        fine_tuning: of networks that keep trained weights.
        ratio: cost of a dense step over that of a pruned one (`cost_ratio`), 1 or more.
        cap: of Scratch-B's steps over `steps`; infinity for none.

    Raises:
        ProtocolError: a value out of range.
    """

    steps: int
    fine_tuning: int
    ratio: float = 1.0
    cap: float = 2.0

    def __post_init__(self) -> None:
        checks = {
            f"steps must be 1 or more, got {self.steps}": self.steps >= 1,
            f"fine_tuning must be 0 or more, got {self.fine_tuning}": self.fine_tuning >= 0,
            f"ratio must be 1 or more, got {self.ratio}": self.ratio >= 1,
            f"cap must be 1 or more, got {self.cap}": self.cap >= 1,
        }
        wrong = [text for text, holds in checks.items() if not holds]
        if self.ratio == self.cap == math.inf:
            wrong.append("an infinite ratio needs a finite cap")
        if wrong:
            raise ProtocolError(f"budget: {'; '.join(wrong)}")

    @property
    def scratch_b(self) -> int:
        """Steps of Scratch-B.

        >>> Budget(100, 10, ratio=1.5).scratch_b, Budget(100, 10, ratio=9.0).scratch_b
        (150, 200)
        """
        return round(self.steps * min(self.ratio, self.cap))


@dataclass(frozen=True)
class Control:
    """One network to train.

    Attributes:
        weights: that it starts from, before its mask is applied.
        mask: None: dense.
        steps: that it trains.
    """

    weights: Weights
    mask: Mask | None
    steps: int


def controls(
    model: nn.Module,
    mask: Mask,
    budget: Budget,
    *,
    scores: Mapping[str, Tensor] | None = None,
    first: Weights | None = None,
    fresh: Weights | None = None,
    seed: int = 0,
) -> dict[str, Control]:
    """The controls of a pruned network, in the order of the module's table; nothing is trained.

    A random mask ranks single weights, whatever the structure of `mask`; for channels or N:M groups
    add a `Control` under a random mask of that structure.

    Args:
        model: trained and dense; stays as it is.
        scores: that the mask was made of, high for keep; None: there is no reversed control.
        first: the state before the dense training; None: there is no rewound control.
        fresh: the state of an untrained network of another seed; None: `reinitialised`.
        seed: of new weights and the random mask.

    Raises:
        ProtocolError: a module that does not know how to start anew, with `fresh` None.
        MaskError: a mask or scores that do not fit.
    """
    weights_under(mask, model)
    trained = _copied(model.state_dict())
    new = _copied(reinitialised(model, seed=seed).state_dict() if fresh is None else fresh)
    found = {
        "fine-tuned": Control(trained, mask, budget.fine_tuning),
        "scratch-e": Control(new, mask, budget.steps),
        "scratch-b": Control(new, mask, budget.scratch_b),
    }
    if first is not None:
        found["rewound"] = Control(_copied(first), mask, budget.steps)
    found["random"] = Control(trained, random_mask(mask, seed=seed), budget.fine_tuning)
    if scores is not None:
        found["reversed"] = Control(trained, reversed_mask(mask, scores), budget.fine_tuning)
    return {**found, "dense": Control(trained, None, budget.fine_tuning)}


def train_controls(
    model: nn.Module, chosen: Mapping[str, Control], train: Train[Trained]
) -> dict[str, Trained]:
    """Train controls one after the other, each a copy of `model` with its weights under its mask.

    Returns:
        Name -> what `train` returned: a model, or a score where not all should be kept.
    """
    found = {}
    for name, control in chosen.items():
        network = copy.deepcopy(model)
        network.load_state_dict(control.weights)
        if control.mask is not None:
            control.mask.apply(network)
        found[name] = train(network, control.mask, control.steps)
    return found


def cost_ratio(macs: Mapping[str, int], mask: Mask) -> float:
    """Multiply-accumulates of the dense network over those of the active weights.

    Args:
        macs: of each weight when dense, as `sparsemodel.storage.cost.layer_macs` counts them.

    Returns:
        1 or more; infinity where nothing is left to compute.

    Raises:
        ProtocolError: the mask names a weight of unknown cost, or the dense network costs nothing.

    >>> cost_ratio({"a": 100, "b": 100}, Mask({"b": torch.tensor([True, False])}))
    1.3333333333333333
    """
    if missing := [name for name in mask if name not in macs]:
        raise ProtocolError(f"no multiply-accumulates of {missing}, which the mask names")
    counts, sizes = mask.counts(), {name: mask[name].numel() for name in mask}
    left = sum(
        cost * counts[name] / sizes[name] if name in counts else cost for name, cost in macs.items()
    )
    if not sum(macs.values()):
        raise ProtocolError("the dense network has no multiply-accumulates; was it called?")
    return sum(macs.values()) / left if left else math.inf


def random_mask(mask: Mask, *, seed: int) -> Mask:
    """A mask of the same layers with as many active weights in each, uniformly at random."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        for name, shape in mask.shapes().items()
    }
    return mask_from_scores(scores, mask.counts())


def reversed_mask(mask: Mask, scores: Mapping[str, Tensor]) -> Mask:
    """A mask with as many active weights in each layer, those of the lowest scores.

    Of equal scores the lower flat index is kept.

    Args:
        scores: name -> score of each weight (floating point), for all layers of the mask.

    Raises:
        ProtocolError: a layer without scores of its shape.
        MaskError: scores that are NaN.

    >>> mask = Mask({"w": torch.tensor([False, True])})
    >>> reversed_mask(mask, {"w": torch.tensor([1.0, 2.0])})["w"]
    tensor([ True, False])
    """
    for name, shape in mask.shapes().items():
        given = tuple(scores[name].shape) if name in scores else "nothing"
        if given != shape:
            raise ProtocolError(f"scores of {name!r}: expected shape {shape}, got {given}")
    return mask_from_scores({name: -scores[name] for name in mask}, mask.counts())


def reinitialised(model: nn.Module, *, seed: int) -> nn.Module:
    """A copy of a model whose modules have all started anew, by their `reset_parameters`.

    That is torch's own initialisation; a network that initialises itself otherwise has to be built
    again. Drawn on the CPU; the global random state is left as it was.

    Raises:
        ProtocolError: a module with parameters of its own that has no `reset_parameters`.
    """
    network = copy.deepcopy(model)
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise ProtocolError("the model is on several devices; give a new network's state instead")
    network.cpu()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, module in network.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif module._parameters and any(p is not None for p in module._parameters.values()):
                raise ProtocolError(
                    f"{type(module).__name__} {name!r} has parameters and no reset_parameters; "
                    "give the state of a network that was built anew"
                )
    return network.to(devices.pop()) if devices else network


def _copied(state: Weights) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
