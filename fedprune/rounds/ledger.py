"""The account of a run: bytes of messages, operations, memory, seconds; nothing else counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from fedprune.exchange.messages import MODEL, Request, Resources
from fedprune.local.training import GROWTH_BATCHES, growth_counts
from fedprune.rounds.evaluation import Tested
from fedprune.rounds.setup import Setup
from sparsemodel.codec import mask_delta_entropy_bytes
from sparsemodel.runtime.state import SparseState


@dataclass
class Traffic:
    """Bytes of the messages really sent since the last `take`, and who was left out.

    Attributes:
        client_seconds: processor seconds of the clients' work; None: not known.
    """

    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)
    mask: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    client_seconds: float | None = None

    def joined(self, later: Traffic) -> Traffic:
        """Both together."""
        return Traffic(
            self.up + later.up,
            self.down + later.down,
            self.mask + later.mask,
            self.skipped + later.skipped,
            _sum(self.client_seconds, later.client_seconds),
        )


def stacked(steps: Iterable[Traffic]) -> Traffic:
    """A question in several steps, as one message a client; the largest of each step together."""
    total = Traffic()
    for step in steps:
        total = Traffic(
            _added(total.up, step.up),
            _added(total.down, step.down),
            total.mask + step.mask,
            total.skipped + step.skipped,
            _sum(total.client_seconds, step.client_seconds),
        )
    return total


def _sum(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else a + b


def _added(sizes: list[int], more: list[int]) -> list[int]:
    descending = (sorted(some, reverse=True) for some in (sizes, more))
    return [a + b for a, b in zip_longest(*descending, fillvalue=0)]


@dataclass
class Totals:
    """Counters of a run so far; they travel in the checkpoint."""

    bytes_up: int = 0
    bytes_down: int = 0
    bytes_start_up: int = 0
    bytes_start_down: int = 0
    bytes_up_steady_round: int | None = None
    bytes_down_steady_round: int | None = None
    train_flops: float = 0.0
    dense_flops: float = 0.0
    state_bytes: int = 0
    peak_rss_bytes: int = 0
    seconds: float = 0.0
    client_seconds: float | None = None
    test_accuracy: float | None = 0.0
    test_metric: float | None = None
    test_loss: float | None = None
    epsilon: float | None = None

    def count_start(self, traffic: Traffic, num_clients: int) -> None:
        """Bytes before the first round; those of the start are for one client, on average."""
        self._count_bytes(traffic)
        self.bytes_start_up = round(sum(traffic.up) / max(1, num_clients))
        self.bytes_start_down = round(sum(traffic.down) / max(1, num_clients))

    def count_round(self, traffic: Traffic, request: Request) -> None:
        """Bytes of a round. A steady one moves values only; its largest message counts.

        So does a smaller one with a mask: the model has shrunk, maybe never to rest.
        """
        self._count_bytes(traffic)
        grows = "grow" in request.fields
        down, known = max(traffic.down, default=0), self.bytes_down_steady_round
        if down and not grows and (traffic.mask == 0 or (known is not None and down < known)):
            self.bytes_down_steady_round = down
        if not grows and not request.report_resources and traffic.up:
            self.bytes_up_steady_round = max(traffic.up)

    def count_test(self, tested: Tested | None, metric: str) -> None:
        """What the newest model does; nothing is known of it where nobody could test it."""
        self.test_loss = None if tested is None else tested.loss
        self.test_metric = None if tested is None or not metric else tested.metric
        self.test_accuracy = self.test_metric if metric == "accuracy" else None

    def count_held(self, resources: Resources | None) -> None:
        """What a client held, or several at most: the largest of all counts."""
        if resources is not None:
            self.state_bytes = max(self.state_bytes, resources.state_bytes)
            self.peak_rss_bytes = max(self.peak_rss_bytes, resources.peak_rss_bytes)

    def count_training(
        self, setup: Setup, request: Request, model: SparseState, samples: Mapping[int, int]
    ) -> None:
        """Operations of the clients' training, and what dense training would have taken.

        Args:
            samples: of each client.
        """
        passes = 3 * setup.config.training.local_epochs
        dense = 2 * sum(setup.reference.layer_macs.values())
        self.dense_flops += sum(samples.values()) * passes * dense
        groups: dict[int, list[int]] = {}
        asked = request.of_each(samples)
        for client, own in asked.items():
            groups.setdefault(id(own), []).append(client)
        for clients in groups.values():  # of each question at once: there may be many clients
            own = asked[clients[0]]
            counts = [samples[client] for client in clients]
            self.train_flops += sum(counts) * passes * forward_flops_of(setup, own, model)
            self.train_flops += _growth_flops(setup, own, model, counts)

    def count_passes(
        self, setup: Setup, passes: Iterable[Mapping[str, int]], num_samples: int
    ) -> None:
        """Operations of forward passes over samples, each under its own layer counts."""
        weights = {name: _numel(shape) for name, shape in setup.shapes.items()}
        for counts in passes:
            macs = sum(
                macs // weights[name] * counts.get(name, weights[name]) if name in weights else macs
                for name, macs in setup.layer_macs.items()
            )
            self.train_flops += float(2 * macs * num_samples)

    def count_pass(self, setup: Setup, request: Request, model: SparseState, samples: int) -> None:
        """Operations of a forward pass of a question's model over so many samples, or of growth."""
        if growth_counts(request):
            self.train_flops += _growth_flops(setup, request, model, [samples])
        else:
            self.train_flops += float(forward_flops_of(setup, request, model) * samples)

    def _count_bytes(self, traffic: Traffic) -> None:
        self.bytes_up += sum(traffic.up)
        self.bytes_down += sum(traffic.down)
        self.client_seconds = _sum(self.client_seconds, traffic.client_seconds)


