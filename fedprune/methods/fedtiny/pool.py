"""FedTiny's candidate pool: coarse masks, each with its own layer densities.

All candidates are magnitude masks of one model, so in each layer the smaller lie inside the
larger. The pool is therefore one sparse state, that of the largest in every layer, and for each
candidate how many weights it keeps of each layer: that is what travels, and what clients hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedprune.errors import ClientError
from fedprune.exchange.messages import Request, counts
from prunelab.runs.seeds import rng
from sparsemodel.masks.distribution import noise_uniform
from sparsemodel.runtime.adjust import prune_to_largest, select_largest
from sparsemodel.runtime.state import SparseState

POOL = "pool"


@dataclass(frozen=True)
class Pool:
    """The candidates. `union` holds the weights of the largest of each layer.

    `counts` holds for each candidate: layer -> how many of its largest weights are kept.
    """

    union: SparseState
    counts: Sequence[Mapping[str, int]]

    def candidate(self, number: int) -> SparseState:
        """A candidate's state under its own mask."""
        return select_largest(self.union, self.counts[number])


def candidate_counts(
    shapes: Mapping[str, tuple[int, ...]], density: float, *, num_candidates: int, seed: int
) -> list[dict[str, int]]:
    """How many weights each candidate keeps of each prunable layer.

    Layer densities are d_l = d (1 + U(-.5, .5)), redrawn until the whole is within 2 % of d.
    Candidate c depends on `seed` and c alone, so that a larger pool contains every smaller one.
    """
    return [
        noise_uniform(shapes, density, generator=rng(seed, candidate))
        for candidate in range(num_candidates)
    ]


def candidate_pool(dense: SparseState, kept: Sequence[Mapping[str, int]]) -> Pool:
    """The pool of magnitude masks of a dense model; of equal weights the earlier is kept.

    Args:
        kept: for each candidate: layer -> how many weights.
    """
    largest = {name: max(each[name] for each in kept) for name in kept[0]}
    return Pool(prune_to_largest(dense, largest), kept)


def pool_request(pool: Pool, action: str, **rest: object) -> Request:
    """A question about every candidate; clients keep the pool until the next one."""
    order = list(pool.counts[0])
    return Request(
        action,
        fields={"counts": [[each[name] for name in order] for each in pool.counts]},
        states={POOL: pool.union},
        hold=frozenset([POOL]),
        on="dev",
        forward_passes=pool.counts,
        **rest,  # type: ignore[arg-type]
    )


def received_pool(request: Request) -> Pool:
    """The pool of a request of `pool_request`, as a client sees it.

    Raises:
        ClientError: the request's counts do not fit its state.
    """
    union = request.state(POOL)
    held = {} if union.patterns is None else union.patterns.counts()
    candidates = request.fields.get("counts")
    if not isinstance(candidates, list) or not candidates or not held:
        raise ClientError("a pool without candidates")
    kept = []
    for each in candidates:
        wanted = dict(zip(held, counts({"counts": each}, "counts", len(held)), strict=True))
        if any(wanted[name] > most for name, most in held.items()):
            raise ClientError("a candidate keeps more weights than the pool holds")
        kept.append(wanted)
    return Pool(union, kept)
