"""FedDST: clients prune and grow masks of their own, and the server merges masks and weights.

Bibikar et al., Federated Dynamic Sparse Training: Computing Less, Communicating Less, Yet Learning
Better, AAAI 2022. In an adjustment round each client prunes the smallest weights of every layer
and grows, as many, those of largest gradient on a mini-batch (RigL), k_l as `adjusting.py` has
it. The server means each weight over the clients that have it and prunes layers by magnitude back
to their densities, which are those of Erdős–Rényi kernels.

Departs from the paper: the start is the one that all methods here share, under its magnitude mask.
What a client has just pruned it does not grow again in the same exchange. It exchanges after half
of its local steps, so that grown weights are trained before they are merged: after all of them, as
the authors' code has it (`adjust_after=1`), they are zeros that the merge prunes first. Optimisers
start anew after the exchange. The authors' code decays the rate twice and lets active weights take
places of growth; neither is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from fedprune.exchange.messages import Request
from fedprune.methods.own_masks import OwnMasks, train_own_mask
from sparsemodel.runtime.adjust import prune_and_grow
from sparsemodel.runtime.state import Array, SparseState

if TYPE_CHECKING:
    from fedprune.local.model import LocalModel


def exchange(
    request: Request,
    model: LocalModel,
    counts: Mapping[str, int],
    inputs: Array,
    targets: Array,
) -> SparseState:
    """The smallest weights go, the pruned ones of largest gradient come."""
    state = model.state()  # before growth, which trains batch norms
    return prune_and_grow(state, model.growth(counts, inputs, targets), counts)


@dataclass(frozen=True)
class FedDST(OwnMasks):
    """Clients prune and grow masks of their own; the server merges them by weight and magnitude."""

    name: ClassVar[str] = "feddst"
    actions = {"train": partial(train_own_mask, exchange=exchange)}  # noqa: RUF012
