"""FedSGC: clients prune where they pull against the global direction and grow where they follow it.

Tian et al., Gradient-Congruity Guided Federated Sparse Training, ICLR 2024 workshop on practical
machine learning for low-resource settings; as the FedPruning repository reads it. With the global
model goes its direction d = sign(θ^r − θ^(r−1)). Of the k_l weights that a client prunes in a
layer, a share λ are the smallest among those whose local change has the opposite sign, the rest
the smallest among the others; of the k_l that it grows, a share β are those of largest gradient
where the local direction −sign(g) is d's, the rest those of largest gradient elsewhere. The server
merges masks and weights as in FedDST.

d of pruned weights is that of the clients' mean gradient, −sign(Σ p_k g_k), of which each client
told its k_l largest the round before; it is 0 where nobody told one, and where the round before
was an adjustment too. The public code has it from optimisers that move masked weights, and in
the end hands no direction to its clients at all.

Departs from the code: k_l falls along half a cosine (there (1 − r/R)^α of all weights, nearly all
of them); λ and β default to a half (there .01 and .1); where one group is too small the other
fills its place, so that as many are grown as pruned; agreement is looked for among a client's
2 k_l largest gradients; weights are averaged over the clients that have them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedprune.exchange.messages import MODEL, Request, number
from fedprune.exchange.pooled import Pooled
from fedprune.methods.base import RunState, train_request
from fedprune.methods.own_masks import OwnMasks, train_own_mask
from sparsemodel.runtime.adjust import carry, largest
from sparsemodel.runtime.pattern import Pattern, Patterns
from sparsemodel.runtime.positions import find
from sparsemodel.runtime.state import Array, Entries, SparseState

if TYPE_CHECKING:
    from fedprune.local.model import LocalModel

RISING, FALLING, DIRECTION = "rising", "falling", "direction"


# --- client half -------------------------------------------------------------------------------


def exchange(
    request: Request,
    model: LocalModel,
    counts: Mapping[str, int],
    inputs: Array,
    targets: Array,
) -> SparseState:
    """Weights that pull against the global direction go first, those that follow it come first."""
    against, along = number(request.fields, "against"), number(request.fields, "along")
    state, start = model.state(), request.state(MODEL)
    assert state.patterns is not None
    found = model.growth({name: 2 * count for name, count in counts.items()}, inputs, targets)
    changed = {}
    for name, count in counts.items():
        pattern, (at, gradients) = state.patterns[name], found[name]
        some = gradients != 0
        at, gradients = at[some], gradients[some]
        positions, weights = pattern.positions(), state.values[name]
        num = min(count, len(at), len(positions))
        moved = np.sign(weights - start.values[name])
        opposed = moved * _direction(request, name, positions) < 0
        followed = np.sign(gradients) * _direction(request, name, at) < 0
        gone = chosen(-np.abs(weights), opposed, count=num, share=against)
        new = at[chosen(np.abs(gradients), followed, count=num, share=along)]
        kept = positions[~gone]
        both = np.insert(kept, np.searchsorted(kept, new), new)
        changed[name] = Pattern.from_positions(pattern.shape, both)
    return carry(state, state.patterns.replace(changed))


def chosen(
    scores: Array, preferred: NDArray[np.bool_], *, count: int, share: float
) -> NDArray[np.bool_]:
    """Which `count` to take: a share of them the best of the preferred, the rest of the others.

    Where there are too few of one kind, the other makes up for it. Of equals the earlier is taken.

    >>> chosen(np.float32([5, 1, 4, 3]), np.array([0, 1, 0, 1], bool), count=2, share=0.5)
    array([ True, False, False,  True])
    """
    num_preferred = int(preferred.sum())
    first = min(int(share * count), num_preferred)
    first = max(first, count - (len(scores) - num_preferred))
    taken = np.zeros(len(scores), bool)
    for kind, num in ((preferred, first), (~preferred, count - first)):
        places = np.flatnonzero(kind)
        taken[places[largest(scores[places], num)]] = True
    return taken


def _direction(request: Request, name: str, positions: NDArray[np.int64]) -> NDArray[np.int8]:
    """The global direction at some weights of a layer: 1, -1, or 0 where it has none."""
    signs = np.zeros(len(positions), np.int8)
    for which, sign in ((RISING, 1), (FALLING, -1)):
        if which in request.masks and name in request.masks[which]:
            signs[find(request.masks[which][name].positions(), positions)[1]] = sign
    return signs


# --- server half -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FedSGC(OwnMasks):
    """Clients prune weights that pull against the global direction and grow those that follow it.

    Attributes:
        against: λ, the share of pruned weights that are taken among those of opposite direction.
        along: β, the share of grown weights that are taken among those of the same direction.
    """

    name: ClassVar[str] = "fedsgc"
    actions = {"train": partial(train_own_mask, exchange=exchange)}  # noqa: RUF012

    against: float = 0.5
    along: float = 0.5

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        for key in ("against", "along"):
            if not 0 <= getattr(self, key) <= 1:
                yield f"{key}: expected 0 to 1, got {getattr(self, key)}"

    def request(self, state: RunState) -> Request:
        asked = super().request(state)
        if self.asked_counts(state):
            fields = {**asked.fields, "against": self.against, "along": self.along}
            return replace(asked, fields=fields, masks=_as_masks(state.kept.get(DIRECTION)))
        if self.adjusts(state, ahead=2):
            return train_request(state, growth=self.exchange_counts(state, ahead=2))
        return asked

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        after = super().update(state, pooled)
        if not self.adjusts(state, ahead=2):
            return replace(after, kept={})
        return replace(after, kept={DIRECTION: direction(state.model, after.model, pooled.growth)})


def direction(before: SparseState, after: SparseState, growth: Entries) -> SparseState:
    """Signs of what changed from one global model to the next, where any did.

    Args:
        growth: mean gradients at pruned weights, whose opposite is the direction there.
    """
    assert after.patterns is not None
    old = carry(before, after.patterns)
    signs, patterns = {}, {}
    for name, pattern in after.patterns.items():
        at, moved = pattern.positions(), np.sign(after.values[name] - old.values[name])
        if name in growth:
            # What has been grown since has a change of its own.
            new, gradients = growth[name]
            free = ~find(at, new)[1]
            places = np.searchsorted(at, new[free])
            moved = np.insert(moved, places, -np.sign(gradients[free]))
            at = np.insert(at, places, new[free])
        some = moved != 0
        patterns[name] = Pattern.from_positions(pattern.shape, at[some])
        signs[name] = moved[some]
    return SparseState(signs, Patterns(patterns))


def _as_masks(signs: SparseState | None) -> dict[str, Patterns]:
    if signs is None or signs.patterns is None:
        return {}
    items = signs.patterns.items()
    rising = {name: pattern.subset(signs.values[name] > 0) for name, pattern in items}
    falling = {name: pattern.subset(signs.values[name] < 0) for name, pattern in items}
    return {RISING: Patterns(rising), FALLING: Patterns(falling)}
