"""Width tiers, which HeteroFL and FjORD share: a client trains the first channels of each layer.

A client of rate r holds, trains and sends the network of ⌈r c⌉ of each layer's c channels, which
is physically smaller: the leading slices of the global tensors (sparsemodel/runtime/narrow.py).
The server averages each coordinate over the clients that have it, weighted by their samples, and
leaves a coordinate that none of them has as it was. Running statistics of batch norms are those of
another network where inputs are fewer, so the widest clients' alone go into the global model.

A narrower client needs no torch: its network comes as a program, which the runtime computes with
whole layers. On one core that takes .27 to .76 of the time of torch's dense step for residual
networks of 8 or 16 channels in the first stage, and 1.18 of it for 32 (benchmarks/dense_steps.py);
the widest clients train as those of dense federated averaging do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedprune.exchange.aggregate import StateMean, WeightedMean
from fedprune.exchange.gate import is_statistic
from fedprune.exchange.messages import MODEL, Expected, Reply, Request
from fedprune.exchange.pooled import Pooled
from fedprune.local.training import require_samples
from fedprune.methods.base import AskSome, Method, RunState, Start, Test, train_request
from prunelab.errors import RunError
from prunelab.runs.seeds import rng
from sparsemodel.errors import ProgramError
from sparsemodel.runtime.fixed_sum import FixedSum
from sparsemodel.runtime.narrow import leading, narrowed, output_layer
from sparsemodel.runtime.pattern import Shape
from sparsemodel.runtime.program import Program
from sparsemodel.runtime.state import Array, SparseState, Tensors

if TYPE_CHECKING:
    from fedprune.local.site import Local

SEED_TIERS, SEED_WIDTHS = 6, 7  # the first part of a derived seed says what it is for
MEASURE, STATISTICS = "measure", "statistics"


# --- client half -------------------------------------------------------------------------------


def measure(request: Request, local: Local) -> Reply:
    """Statistics of every batch norm over the client's training samples, in train mode."""
    require_samples(len(local.data.train), request)
    statistics = local.open(request.state(MODEL)).statistics(local.data.train.inputs)
    return Reply(len(local.data.train), tensors={STATISTICS: statistics})


# --- server half -------------------------------------------------------------------------------


@dataclass(frozen=True)
class WidthTiers(Method):
    """Dense federated averaging of clients of several widths.

    Attributes:
        tiers: "rate:share, ...": share of the channels, the largest of them 1, and share of the
            clients; a share may be left out for 1, and they need not add up to 1.
        static_norm: whether the widest clients measure the statistics of batch norms of each
            round's model on their training samples; otherwise they are the mean of what their
            training left.
    """

    collects: ClassVar[bool] = True

    tiers: str = "1:1, 0.5:1, 0.25:1"
    static_norm: bool = True

    def problems(self) -> Iterable[str]:
        yield from super().problems()
        try:
            rates = list(parse_tiers(self.tiers))
        except ValueError:
            yield f"tiers: expected 'rate:share, ...', such as '1:1, 0.5:2', got {self.tiers!r}"
            return
        if max(rates) != 1:
            yield f"tiers: expected 1 as the largest rate, got {max(rates):g}"

    def start(self, server: Start) -> RunState:
        if server.program is None:
            raise RunError(
                f"{self.name} makes narrower networks of the run's program, and it has none "
                f"({server.no_program or 'no reason is known'}); use another network or method"
            )
        memory = {
            "program": server.program.text(),
            "seed": server.seed,
            "clients": server.num_clients,
            "rounds": server.rounds,
        }
        state = RunState(0, server.state(), memory)
        try:
            tiers = self.plan(state).tiers
        except ProgramError as error:
            raise RunError(f"{self.name}: {error}") from None
        empty = [tier.rate for tier in tiers if not tier.clients]
        if empty:
            raise RunError(
                f"{self.name}: method.tiers gives none of {server.num_clients} clients the rate "
                f"{empty[0]:g}; leave it out, or take more clients"
            )
        return replace(state, notes={"tiers": [tier.told() for tier in tiers]})

    def plan(self, state: RunState) -> Plan:
        """The tiers of a run."""
        memory = state.memory
        return _plan(self, memory["program"], memory["seed"], memory["clients"])

    def network(self, program: Program, rate: float) -> Program:
        """The network of a rate, as clients train it."""
        return narrowed(program, rate)

    def question(self, state: RunState, tier: Tier, plan: Plan) -> Request:
        """What a tier's clients are asked in the coming round.

        The widest train the run's own network, so that with them alone all is as without tiers.
        """
        model = leading(state.model, tier.shapes)
        request = train_request(replace(state, model=model))
        return replace(request, program=tier.other)

    def request(self, state: RunState) -> Request:
        plan = self.plan(state)
        own = [self.question(state, tier, plan) for tier in plan.tiers]
        return replace(own[0], personal=lambda client: own[plan.tier_of(client)])

    def collector(self, state: RunState) -> TierMean:
        return TierMean(self.plan(state), state.model)

    def update(self, state: RunState, pooled: Pooled) -> RunState:
        held = {**state.memory.get("held", {}), **pooled.fields.get("held", {})}
        return replace(super().update(state, pooled), memory={**state.memory, "held": held})

    def settle(self, state: RunState, ask: AskSome) -> RunState:
        tiers = self.plan(state).tiers
        last = state.round_index == state.memory["rounds"]
        asked = tiers[0 if self.static_norm else 1 : len(tiers) if last else 1]
        found = {}
        for tier in asked:
            if statistics := _measured(state, tier, ask):
                found[tier.rate] = statistics
        model = state.model.replace(found.pop(tiers[0].rate, {}))
        listed = {
            f"{rate:g}": {name: value.tolist() for name, value in own.items()}
            for rate, own in found.items()
        }
        return replace(state, model=model, memory={**state.memory, STATISTICS: listed})

    def account(self, state: RunState, test: Test) -> dict[str, Any]:
        plan, held, told = self.plan(state), state.memory.get("held", {}), []
        for tier in plan.tiers:
            key = f"{tier.rate:g}"
            line = {**tier.told(), "state_bytes": held.get(key)}
            measured = state.memory.get(STATISTICS, {}).get(key, {})
            has_norms = any(map(is_statistic, tier.shapes))
            if tier.other is not None and (measured or not has_norms):
                statistics = {n: np.array(v, np.float32) for n, v in measured.items()}
                own = leading(state.model, tier.shapes).replace(statistics)
                if (score := test(tier.program, own)) is not None:
                    line |= {"test_loss": score.loss, "test_metric": score.metric}
            told.append(line)
        return {"tiers": told}


