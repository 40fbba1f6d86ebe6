"""Growth candidates at the merged model: gradients at the state that a client receives.

After its local epochs a client's model fits its own samples, and what it would grow differs from
client to client; before them all clients look at the same weights, and a sum over more of their
samples is less noisy. Two passes over the same mini-batches find the largest sums in the memory
of a few times what is sent: the union of each batch's largest gradients, then the exact sums
there, which are the gradients of a model that has those weights too, at zero.

Asked together with the training of a round, what is found is grown after that training. Asked by
itself, of the model that a round has made, it is grown at once, where it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedprune.exchange.messages import MODEL, Expected, Reply, Request, count
from fedprune.local.model import Sgd
from fedprune.local.training import (
    GROWTH_BATCHES,
    gradient_batches,
    growth_counts,
    require_samples,
    train,
)
from sparsemodel.runtime.adjust import carry, largest
from sparsemodel.runtime.pattern import Pattern
from sparsemodel.runtime.positions import find
from sparsemodel.runtime.state import Entries, SparseState, Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local

GROW = "grow"
WIDER = 2  # of each batch so many times as many as are sent: a sum may be large where no batch is


def train_and_grow(request: Request, local: Local) -> Reply:
    """Answer "train"; where the request says over how many batches, growth comes first."""
    counts = growth_counts(request)
    if not counts or GROWTH_BATCHES not in request.fields:
        return train(request, local)
    require_samples(len(local.data.train), request)
    batches = count(request.fields, GROWTH_BATCHES)
    entries, held = summed_growth(
        request.state(MODEL), counts, local, batches=batches, round_index=request.round_index
    )
    without = {key: value for key, value in request.fields.items() if key != "grow"}
    reply = train(replace(request, fields=without), local)
    if (own := reply.resources) is not None:
        growing = local.resources(held, request)
        reply = replace(
            reply, resources=replace(own, state_bytes=max(own.state_bytes, growing.state_bytes))
        )
    return replace(reply, entries={MODEL: entries})


def grow(request: Request, local: Local) -> Reply:
    """Growth alone, over the mini-batches that the question says."""
    data = local.data.train
    require_samples(len(data), request)
    entries, _ = summed_growth(
        request.state(MODEL),
        growth_counts(request),
        local,
        batches=count(request.fields, GROWTH_BATCHES),
        round_index=request.round_index,
    )
    return Reply(len(data), entries={MODEL: entries})


def growth_request(state: SparseState, counts: Mapping[str, int], *, batches: int) -> Request:
    """The question of `grow`, without a round."""
    assert state.patterns is not None, "growth is at pruned places"
    order = list(state.patterns)
    wanted = [[order.index(name), most] for name, most in counts.items()]
    return Request(
        GROW,
        fields={"grow": wanted, GROWTH_BATCHES: batches},
        states={MODEL: state},
        expected=Expected(growth=counts),
    )


def summed_growth(
    state: SparseState, counts: Mapping[str, int], local: Local, *, batches: int, round_index: int
) -> tuple[Entries, int]:
    """The largest mean gradients at pruned weights over a client's mini-batches.

    Means at the places that are returned are exact; the places are the largest among the union of
    each batch's `WIDER` · count largest.

    Args:
        counts: layer -> how many at most.
        batches: how many mini-batches; 0: all of the client's training samples.

    Returns:
        The entries, and the bytes that the wider model held.
    """
    wanted = {name: WIDER * most for name, most in counts.items()}
    model, found = local.open(state), dict[str, NDArray[np.int64]]()
    for images, labels in gradient_batches(local, round_index, most=batches):
        for name, (at, _) in model.growth(wanted, images, labels).items():
            found[name] = np.union1d(found[name], at) if name in found else at
    del model  # one model at a time
    return _exact(state, found, counts, local, batches=batches, round_index=round_index)


def _exact(
    state: SparseState,
    found: Mapping[str, NDArray[np.int64]],
    counts: Mapping[str, int],
    local: Local,
    *,
    batches: int,
    round_index: int,
) -> tuple[Entries, int]:
    """The largest mean gradients among some pruned places."""
    patterns = state.patterns
    assert patterns is not None, "growth is at pruned places"
    unions = {n: np.union1d(patterns[n].positions(), at) for n, at in found.items()}
    wider = patterns.replace(
        {n: Pattern.from_positions(patterns[n].shape, at) for n, at in unions.items()}
    )
    places = {n: find(unions[n], at)[0] for n, at in found.items()}
    sums = {n: np.zeros(len(at)) for n, at in found.items()}
    samples = 0
    model = local.open(carry(state, wider))

    def collect(_: Tensors, gradients: Tensors) -> None:
        for name, at in places.items():
            sums[name] += len(labels) * gradients[name][at].astype(np.float64)

    for images, labels in gradient_batches(local, round_index, most=batches):
        model.step(images, labels, sgd=Sgd(0.0, 0.0, 0.0), correction=collect)
        samples += len(labels)
    entries = {}
    for name, total in sums.items():
        means = (total / samples).astype(np.float32)
        top = largest(np.abs(means), min(counts[name], len(means)))
        entries[name] = found[name][top], means[top]
    return entries, model.held_bytes()
