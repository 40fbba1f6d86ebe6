"""Candidates of several kinds, which the clients then choose from.

"noise" is FedTiny's own; "uniform" has the same density in every layer; "erk" noisy
Erdős–Rényi-kernel densities, "erk-conv" those of the convolutions alone, without noise; all four
are magnitude masks of the server's model and share its weights. "synflow" and "snip" are those
methods' masks of it, "narrow" a narrow dense network inside it, and "gradual" is pruned while it is
trained on the server's samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedprune.local.optimizer import Optimizer
from fedprune.local.training import train_epochs
from fedprune.methods.base import Start
from fedprune.methods.fedtiny.narrow import narrow_mask
from fedprune.methods.fedtiny.pool import Pool, candidate_pool
from fedprune.methods.fixed_mask import FixedMask
from fedprune.methods.snip import Snip
from fedprune.methods.synflow import SynFlow
from prunelab.errors import RunError
from prunelab.runs.seeds import rng, stream_seed
from sparsemodel.errors import MaskError
from sparsemodel.masks.distribution import erk, erk_conv, noise_uniform, uniform
from sparsemodel.masks.schedule import cubic
from sparsemodel.runtime.adjust import carry, prune_to_largest, select_largest
from sparsemodel.runtime.outputs import with_outputs
from sparsemodel.runtime.state import SparseState

SEED_GRADUAL = 13  # the first part of a derived seed says what it is for

Counts = dict[str, int]


def pool_of_kinds(
    kinds: Sequence[str], server: Start, density: float, *, num_candidates: int, outputs: bool
) -> tuple[Pool, list[str]]:
    """The pool, and the kind of each candidate.

    Kinds that are drawn share the places that the others leave, one each at least.

    Args:
        outputs: whether the largest weight of every output is kept, but for "narrow".
    """
    names = _places(kinds, num_candidates)
    nested = [name for name in names if name in COUNTS]
    drawn = dict.fromkeys(nested, 0)
    counts = []
    for name in nested:
        counts.append(COUNTS[name](server, density, drawn[name]))
        drawn[name] += 1
    own = [name for name in names if name in STATES]
    states = [STATES[name](server, density, outputs) for name in own]
    if counts:
        pool = candidate_pool(server.state(), counts, outputs=outputs)
        return Pool(pool.union, pool.counts, states, outputs=outputs), [*nested, *own]
    first, *rest = states  # a pool by itself
    return Pool(first, [_patterns_of(first).counts()], rest), own


def _places(kinds: Sequence[str], num_candidates: int) -> list[str]:
    """The kind of each candidate."""
    drawn = [kind for kind in kinds if kind in DRAWN]
    free = num_candidates - (len(kinds) - len(drawn))
    more = [drawn[n % len(drawn)] for n in range(max(free, len(drawn)) if drawn else 0)]
    return [*more, *(kind for kind in kinds if kind not in DRAWN)]


# --- magnitude masks of one model: how many weights each layer keeps ---------------------------


def _noise(server: Start, density: float, number: int) -> Counts:
    return noise_uniform(server.prunable, density, generator=rng(server.seed, number))


def _noisy_erk(server: Start, density: float, number: int) -> Counts:
    middle = erk(server.prunable, density)
    return noise_uniform(
        server.prunable, density, generator=rng(server.seed, number), around=middle
    )  # fmt: skip


def _uniform(server: Start, density: float, number: int) -> Counts:
    return uniform(server.prunable, density)


def _erk_conv(server: Start, density: float, number: int) -> Counts:
    return erk_conv(server.prunable, density)


# --- states of their own -----------------------------------------------------------------------


def _masked_by(method: type[FixedMask]) -> Callable[[Start, float, bool], SparseState]:
    """The candidate of a method with a mask from the start."""

    def state_of(server: Start, density: float, outputs: bool) -> SparseState:
        dense = server.state()
        try:
            state = carry(dense, method(density=density).mask(server))
        except MaskError as error:
            raise RunError(f"candidates: {method.name!r}: {error}; leave it out") from None
        return with_outputs(state, dense) if outputs else state

    return state_of


def _narrow(server: Start, density: float, outputs: bool) -> SparseState:
    program = server.program
    if program is None:
        raise RunError(
            "candidates: 'narrow' has to know which layer reads which, and the network has no "
            "program; leave it out"
        )
    dense = server.state()
    return carry(dense, narrow_mask(dense, program, server.prunable, density))


def _gradual(server: Start, density: float, outputs: bool) -> SparseState:
    """The server's model trained on for as many epochs again, and pruned before each.

    Before epoch e of E to density d + (1 − d)(1 − e/E)³, the same in every layer: `cubic`.
    """
    place, state = server.place(), server.state()
    training, own = place.config.training, place.data.train
    epochs = max(1, place.config.server.pretrain_epochs)
    for epoch in range(1, epochs + 1):
        counts = uniform(server.prunable, cubic(epoch, start=0, end=epochs, final=density))
        prune = prune_to_largest if state.patterns is None else select_largest
        pruned = prune(state, counts)
        model = place.open(with_outputs(pruned, state) if outputs else pruned)
        optimizer = Optimizer(training, 0)
        train_epochs(
            model,
            own.inputs,
            own.targets,
            sgd=optimizer.sgd,
            correction=optimizer.correction,
            epochs=1,
            batch_size=training.batch_size,
            seed=stream_seed(SEED_GRADUAL, server.seed, epoch),
            augmented=place.config.data.augment,
        )
        state = model.state()
    return state


def _patterns_of(state: SparseState) -> Any:
    assert state.patterns is not None, "candidates are pruned"
    return state.patterns


DRAWN = ("noise", "erk")
COUNTS: Mapping[str, Callable[[Start, float, int], Counts]] = {
    "noise": _noise,
    "erk": _noisy_erk,
    "uniform": _uniform,
    "erk-conv": _erk_conv,
}
STATES: Mapping[str, Callable[[Start, float, bool], SparseState]] = {
    SynFlow.name: _masked_by(SynFlow),
    Snip.name: _masked_by(Snip),
    "gradual": _gradual,
    "narrow": _narrow,
}
KINDS = (*COUNTS, *STATES)