def forward_flops(layer_macs: Mapping[str, int], model: SparseState) -> int:
    """Floating-point operations of a forward pass of one sample: two for each
    multiply-accumulate, times the density of a pruned layer.
    """
    total = 0
    for name, macs in layer_macs.items():
        pattern = model.pattern(name)
        # Exact: every weight is used equally often, so the number of weights divides it.
        total += macs if pattern is None else macs // pattern.num_weights * pattern.num_active
    return 2 * total


def forward_flops_of(setup: Setup, request: Request, model: SparseState) -> int:
    """The same of a question's network and model, or of what it says that it takes.

    Args:
        model: of a question without one.
    """
    return 2 * request.macs or forward_flops(
        _macs_of(setup, request), request.states.get(MODEL, model)
    )


def _growth_flops(
    setup: Setup, request: Request, model: SparseState, counts: Iterable[int]
) -> float:
    """Operations of the growth that a question asks for, 0 if none, of clients of such samples.

    Of one mini-batch or several: forward and input gradient at the mask, and the whole weight
    gradient of the block's layers; of exact sums a step's forward and backward besides.
    """
    grown = growth_counts(request)
    if not grown:
        return 0.0
    macs, forward = _macs_of(setup, request), forward_flops_of(setup, request, model)
    once = 2 * forward + 2 * sum(macs[name] for name in grown)
    batches = request.fields.get(GROWTH_BATCHES, 1)
    if GROWTH_BATCHES in request.fields:
        once += 3 * forward
    most = batches * setup.config.training.batch_size
    return float(once * sum(min(n, most) if most else n for n in counts))


def _macs_of(setup: Setup, request: Request) -> Mapping[str, int]:
    return setup.layer_macs if request.program is None else request.program.layer_macs()


def mask_change(before: SparseState, after: SparseState) -> tuple[list[str], float]:
    """Layers whose pattern changed, and the fewest bytes that say so."""
    if before.patterns is None or after.patterns is None or before.patterns == after.patterns:
        return [], 0.0
    changed = [n for n, pattern in before.patterns.items() if pattern != after.patterns[n]]
    return sorted(changed), mask_delta_entropy_bytes(before.patterns, after.patterns)


def skips(traffic: Traffic) -> dict[str, Any]:
    """Who was left out, for a line of metrics."""
    return {"skipped": sorted(traffic.skipped, key=lambda entry: int(entry["client"]))}


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
