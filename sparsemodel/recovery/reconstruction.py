"""Each block of a pruned network taught to give what the dense block gives.

Source: Zimmer et al., PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs (2023),
section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsemodel.calibration.blocks import BlockInput, block_names, walk_blocks
from sparsemodel.errors import CalibrationError, MaskError
from sparsemodel.masks.mask import Mask, weights_under
from sparsemodel.masks.probe import probing
from sparsemodel.recovery.perp import HEAD, USUAL, Retraining


@dataclass(frozen=True)
class BlockError:
    """Mean squared error of a block's output, over tokens and features.

    Attributes:
        pruned: under the mask alone.
        mended: after training.
    """

    pruned: float
    mended: float


def reconstruct(
    model: nn.Module,
    mask: Mask,
    batches: Iterable[Any],
    *,
    dense: nn.Module | None = None,
    parts: Iterable[str] = USUAL,
    steps: int = 20,
    lr: float = 5e-4,
    rank: int = 16,
    scale: float = 2.0,
    seed: int = 0,
) -> dict[str, BlockError]:
    """Prune a network block by block, and mend each before the next sees what it gives.

    In each block ‖block(x) − dense block(x)‖² is made small over `parts` (see `Retraining`), where
    x is what the pruned and mended blocks before it give. One block's activations with gradients
    are in memory at a time, and of each batch what goes into a block and what should come out.
    AdamW without weight decay takes one batch a step, in an order drawn for each pass over them;
    its learning rate rises for a tenth of the steps, then falls linearly to zero.

    Departs from the published code in that the model is in eval mode, where dropout is off; in
    that the learning rate is above zero in the first step too; and in that the loss is divided by
    the pruned block's, which moves no minimum and keeps small outputs clear of AdamW's epsilon.

    Args:
        model: dense; at the end it is under the mask, with plain weights. Its mode, gradients and
            what is trainable stay.
        mask: of weights in its blocks.
        batches: as for `calibrate`; padding is left out.
        dense: what the blocks are to give is told by this network's, which stays; None: by those of
            the model as it comes. For a model that was pruned, or given biases, before.
        parts: of each block, some of sparsemodel.recovery.perp.PARTS but the head.
        steps, lr: 20 and 5e-4 as published.
        rank, scale: of adapters.
        seed: of the order of batches, and of what adapters start from.

    Returns:
        Block -> its error before and after; of a block without masked weights, zeros.

    Raises:
        MaskError: a mask that does not fit or names weights outside of the blocks, or parts that a
            block has not.
        CalibrationError: no batch, or a network that is no chain of its blocks.
    """
    if steps < 1 or not lr > 0:
        raise MaskError(f"expected steps >= 1 and lr > 0, got {steps} and {lr}")
    parts, errors = tuple(parts), {}
    if HEAD in parts:
        raise MaskError(f"a block has no head: leave {HEAD!r} out of the parts, and train it after")
    weights_under(mask, model)
    own = _by_block(model, mask)
    with probing(model):
        model.eval()
        for place, (name, inputs) in enumerate(walk_blocks(model, batches)):
            if not inputs:
                raise CalibrationError("there is no batch to reconstruct blocks on")
            if not own[name]:
                errors[name] = BlockError(0.0, 0.0)
                continue
            block, teacher = model.get_submodule(name), (dense or model).get_submodule(name)
            with torch.no_grad():
                targets = [one.through(teacher).to(one.hidden.device) for one in inputs]
            with Retraining(
                block, Mask(own[name]), parts, rank=rank, scale=scale, seed=seed + place
            ) as retraining:
                before = block_error(block, inputs, targets)
                batch_order = torch.Generator().manual_seed(seed + place)
                optimizer = torch.optim.AdamW(retraining.parameters(), lr=lr, weight_decay=0.0)
                if before > 0:
                    losses = _losses(block, inputs, targets, unit=before, generator=batch_order)
                    _train(optimizer, losses, steps=steps, lr=lr)
            errors[name] = BlockError(before, block_error(block, inputs, targets))
    return errors


@torch.no_grad()
def block_error(block: nn.Module, inputs: Iterable[BlockInput], targets: Iterable[Tensor]) -> float:
    """Mean squared error of what a block gives, over all tokens that count and features."""
    found = [_squares(block, one, target) for one, target in zip(inputs, targets, strict=True)]
    return sum(total.item() for total, _ in found) / max(1, sum(count for _, count in found))


def _by_block(model: nn.Module, mask: Mask) -> dict[str, dict[str, Tensor]]:
    """Block -> patterns of its weights, by their names in it."""
    blocks = block_names(model)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in blocks}
    for name in mask:
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is None:
            raise MaskError(
                f"{name!r} is in none of the blocks {blocks[0]!r}, ...: leave it out, and prune "
                "it by a mask of its own"
            )
        found[block][name.removeprefix(f"{block}.")] = mask[name]
    return found


def _losses(
    block: nn.Module,
    inputs: list[BlockInput],
    targets: list[Tensor],
    *,
    unit: float,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """The error on one batch after another, for ever, in units of `unit`."""
    while True:
        for place in torch.randperm(len(inputs), generator=generator).tolist():
            total, count = _squares(block, inputs[place], targets[place])
            yield total / (max(1, count) * unit)


@torch.enable_grad()
def _train(
    optimizer: torch.optim.Optimizer, losses: Iterator[Tensor], *, steps: int, lr: float
) -> None:
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_linear(step, steps)
        optimizer.zero_grad()
        next(losses).backward()
        optimizer.step()


def warm_linear(step: int, steps: int) -> float:
    """A factor of the learning rate: up to 1 in a tenth of the steps, then down to 0 after them.

    >>> [warm_linear(step, 20) for step in (0, 1, 2, 11, 19)]
    [0.5, 1.0, 1.0, 0.5, 0.05555555555555555]
    """
    warm = steps // 10
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm)


def _squares(block: nn.Module, one: BlockInput, target: Tensor) -> tuple[Tensor, int]:
    """Sum of squared errors on one batch, and of how many numbers."""
    off = (one.through(block) - target.to(one.device)).float()
    if one.padding is not None:
        off = off[one.padding]
    return off.square().sum(), off.numel()
