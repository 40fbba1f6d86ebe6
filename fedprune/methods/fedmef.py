"""FedMef: before a mask moves, clients press what it will lose towards zero.

Huang et al., FedMef: Towards Memory-efficient Federated Dynamic Pruning, CVPR 2024 (arXiv
2403.14737), and its authors' library. Every `adjust_every` rounds the mask loses its smallest
weights and grows where the clients' gradients are largest, as in FedTiny's progressive pruning.
The training of such a round is budget-aware extrusion: the local loss is L + λ‖θ_low‖², where
θ_low are the active weights of lowest magnitude, as many as the adjustment takes, marked before
the first step; and the learning rate of step t of T is min(ξ, max(η_r, ψ p(t) (2σ(‖θ_low‖₁) − 1)
η_0)), with the REX factor p(t) = (2T − 2t) / (2T − t), η_r the round's rate and η_0 the first
round's. So there is more movement while there is something to press out, and less towards the end.

Departs from the paper: scaled activation pruning and its normalised convolutions, which save
memory of activations, are left out. The first mask is of the largest weights of the start that all
methods share, and not random. (The authors' code ranks the pruned zeros among the lowest weights,
adds the norm without square or λ, and presses in every round.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, Reply, Request, number
from fedprune.exchange.pooled import Pooled
from fedprune.local.optimizer import OwnOptimizer
from fedprune.local.training import growth_counts, train
from fedprune.methods.adjusting import AdjustedMagnitude
from fedprune.methods.base import RunState, train_request
from fedprune.methods.magnitude import Magnitude
from prunelab.data.batches import num_batches
from sparsemodel.runtime.adjust import largest, prune_and_grow
from sparsemodel.runtime.state import Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local
    from fedprune.settings import TrainingConfig

# --- client half -------------------------------------------------------------------------------


def train_pressing(request: Request, local: Local) -> Reply:
    """Local training; before an adjustment with the lowest weights pressed towards zero."""
    counts = growth_counts(request)
    if not counts:
        return train(request, local)
    penalty, weight, most = (
        number(request.fields, key) for key in ("penalty", "lr_weight", "max_lr")
    )
    if min(penalty, weight, most) < 0:
        raise ClientError("fields 'penalty', 'lr_weight' and 'max_lr': expected 0 or more")
    training = local.config.training
    low = lowest(request.state(MODEL).values, counts)
    steps = training.local_epochs * num_batches(
        len(local.data.train), batch_size=training.batch_size
    )
    extrusion = Extrusion(
        training, request.round_index, low, steps=steps, penalty=penalty, lr_weight=weight,
        max_lr=most,
    )  # fmt: skip
    return train(request, local, optimizer=extrusion)


class Extrusion(OwnOptimizer):
    """Steps of L + λ‖θ_low‖² at the budget's learning rate.

    Args:
        low: layer -> which of its active weights are θ_low.
        steps: T.
        penalty: λ.
        lr_weight: ψ.
        max_lr: ξ; 0: the first round's learning rate.
    """

    def __init__(
        self,
        training: TrainingConfig,
        round_index: int,
        low: Mapping[str, NDArray[np.int64]],
        *,
        steps: int,
        penalty: float,
        lr_weight: float,
        max_lr: float,
    ) -> None:
        super().__init__(training, round_index)
        self._first_lr, self._low = training.lr, low
        self._done, self._steps = 0, steps
        self._penalty, self._lr_weight = penalty, lr_weight
        self._max_lr = max_lr or training.lr

    def move(self, values: Tensors, gradients: Tensors) -> None:
        norm = sum(float(abs(values[name][places]).sum()) for name, places in self._low.items())
        for name, places in self._low.items():
            gradients[name][places] += np.float32(2 * self._penalty) * values[name][places]
        wanted = self._lr_weight * self._first_lr * rex(self._done, self._steps)
        wanted *= math.tanh(norm / 2)  # 2σ(x) − 1
        self.steps(values, gradients, lr=min(self._max_lr, max(self.numbers.lr, wanted)))
        self._done += 1


def lowest(values: Tensors, counts: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
    """Where the active weights of lowest magnitude stand among a layer's, the earlier of equals.

    >>> lowest({"w": np.float32([3, -1, 2, 0.5])}, {"w": 2})["w"].tolist()
    [1, 3]
    """
    return {
        name: np.flatnonzero(largest(-abs(values[name]), min(count, len(values[name]))))
        for name, count in counts.items()
    }


def rex(done: int, steps: int) -> float:
    """The learning rate's factor after so many of its steps: from 1 to 0, late and fast.

    Chen et al., REX: Revisiting Budgeted Training with an Improved Schedule, MLSys 2022.

    >>> rex(0, 10), rex(5, 10), rex(10, 10)
    (1.0, 0.6666666666666666, 0.0)
    """
    return (2 * steps - 2 * done) / (2 * steps - done)


# --- server half -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FedMef(AdjustedMagnitude):
    """A mask that moves by the clients' gradients, once its lowest weights are pressed out.

    Attributes:
        penalty: λ, of the squared norm of the lowest weights.
        lr_weight: ψ; 0 keeps the round's learning rate.
        max_lr: ξ, the largest learning rate; 0: `training.lr`.
    """

    name: ClassVar[str] = "fedmef"
    actions = {"train": train_pressing}  # noqa: RUF012

    distributions: ClassVar[tuple[str, ...]] = Magnitude.distributions

    distribution: str = "uniform"
    penalty: float = 0.01
    lr_weight: float = 1.0
    max_lr: float = 0.0

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        for key in ("penalty", "lr_weight", "max_lr"):
            if not 0 <= getattr(self, key) < math.inf:
                yield f"{key}: expected 0 or more, got {getattr(self, key)}"

    def unaccounted(self) -> Iterable[str]:
        yield from super().unaccounted()
        yield (
            f"{self.name} moves its mask by clients' gradients, and privacy.dp covers training "
            "alone; use a method with a fixed mask"
        )

    def request(self, state: RunState) -> Request:
        counts = self.asked_counts(state)
        numbers = {key: getattr(self, key) for key in ("penalty", "lr_weight", "max_lr")}
        return train_request(state, growth=counts, fields=numbers if counts else None)

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        after = super().update(state, pooled)
        if not (counts := self.asked_counts(state)):
            return after
        return replace(after, model=prune_and_grow(pooled.model, pooled.growth, counts))
