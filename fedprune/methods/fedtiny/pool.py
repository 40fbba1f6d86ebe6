"""FedTiny's candidate pool: coarse masks, each with its own layer densities.

All candidates are magnitude masks of one model, so in each layer the smaller lie inside the
larger. The pool is therefore one sparse state, that of the largest in every layer, and for each
candidate how many weights it keeps of each layer: that is what travels, and what clients hold.
Candidates of other kinds, which lie in no other, are sparse states of their own beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedprune.errors import ClientError
from fedprune.exchange.messages import Fields, Request, counts
from prunelab.runs.seeds import rng
from sparsemodel.masks.distribution import noise_uniform
from sparsemodel.runtime.adjust import prune_to_largest, select_largest
from sparsemodel.runtime.outputs import with_outputs
from sparsemodel.runtime.pattern import Patterns
from sparsemodel.runtime.state import SparseState, Tensors

POOL = "pool"
OUTPUTS = "outputs"  # the field that says that no output is silent


@dataclass(frozen=True)
class Pool:
    """The candidates. `union` holds the weights of the largest of each layer.

    `counts` holds for each candidate: layer -> how many of its largest weights are kept.

    Attributes:
        others: candidates that are no part of the union, after those that are.
        outputs: whether each candidate of the union keeps the largest weight of every output.
    """

    union: SparseState
    counts: Sequence[Mapping[str, int]]
    others: Sequence[SparseState] = ()
    outputs: bool = False

    def __len__(self) -> int:
        return len(self.counts) + len(self.others)

    def candidate(self, number: int) -> SparseState:
        """A candidate's state under its own mask."""
        if number >= len(self.counts):
            return self.others[number - len(self.counts)]
        nested = select_largest(self.union, self.counts[number])
        return with_outputs(nested, self.union) if self.outputs else nested

    def kept(self) -> list[Mapping[str, int]]:
        """For each candidate: layer -> how many weights."""
        return [*self.counts, *(_patterns(state).counts() for state in self.others)]

    def values(self, number: int) -> Tensors:
        """The values that a candidate shares, or has: those of what no mask is on, above all."""
        of = self.union if number < len(self.counts) else self.others[number - len(self.counts)]
        return of.values


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


def candidate_pool(
    dense: SparseState, kept: Sequence[Mapping[str, int]], *, outputs: bool = False
) -> Pool:
    """The pool of magnitude masks of a dense model; of equal weights the earlier is kept.

    Args:
        kept: for each candidate: layer -> how many weights.
        outputs: whether the largest weight of every output is among them.
    """
    largest = {name: max(each[name] for each in kept) for name in kept[0]}
    union = prune_to_largest(dense, largest)
    return Pool(with_outputs(union, dense) if outputs else union, kept, outputs=outputs)


def pool_request(
    pool: Pool, action: str, *, fields: Fields | None = None, passes: int = 1, **rest: object
) -> Request:
    """A question about every candidate; clients keep the pool until the next one.

    Args:
        fields: what it says besides.
        passes: over the development samples, of each candidate; for the account.
    """
    order = list(pool.counts[0])
    told = {"counts": [[each[name] for name in order] for each in pool.counts], **(fields or {})}
    states = {POOL: pool.union, **{_other(n): state for n, state in enumerate(pool.others)}}
    return Request(
        action,
        fields={**told, OUTPUTS: True} if pool.outputs else told,
        states=states,
        hold=frozenset(states),
        on="dev",
        forward_passes=pool.kept() * passes,
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
    others = [request.states[_other(n)] for n in range(len(request.states) - 1)]
    return Pool(union, kept, others, outputs=bool(request.fields.get(OUTPUTS, False)))


def _other(number: int) -> str:
    return f"{POOL}-{number}"


def _patterns(state: SparseState) -> Patterns:
    assert state.patterns is not None, "candidates are pruned"
    return state.patterns
