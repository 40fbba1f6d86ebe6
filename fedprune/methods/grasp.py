"""GraSP: a fixed mask that keeps the flow of gradients.

Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, ICLR 2020: the
score of a weight is −w (H g), and the *highest* are removed over the whole network; `grasp` of
`sparsemodel.masks` gives w (H g), of which the highest are kept, which is the same. Logits are
divided by a temperature of 200 before the cross-entropy, as the authors' code does it.

The scores are meant at initialisation: where a loss has been trained down, g is small and w (H g)
says little. The start that all methods here share is briefly pre-trained on the samples that the
scores are of; `server.pretrain_epochs = 0` gives the paper's.

Departs from the authors' code: last layers are not drawn anew, the Hessian is that of the weights
that may be pruned, and tasks without classes have no temperature.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedprune.methods.base import Start
from fedprune.methods.fixed_mask import FixedMask, scored_by
from sparsemodel.runtime.pattern import Patterns

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunelab.training.task import Task


@dataclass(frozen=True)
class Grasp(FixedMask):
    """A fixed mask by GraSP on the server's labelled samples.

    Attributes:
        density: share of the prunable weights that are kept.
        distribution: how many each layer keeps: "uniform", "erk", "erk-conv", "global" or
            "global-minimum".
        temperature: by which logits are divided, > 0.
    """

    name: ClassVar[str] = "grasp"

    distribution: str = "global"
    temperature: float = 200.0

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if not 0 < self.temperature < float("inf"):
            yield f"temperature: expected a positive number, got {self.temperature}"

    def mask(self, server: Start) -> Patterns:
        return scored_by("grasp", self, server, loss=self._softened)

    def _softened(self, task: Task, model: nn.Module, batch: Any) -> Tensor:
        from torch.nn import functional  # noqa: PLC0415

        from prunelab.training.task import Classification  # noqa: PLC0415

        if not isinstance(task, Classification):
            return task.loss(model, batch).mean()
        logits = task.logits(model, batch) / self.temperature
        return functional.cross_entropy(logits, task.labels(batch))