@dataclass(frozen=True, eq=False)
class Tier:
    """Clients of one width.

    Attributes:
        rate: share of the channels.
        program: of their network.
        other: the same where it is not the run's network.
        clients: ascending.
        macs: of a forward pass.
    """

    rate: float
    program: Program
    other: Program | None
    clients: list[int]

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of the tensors of their network."""
        return self.program.shapes()

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of a forward pass of one sample."""
        return sum(self.program.layer_macs().values())

    def told(self) -> dict[str, Any]:
        """For the account: what one of them holds of the model, sends and computes."""
        numbers = sum(math.prod(shape) for shape in self.shapes.values())
        return {
            "rate": self.rate,
            "clients": len(self.clients),
            "model_bytes": 4 * numbers,
            "macs": self.macs,
        }


@dataclass(frozen=True, eq=False)
class Plan:
    """The tiers of a run, the widest first."""

    tiers: list[Tier]
    number: NDArray[np.int64] = field(repr=False)

    def tier_of(self, client: int) -> int:
        """The number of a client's tier."""
        return int(self.number[client])


@lru_cache(maxsize=4)
def _plan(method: WidthTiers, text: str, seed: int, clients: int) -> Plan:
    program, shares = Program.parse(text), parse_tiers(method.tiers)
    output_layer(program)  # refuses what has none
    number = assigned(list(shares.values()), clients, seed=seed)
    tiers = []
    for place, rate in enumerate(shares):
        own = method.network(program, rate)
        members = np.flatnonzero(number == place).tolist()
        tiers.append(Tier(rate, own, None if rate == 1 else own, members))
    return Plan(tiers, number)


def parse_tiers(text: str) -> dict[float, float]:
    """Rate -> share of "rate:share, ...", the widest first.

    Raises:
        ValueError: it is of another form, or a number out of its range.

    >>> parse_tiers("0.25, 1:2")
    {1.0: 2.0, 0.25: 1.0}
    """
    found: dict[float, float] = {}
    for part in text.split(","):
        rate, colon, share = part.partition(":")
        numbers = float(rate), float(share) if colon else 1.0
        if not (0 < numbers[0] <= 1 and 0 < numbers[1] < math.inf) or numbers[0] in found:
            raise ValueError(part)
        found[numbers[0]] = numbers[1]
    return dict(sorted(found.items(), reverse=True))


