"""Masks that the server chooses once, before sparse federated averaging: what they share.

A criterion scores the weights of the start, a distribution says how many each layer keeps; no
layer loses all its weights. `distribution` "uniform" keeps the same share of every layer, "erk"
more of small ones (Erdős–Rényi-kernel), "global" the best of the whole network, "global-minimum"
those with at least 0.05 % of the network's weights in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedprune.methods.base import Method, RunState, Start
from sparsemodel.masks.distribution import DISTRIBUTIONS
from sparsemodel.runtime.adjust import carry, prune_to_largest
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import SparseState, Tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunelab.training.task import Task

BATCH = 128  # samples that a criterion looks at together, at most

BY_SHAPES = ("uniform", "erk", "erk-conv")
"""Distributions that look at no scores."""


@dataclass(frozen=True)
class FixedMask(Method):
    """A mask chosen once by the server.

    Attributes:
        density: share of the prunable weights that are kept.
        distribution: how many of them each layer keeps, a name in `distributions`.
    """

    distributions: ClassVar[tuple[str, ...]] = (*BY_SHAPES, "global", "global-minimum")

    density: float = 0.05
    distribution: str = "uniform"

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        if self.distribution not in self.distributions:
            yield (
                f"distribution: expected one of {', '.join(self.distributions)}; got "
                f"{self.distribution!r}"
            )

    def start(self, server: Start) -> RunState:
        return RunState(round_index=0, model=carry(server.state(), self.mask(server)))

    def mask(self, server: Start) -> Patterns:
        """The mask of the run."""
        raise NotImplementedError


def largest(scores: Tensors, density: float, distribution: str) -> Patterns:
    """The patterns of the largest scores, none of them negative; of equal ones the earlier.

    >>> import numpy as np
    >>> scores = {"a": np.float32([[3, 2], [2, 2]]), "b": np.float32([[4, 2], [2, 0]])}
    >>> largest(scores, 0.5, "global").counts()
    {'a': 3, 'b': 1}
    """
    shapes = {name: score.shape for name, score in scores.items()}
    counts = DISTRIBUTIONS[distribution](shapes if distribution in BY_SHAPES else scores, density)
    patterns = prune_to_largest(SparseState(scores), counts).patterns
    assert patterns is not None
    return patterns


def _mean_loss(task: Task, model: nn.Module, batch: Any) -> Tensor:
    return task.loss(model, batch).mean()


def scored_by(
    criterion: str,
    method: FixedMask,
    server: Start,
    *,
    loss: Callable[[Task, nn.Module, Any], Tensor] = _mean_loss,
) -> Patterns:
    """The mask of a criterion of `sparsemodel.masks` on the start, in train mode; needs torch.

    The criterion looks at all the server's labelled samples; at more than BATCH in several
    batches, whose scores are averaged.

    Args:
        criterion: a name in CRITERIA.
        loss: of a batch, as a scalar.
    """
    import torch  # noqa: PLC0415

    from prunelab.data.tensors import batch_of  # noqa: PLC0415
    from prunelab.runs.seeds import seeded  # noqa: PLC0415
    from prunelab.runs.threads import computing  # noqa: PLC0415
    from sparsemodel.layers.from_state import load_state_  # noqa: PLC0415
    from sparsemodel.masks.prune import prune  # noqa: PLC0415

    place = server.place()
    training, samples, task = place.config.training, place.data.train, place.network.task()
    device = torch.device(training.device)
    num_batches = -(-len(samples) // BATCH)
    parts = [slice(first, None, num_batches) for first in range(num_batches)]
    batches = [batch_of(samples.inputs[p], samples.targets[p], device) for p in parts]
    with computing(training.threads), seeded(server.seed, device):  # as layers draw, dropout say
        model: nn.Module = place.network.build().to(device)
        load_state_(model, server.state())
        mask = prune(
            model.train(),
            method.density,
            criterion=criterion,
            distribution=method.distribution,
            data=batches,
            loss=lambda probed, batch: loss(task, probed, batch),
            names=server.prunable,
        )
    return mask.csr()
