"""`MaskCallback`: a mask in transformers' Trainer and in Lightning's."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from sparsemodel.errors import MaskError
from sparsemodel.loops.events import LoopCallback
from sparsemodel.loops.hold import HeldMask, masked_weights
from sparsemodel.masks.mask import Mask, num_not_zero


class MaskCallback(LoopCallback):
    """A mask survives training by transformers' Trainer or by Lightning's.

    Pruned weights are exactly zero from the first evaluation on and after each optimiser step, so
    in every checkpoint too: see `HeldMask`, which does it. In other loops use that.

    A run that is resumed has to hold the same weights at zero as before: where a checkpoint has
    others, it was trained under another mask or none, and the mask is refused.

    Args:
        mask: of the model that is trained, or of the one part of it that was pruned.

    Raises:
        MaskError: when training begins: the mask does not fit the model or the checkpoint.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self._held: HeldMask | None = None

    def begin(self, model: nn.Module, optimizers: Iterable[Optimizer], *, resumed: bool) -> None:
        self.end(model)  # of a training that was broken off
        counts = num_not_zero(self.mask, masked_weights(model, self.mask)) if resumed else {}
        if count := sum(counts.values()):
            raise MaskError(
                f"in the checkpoint {count} weights are not zero that the mask prunes: it was "
                "trained under another mask, or none; give the mask it was trained under, or start "
                "a new run from its weights"
            )
        self._held = HeldMask(model, self.mask, *optimizers)

    def end(self, model: nn.Module) -> None:
        if self._held is not None:
            self._held.release()
            self._held = None