def assigned(shares: list[float], clients: int, *, seed: int) -> NDArray[np.int64]:
    """The tier of each client: numbers by the largest remainders, who it is by the seed.

    >>> np.bincount(assigned([1.0, 0.5, 0.25], 7, seed=0)).tolist()
    [4, 2, 1]
    """
    exact = np.array(shares) * clients / sum(shares)
    counts = np.floor(exact).astype(np.int64)
    rest = np.argsort(counts - exact, kind="stable")[: clients - counts.sum()]
    counts[rest] += 1
    order = rng(SEED_TIERS, seed).permutation(clients)
    number = np.empty(clients, np.int64)
    number[order] = np.repeat(np.arange(len(shares)), counts)
    return number


def _measured(state: RunState, tier: Tier, ask: AskSome) -> Tensors:
    """Pooled statistics of a tier's network under the model; none where nobody could measure."""
    names = [name for name in tier.shapes if is_statistic(name)]
    if not names:
        return {}
    request = Request(
        MEASURE,
        state.round_index,
        states={MODEL: leading(state.model, tier.shapes)},
        expected=Expected(tensors={STATISTICS: names}),
        program=tier.other,
    )
    mean = StateMean()
    for _, reply in ask(request, among=set(tier.clients)):
        mean.add(SparseState(reply.tensors[STATISTICS]).ordered(names), weight=reply.weight)
    return mean.result().values if mean.num_replies else {}


class TierMean:
    """The mean of each coordinate over the clients that have it.

    Sums are integers, so that the order of replies makes no difference; memory is that of the
    tiers' networks, whatever the number of clients.

    Args:
        before: the model that was sent; what nobody has stays as it is there.
        rows: names of tensors of which each client counts for some rows alone, those in its field
            "classes".
    """

    def __init__(self, plan: Plan, before: SparseState, *, rows: Collection[str] = ()) -> None:
        self._plan, self._before, self._rows = plan, before, rows
        self._means = [WeightedMean() for _ in plan.tiers]
        self._statistics = StateMean()
        self._of_class: dict[tuple[int, int], WeightedMean] = {}
        self._weights: dict[int, int] = {}
        self._held: dict[str, int] = {}

    def add(self, client: int, reply: Reply) -> None:
        """Take one reply.

        Raises:
            ClientError: a value is not finite or too large; nothing has changed then.
        """
        number, values = self._plan.tier_of(client), reply.states[MODEL].values
        shared, own, statistics = dict[str, Array](), dict[str, Array](), dict[str, Array]()
        for name, value in values.items():
            kind = own if name in self._rows else statistics if is_statistic(name) else shared
            kind[name] = value
        for apart in (own, statistics):
            WeightedMean().add(apart, weight=reply.weight)  # refuses before anything has changed
        self._means[number].add(shared, weight=reply.weight)
        if statistics and number == 0:
            self._statistics.add(SparseState(statistics), weight=reply.weight)
        for row in reply.fields["classes"] if own else ():
            mean = self._of_class.setdefault((number, row), WeightedMean())
            mean.add({n: value[row : row + 1] for n, value in own.items()}, weight=reply.weight)
        self._weights[client] = reply.weight
        if reply.resources is not None:
            key = f"{self._plan.tiers[number].rate:g}"
            self._held[key] = max(self._held.get(key, 0), reply.resources.state_bytes)

    def result(self) -> Pooled:
        """The model that they make."""
        values = dict(self._before.values)
        for name, before in self._before.values.items():
            if name in self._rows:
                values[name] = self._by_rows(name, before)
            elif not is_statistic(name):
                values[name] = _joined(name, before, self._means)
        if self._statistics.num_replies:
            values |= self._statistics.result().values
        model = SparseState({name: values[name] for name in self._before.values})
        return Pooled(
            sorted(self._weights),
            sum(self._weights.values()),
            {"held": self._held},
            states={MODEL: model},
        )

    def _by_rows(self, name: str, before: Array) -> Array:
        parts = []
        for row in range(len(before)):
            means = [mean for (_, own), mean in self._of_class.items() if own == row]
            parts.append(_joined(name, before[row : row + 1], means))
        return np.concatenate(parts)


def _joined(name: str, before: Array, means: Iterable[WeightedMean]) -> Array:
    """Sums of leading slices of one tensor as the mean of each coordinate."""
    total, weights = FixedSum(before.shape), np.zeros(before.shape, np.int64)
    places = np.arange(before.size).reshape(before.shape)
    for mean in means:
        if mean.total_weight:
            own = mean.sum_of(name)
            part = tuple(slice(size) for size in own.shape)
            total.take(own, places[part].reshape(-1))
            weights[part] += mean.total_weight
    joined = total.mean(1) / np.maximum(weights, 1)
    return np.where(weights > 0, joined.astype(np.float32), before)
