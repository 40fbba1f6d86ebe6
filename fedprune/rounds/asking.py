"""Who is asked in a round, and who is asked again: draws, quorum, attempts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from math import ceil
from random import SystemRandom
from typing import Protocol

from fedprune.exchange.messages import ClientInfo, Reply, Request
from fedprune.exchange.pooled import Pooled
from fedprune.rounds.folder import RunFolder
from fedprune.rounds.ledger import Traffic
from fedprune.rounds.setup import Setup
from prunelab.runs.seeds import rng

SEED_SAMPLING = 5  # the first part of a derived seed says what it is for


class Cohort(Protocol):
    """The clients, as the loop sees them; flower/server.py makes one out of Flower's Grid.

    Attributes:
        clients: by number, those that are not connected now among them.
        stacked: whether the clients of a round are trained together, on masked dense weights.
        simulated: whether they are parts of this run, and nobody's devices.
    """

    clients: Mapping[int, ClientInfo]
    stacked: bool
    simulated: bool

    def is_connected(self, client: int) -> bool:
        """Whether it was connected at the last look."""
        ...

    def look(self, *, least: int = 0, besides: Collection[int] = ()) -> None:
        """See who has come or gone; wait a while for so many connected ones `besides` these."""
        ...

    def ask(
        self,
        request: Request,
        *,
        clients: list[int] | None = None,
        among: Collection[int] = (),
        enough: int = 0,
    ) -> Iterator[tuple[int, Reply]]:
        """Send to these clients (all, by default) and yield checked replies as they arrive.

        Args:
            among: others of the same round: all share the weight.
            enough: replies after which nobody is waited for; 0: all.
        """
        ...

    def ask_sum(
        self, request: Request, *, clients: list[int] | None = None, least: int = 1
    ) -> Pooled:
        """Ask these clients (all, by default) so that nothing is seen but the sum.

        Args:
            least: answers below which not even that is seen.
        """
        ...

    def skip(self, client: int, reason: str) -> None:
        """Note that a client's answer could not be used."""
        ...

    def take_traffic(self) -> Traffic:
        """What was sent since the last call."""
        ...


def gather(
    setup: Setup, cohort: Cohort, folder: RunFolder, request: Request, *, per_round: int
) -> Iterator[tuple[int, Reply]]:
    """Ask the clients of a round until a quorum has answered, or all attempts are made.

    Answers count whenever they come: clients that have answered are not asked again, so that of
    all clients a round that had to be asked twice gives the result of one that had not.

    Args:
        per_round: how many clients a round has.
    """
    federation, draw = setup.config.federation, Draw(setup, cohort, request, per_round)
    for attempt in range(1, federation.attempts + 1):
        chosen, missing = draw.next()
        enough = missing if federation.over_sample else 0
        among = set(draw.answered)
        for client, reply in cohort.ask(request, clients=chosen, among=among, enough=enough):
            draw.answered.add(client)
            yield client, reply
        if len(draw.answered) >= draw.quorum:
            return
        _note_below(folder, request, draw, attempt)


def gather_sum(
    setup: Setup, cohort: Cohort, folder: RunFolder, request: Request, *, per_round: int
) -> Pooled:
    """The same where nothing may be seen but the sum of the answers: every attempt begins anew."""
    pooled, draw = Pooled([], 0), Draw(setup, cohort, request, per_round)
    for attempt in range(1, setup.config.federation.attempts + 1):
        chosen, _ = draw.next()
        pooled = cohort.ask_sum(request, clients=chosen, least=draw.quorum)
        if pooled.clients:
            break
        _note_below(folder, request, draw, attempt)
    return pooled


class Draw:
    """The clients that a round asks, one attempt after the other.

    Under differential privacy of clients the accounting holds for a draw of all clients of the
    run, whoever has joined by now: it is made once, and those in it alone are asked again.

    Attributes:
        quorum: how many answers the round needs.
        answered: who has.
    """

    def __init__(self, setup: Setup, cohort: Cohort, request: Request, per_round: int) -> None:
        self._setup, self._cohort, self._per_round = setup, cohort, per_round
        self._round, self._asked = request.round_index, set[int]()
        self._fixed: list[int] | None = None
        if setup.config.privacy.dp != "none":
            drawn = private_draw(setup, self._round, simulated=cohort.simulated)
            self._fixed = drawn[:per_round]
        self.quorum, self.answered = 1, set[int]()

    def next(self) -> tuple[list[int], int]:
        """Wait for a quorum; whom to ask now, ascending, and how many answers are missing."""
        self.quorum = quorum_of(self._setup, self._cohort, self._per_round)
        self._cohort.look(least=self.quorum - len(self.answered), besides=self.answered)
        missing = min(self._per_round, len(self._cohort.clients)) - len(self.answered)
        if self._fixed is not None:
            return sorted(set(self._fixed) - self.answered), missing
        # Those that are not connected give way to the next of the draw, where there are others,
        # and so do those that were asked already.
        clients = self._cohort.clients
        drawn = [c for c in ordered(self._setup, clients, self._round) if c not in self.answered]
        wanted = missing + self._setup.config.federation.over_sample
        ranks: list[list[int]] = [[], [], [], []]
        for client in drawn:
            away, again = not self._cohort.is_connected(client), client in self._asked
            ranks[2 * away + again].append(client)
            if len(ranks[0]) == wanted:  # mostly after a few of very many
                break
        chosen = sorted([client for rank in ranks for client in rank][:wanted])
        self._asked.update(chosen)
        return chosen, missing


def ordered(setup: Setup, clients: Iterable[int], round_index: int) -> list[int]:
    """These clients in the order in which a round takes them: drawn by the run's seed."""
    clients = sorted(clients)
    order = rng(SEED_SAMPLING, setup.config.seed, round_index).permutation(len(clients))
    return [clients[i] for i in order.tolist()]


def private_draw(setup: Setup, round_index: int, *, simulated: bool) -> list[int]:
    """All clients of the run so, of an order that nobody can know where they are devices."""
    privacy, everybody = setup.config.privacy, range(setup.config.data.clients)
    if privacy.dp != "central" or privacy.seeds_noise(simulated):
        return ordered(setup, everybody, round_index)
    return SystemRandom().sample(everybody, len(everybody))


def quorum_of(setup: Setup, cohort: Cohort, per_round: int) -> int:
    """How many answers a round of so many clients needs."""
    quorum = setup.config.federation.quorum
    if quorum >= 1:
        return int(quorum)
    return max(1, ceil(quorum * min(per_round, len(cohort.clients))))


def _note_below(folder: RunFolder, request: Request, draw: Draw, attempt: int) -> None:
    folder.append(
        {
            "event": "below-quorum",
            "round": request.round_index + 1,
            "asked": request.action,
            "attempt": attempt,
            "answered": sorted(draw.answered),
            "quorum": draw.quorum,
        }
    )
