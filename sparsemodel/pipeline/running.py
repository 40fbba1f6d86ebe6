"""A model on its way through stages, which can be left after each and gone on with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsemodel.errors import MaskError
from sparsemodel.masks.by_blocks import block_weights
from sparsemodel.masks.mask import Mask, weights_under
from sparsemodel.pipeline.stages import Bias, Dsnot, Perp, Stage, Work, check_stages


@dataclass(frozen=True)
class Progress:
    """What finished stages have left, beside the dense model.

    Attributes:
        masks: after each of them.
        values: parameters by name that are no longer the dense model's under the last mask.
    """

    masks: Sequence[Mask]
    values: Mapping[str, Tensor]


class Pipeline:
    """Prunes a transformer in stages that share one budget; the model changes.

    The budget is the kept share of all weights of the linear layers in the blocks: what `Weights`
    asks for counts what units have taken away. Every mask lies within that of the stages before,
    but for DSnoT's, which lies within that of the stages before the weights.

    Args:
        model: dense, in evaluation mode.
        stages: in the order of `check_stages`.
        batches: for calibration; as of `calibrate`. Each stage reads them.
        seed: of random criteria and of PERP.
        after: is told of each block whose weights have been ranked.

    Raises:
        MaskError, DensityError: stages that cannot follow each other.
        CalibrationError: a network without a list of equal blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Iterable[Stage],
        batches: Iterable[Any],
        *,
        seed: int = 0,
        after: Callable[[str], None] = lambda block: None,
    ) -> None:
        self.stages = tuple(stages)
        check_stages(self.stages)
        looks_back = any(isinstance(stage, Dsnot | Bias | Perp) for stage in self.stages)
        names = [name for block in block_weights(model).values() for name in block]
        whole = Mask({
            name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in names
        })  # fmt: skip
        self._work = Work(
            model, copy.deepcopy(model) if looks_back else model, list(batches), self.stages, seed,
            [whole], after,
        )  # fmt: skip

    @property
    def mask(self) -> Mask:
        """Of all linear layers of the blocks, after the stages so far; it has been applied."""
        return self._work.masks[-1]

    @property
    def num_finished(self) -> int:
        """How many stages are."""
        return len(self._work.masks) - 1

    def advance(self) -> Stage:
        """Run the next stage, and say which it was.

        Raises:
            MaskError, DensityError, CalibrationError: as the stage; the model may have changed.
        """
        stage = self.stages[self.num_finished]
        self._work.masks.append(stage.run(self._work))
        return stage

    def run(self) -> Mask:
        """Run all stages that are left."""
        while self.num_finished < len(self.stages):
            self.advance()
        return self.mask

    def progress(self) -> Progress:
        """What is needed to go on from here."""
        work = self._work
        dense, values = work.dense.state_dict(), {}
        for name, value in work.model.state_dict().items():
            known = dense.get(name)
            if known is not None and name in self.mask:
                known = known.masked_fill(~self.mask[name].to(known.device), 0.0)
            if known is None or not torch.equal(known, value):
                values[name] = value
        return Progress(tuple(work.masks[1:]), values)

    @torch.no_grad()
    def restore(self, progress: Progress) -> None:
        """Go on from there; only before the first stage.

        Raises:
            MaskError: what is not of this model and of these stages.
        """
        work = self._work
        if self.num_finished or len(progress.masks) > len(self.stages):
            raise MaskError(
                f"{len(progress.masks)} of {len(self.stages)} stages are to be restored, after "
                f"{self.num_finished} were run"
            )
        for mask in progress.masks:
            weights_under(mask, work.model)
        work.masks += progress.masks
        self.mask.apply(work.model)
        for name, value in progress.values.items():
            path, _, leaf = name.rpartition(".")
            layer = work.model.get_submodule(path)
            if getattr(layer, leaf, None) is None:  # a bias that a stage has added
                layer.register_parameter(leaf, nn.Parameter(value.clone()))
            else:
                getattr(layer, leaf).copy_(value)
