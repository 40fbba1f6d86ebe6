"""Training under a memory budget: what a message will need, told before anything is made for it.

What counts is the whole process as the kernel sees it: what is resident now, the model in training
(`sparsemodel.runtime.footprint`), its batches, and the answer. The same bits come from recomputing
activations; where that does not suffice, batches become smaller, which changes the bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedprune.errors import ClientError
from fedprune.local.model import uses_runtime
from fedprune.local.optimizer import is_plain
from fedprune.local.training import growth_counts
from prunelab.pages.units import format_bytes
from sparsemodel.runtime.footprint import training_footprint
from sparsemodel.runtime.memory import give_back
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.meter import rss_bytes

if TYPE_CHECKING:
    from fedprune.exchange.messages import Request
    from fedprune.local.site import Local

SMALLEST_BATCH = 2  # batch norm needs two
_ALLOWANCE = 2 << 20  # what imports on the way, Python's own objects and the heap's gaps take
_BATCH_COPIES = 4  # a batch, and what augmentation makes of it
_ENTRY_BYTES = 40  # a growth entry on its way from the library's lists into a frame
_SHARED = 3  # values, gradients and momentum that several networks have in common
_ANSWER_COPIES = 4  # of the values: state, frame, record, Flower's message


@dataclass(frozen=True)
class Choice:
    """How a model is trained: the largest batch of its plan, and what is computed again."""

    batch_size: int
    recompute: bool


def choices(batch_size: int, *, recompute: bool) -> Iterator[Choice]:
    """From the setting as it is to the least memory.

    >>> [(c.batch_size, c.recompute) for c in choices(8, recompute=False)]
    [(8, False), (8, True), (4, True), (2, True)]
    """
    if not recompute:
        yield Choice(batch_size, False)
    while batch_size >= SMALLEST_BATCH:
        yield Choice(batch_size, True)
        batch_size //= 2


def fitting(local: Local, request: Request, *, budget: int) -> tuple[Local, str]:
    """The client's place with settings under which the answer stays below the budget.

    Args:
        budget: bytes of the whole process.

    Returns:
        The place, and what was changed, for people; "" where nothing was.

    Raises:
        ClientError: nothing fits; says what it would need.
    """
    training = local.config.training
    states = list(request.states.values())
    if not states:
        return local, ""
    if not all(uses_runtime(local.network, state, training) for state in states):
        raise ClientError(
            "this network, or a dense model, needs torch here, of which nobody can tell beforehand "
            f"what it takes; the device's budget is {format_bytes(budget)}"
        )
    program = local.network.program
    assert program is not None, "the runtime's networks have one"
    give_back()
    held = rss_bytes()
    sample = local.data.train.inputs[:1].nbytes
    grown = sum(growth_counts(request).values()) if "grow" in request.fields else 0
    networks = local.config.method.networks(request, program)
    moments = (0 if is_plain(training) else 2) + (_SHARED if len(networks) > 1 else 0)
    needs = {
        choice: held + max(
            sum(
                needed(
                    network, state,
                    # A plan is made for one sample more: the last batch may be larger by one.
                    batch=choice.batch_size + 1, recompute=choice.recompute,
                    sample_bytes=sample, threads=training.threads, momentum=training.momentum > 0,
                    moments=moments, growth=grown,
                )
                for network in networks
            )
            for state in states
        )
        for choice in choices(training.batch_size, recompute=training.recompute)
    }  # fmt: skip
    for choice, need in needs.items():
        if need <= budget:
            return _with(local, choice), _told(choice, training.batch_size, need)
    asked, least = next(iter(needs.values())), min(needs.values())
    raise ClientError(
        f"the device's budget of {format_bytes(budget)} is too small: the process would need "
        f"{format_bytes(asked)} as the run is set, and {format_bytes(least)} with batches of "
        f"{SMALLEST_BATCH}; {format_bytes(held)} of them before it begins"
    )


def needed(
    program: Program,
    state: SparseState,
    *,
    batch: int,
    recompute: bool,
    sample_bytes: int,
    threads: int,
    momentum: bool = True,
    moments: int = 0,
    growth: int = 0,
) -> int:
    """Bytes that training and answering add to what a process holds, at most.

    Args:
        batch: the largest.
        sample_bytes: of one input as it is stored.
        moments: arrays that the optimiser keeps for each parameter beside momentum.
        growth: entries at pruned places that are asked for.
    """
    held = training_footprint(
        program, state.patterns,
        batch_size=batch, recompute=recompute, threads=threads, momentum=momentum,
    )  # fmt: skip
    training = held.total + held.values * (1 + moments) + growth * _ENTRY_BYTES
    answering = held.values * _ANSWER_COPIES + growth * _ENTRY_BYTES
    return max(training, answering) + batch * sample_bytes * _BATCH_COPIES + _ALLOWANCE


def _with(local: Local, choice: Choice) -> Local:
    training = replace(
        local.config.training, batch_size=choice.batch_size, recompute=choice.recompute
    )
    if training == local.config.training:
        return local
    return replace(local, config=replace(local.config, training=training))


def _told(choice: Choice, batch_size: int, need: int) -> str:
    changed = "activations computed again" if choice.recompute else "as the run is set"
    if choice.batch_size != batch_size:
        changed += f", batches of {choice.batch_size} instead of {batch_size} (other bits)"
    return f"{changed}; {format_bytes(need)} at most"
