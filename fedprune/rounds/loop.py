"""The round loop: one readable function for every method, engine and kind of trouble."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from math import ceil
from typing import Protocol

from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, ClientInfo, Reply, Request
from fedprune.exchange.robust import Aggregation
from fedprune.local.model import execution_of
from fedprune.methods.base import RunState, Start
from fedprune.rounds.evaluation import Evaluator
from fedprune.rounds.folder import RunFolder, save_model
from fedprune.rounds.ledger import Traffic, mask_change, skips
from fedprune.rounds.setup import Setup
from prunelab.errors import RunError
from prunelab.runs.seeds import rng
from prunelab.runs.version import __version__
from sparsemodel.runtime.state import Entries, SparseState
from sparsemodel.storage.meter import peak_rss_bytes

SEED_SAMPLING = 5  # the first part of a derived seed says what it is for


class Cohort(Protocol):
    """The clients, as the loop sees them; flower/server.py makes one out of Flower's Grid.

    Attributes:
        clients: by number, those that are not connected now among them.
        connected: those that are.
        stacked: whether the clients of a round are trained together, on masked dense weights.
    """

    clients: dict[int, ClientInfo]
    stacked: bool

    @property
    def connected(self) -> set[int]: ...

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

    def skip(self, client: int, reason: str) -> None:
        """Note that a client's answer could not be used."""
        ...

    def take_traffic(self) -> Traffic:
        """What was sent since the last call."""
        ...


def run(setup: Setup, cohort: Cohort, folder: RunFolder) -> RunState:
    """Run, or continue, until the last round; leaves model, metrics and summary in `folder`."""
    evaluator = Evaluator(setup, lambda request: cohort.ask(request, clients=_testers(cohort)))
    # Where we stand: the last checkpoint, or the method's own start.
    state = _resumed(setup, folder) or start(setup, cohort, folder)
    while state.round_index < setup.config.training.rounds:
        state = play_round(setup, cohort, folder, state, evaluator)
        folder.save(state)
    finish(setup, folder, state)
    return state


def play_round(
    setup: Setup, cohort: Cohort, folder: RunFolder, state: RunState, evaluator: Evaluator
) -> RunState:
    """One round in five steps."""
    config, totals = setup.config, folder.totals
    # 1. The method asks a question, of clients drawn by the seed.
    last = state.round_index == config.training.rounds - 1
    request = replace(setup.method.request(state), report_resources=last)
    if config.federation.clients_test:  # who tested the model has it
        request = replace(request, hold=request.hold | {MODEL})
    # 2. Replies are folded into sums as they arrive; only the sums are kept.
    fold = Fold(aggregation_of(setup), state.model)
    for client, reply in gather(setup, cohort, folder, request, per_round=config.clients_per_round):
        try:
            fold.add(client, reply)
        except ClientError as error:
            cohort.skip(client, str(error))
            continue
        totals.count_resources(reply)
    traffic = cohort.take_traffic()
    if len(fold.losses) < quorum_of(setup, cohort, config.clients_per_round):
        raise _nobody(folder, state, traffic, len(fold.losses))
    # 3. The method makes the next state of what it got.
    updated = setup.method.update(state, mean=fold.mean(), growth=fold.growth())
    # 4. The new model is evaluated on test data, for the record only.
    tested = evaluator.evaluate(updated.model, round_index=updated.round_index)
    traffic = traffic.joined(cohort.take_traffic())
    totals.count_test(tested, setup.metric)
    # 5. The round is counted and written down.
    totals.count_round(traffic, request)
    totals.count_training(setup, request, state.model, fold.samples())
    adjusted, entropy = mask_change(state.model, updated.model)
    folder.append(
        {
            "round": updated.round_index,
            "metric": setup.metric,
            "test_accuracy": totals.test_accuracy,
            "test_metric": totals.test_metric,
            "test_loss": totals.test_loss,
            **({"test_clients": tested.clients} if tested and tested.clients else {}),
            "train_loss": fold.train_loss(),
            "density": _density(updated),
            "clients": sorted(fold.losses),
            "bytes_up": sum(traffic.up),
            "bytes_down": sum(traffic.down),
            "mask_bytes": traffic.mask,
            "adjusted": adjusted,
            "mask_change_entropy_bytes": entropy,
            **skips(traffic),
        }
    )
    return updated


def gather(
    setup: Setup, cohort: Cohort, folder: RunFolder, request: Request, *, per_round: int
) -> Iterator[tuple[int, Reply]]:
    """Ask the clients of a round until a quorum has answered, or all attempts are made.

    Answers count whenever they come: clients that have answered are not asked again, so that of
    all clients a round that had to be asked twice gives the result of one that had not.

    Args:
        per_round: how many clients a round has.
    """
    federation, answered, asked = setup.config.federation, set[int](), set[int]()
    for attempt in range(1, federation.attempts + 1):
        quorum = quorum_of(setup, cohort, per_round)
        cohort.look(least=quorum - len(answered), besides=answered)
        missing = min(per_round, len(cohort.clients)) - len(answered)
        chosen = sample_clients(
            setup,
            cohort,
            request.round_index,
            count=missing + federation.over_sample,
            besides=answered,
            last=asked,
        )
        asked.update(chosen)
        enough = missing if federation.over_sample else 0
        for client, reply in cohort.ask(request, clients=chosen, among=answered, enough=enough):
            answered.add(client)
            yield client, reply
        if len(answered) >= quorum:
            return
        folder.append(
            {
                "event": "below-quorum",
                "round": request.round_index + 1,
                "asked": request.action,
                "attempt": attempt,
                "answered": sorted(answered),
                "quorum": quorum,
            }
        )


def quorum_of(setup: Setup, cohort: Cohort, per_round: int) -> int:
    """How many answers a round of so many clients needs."""
    quorum = setup.config.federation.quorum
    if quorum >= 1:
        return int(quorum)
    return max(1, ceil(quorum * min(per_round, len(cohort.clients))))


def start(setup: Setup, cohort: Cohort, folder: RunFolder) -> RunState:
    """Let the method begin."""

    def ask(request: Request) -> Iterator[tuple[int, Reply]]:
        samples = sum(info.num_dev for info in cohort.clients.values())
        folder.totals.count_passes(setup, request.forward_passes, samples)
        everybody = len(cohort.clients)
        replies = list[int]()
        for client, reply in gather(setup, cohort, folder, request, per_round=everybody):
            replies.append(client)
            yield client, reply
        if replies and len(replies) < quorum_of(setup, cohort, everybody):
            raise RunError(
                f"only {len(replies)} of {everybody} clients answered {request.action!r}, fewer "
                "than federation.quorum asks for"
            )

    server = Start(
        state=setup.start_state,
        prunable=setup.prunable,
        blocks=setup.blocks,
        ask=ask,
        rounds=setup.config.training.rounds,
        seed=setup.config.seed,
        metric=setup.metric,
        aggregation=aggregation_of(setup),
    )
    try:
        state = setup.method.start(server)
    except RunError as error:
        raise RunError(f"{error}{_reasons(cohort.take_traffic())}") from error
    traffic = cohort.take_traffic()
    folder.totals.count_start(traffic, len(cohort.clients))
    patterns = state.model.patterns
    execution = execution_of(setup.config.training, pruned=patterns is not None)
    if cohort.stacked and patterns is not None:
        execution = "masked"
    folder.append(
        {
            "event": "start",
            "clients": [
                {
                    "client": info.client,
                    "num_train": info.num_train,
                    "num_dev": info.num_dev,
                    "labels": info.label_histogram,
                }
                for _, info in sorted(cohort.clients.items())
            ],
            "density": _density(state),
            "layer_densities": None if patterns is None else patterns.densities(),
            "bytes_up": sum(traffic.up),
            "bytes_down": sum(traffic.down),
            "no_program": setup.no_program if patterns is not None else "",
            "execution": execution,
            **skips(traffic),
            **state.notes,
        }
    )
    folder.save(state)
    return state


def finish(setup: Setup, folder: RunFolder, state: RunState) -> None:
    """Write the final model and the summary."""
    config, totals, reference = setup.config, folder.totals, setup.reference
    save_model(
        folder.path,
        state.model,
        metadata={
            "dataset": setup.data.name,
            "method": config.method.name,
            "model": config.model_name,
            "width": setup.width,
            "seed": str(config.seed),
            "columns": config.data.columns,
            "task": config.training.task or setup.data.task,
            "num_classes": str(setup.data.num_classes or ""),
            "class_names": json.dumps(setup.data.class_names),
            "feature_names": json.dumps(setup.data.feature_names),
            "input_shape": "x".join(map(str, setup.data.input_shape)),
            "inputs": str(setup.data.inputs.dtype),
            **setup.data.preprocessing.to_metadata(),
        },
    )
    folder.write_summary(
        {
            "method": config.method.name,
            "dataset": config.data.dataset,
            "model": config.model_name,
            "seed": config.seed,
            "rounds": state.round_index,
            "density_target": config.method.target_density,
            "density": _density(state),
            "metric": setup.metric,
            "test_accuracy": totals.test_accuracy,
            "test_metric": totals.test_metric,
            "test_loss": totals.test_loss,
            "bytes_up": totals.bytes_up,
            "bytes_down": totals.bytes_down,
            "bytes_up_steady_round": totals.bytes_up_steady_round,
            "bytes_down_steady_round": totals.bytes_down_steady_round,
            "bytes_start_up": totals.bytes_start_up,
            "bytes_start_down": totals.bytes_start_down,
            "bytes_dense_round": reference.model_bytes,
            "train_flops_ratio": totals.train_flops / totals.dense_flops,
            "state_bytes": totals.state_bytes,
            "state_bytes_dense": 3 * 4 * reference.num_parameters,
            "peak_rss_bytes": max(totals.peak_rss_bytes, peak_rss_bytes()),
            "seconds": round(totals.seconds, 3),
            "version": __version__,
        }
    )


class Fold:
    """What is made of the replies of a round.

    Args:
        before: the model that clients trained.
    """

    def __init__(self, aggregation: Aggregation, before: SparseState) -> None:
        self._aggregation = aggregation
        self._mean = aggregation.states(before=before)
        self._growth = aggregation.entries()
        self.losses: dict[int, tuple[float, int]] = {}

    def add(self, client: int, reply: Reply) -> None:
        """Fold in one reply, everywhere or, where it is refused, nowhere.

        Raises:
            ClientError: a value is not finite or too large.
        """
        self._mean.add(reply.states[MODEL], weight=reply.weight)
        self._growth.add(reply.entries.get(MODEL, {}), weight=reply.weight)
        self.losses[client] = (float(reply.fields["loss"]), reply.num_examples)

    def mean(self) -> SparseState:
        """The clients' mean, as the run aggregates."""
        return self._mean.result()

    def growth(self) -> Entries:
        """The mean of their growth entries."""
        return self._growth.result()

    def samples(self) -> list[int]:
        """Each client's number of samples."""
        return [count for _, count in self.losses.values()]

    def train_loss(self) -> float:
        """The clients' mean loss, added up in the order of clients."""
        ordered = [self.losses[client] for client in sorted(self.losses)]
        samples = [count for _, count in ordered]
        sums = [loss * count for loss, count in ordered]
        return self._aggregation.mean_of(sums, samples=samples, weights=samples)


def aggregation_of(setup: Setup) -> Aggregation:
    """How the run makes one of its clients' answers."""
    federation, device = setup.config.federation, setup.config.training.device
    return Aggregation(
        federation.aggregation,
        clip=federation.clip,
        byzantine=federation.byzantine,
        device=None if device == "cpu" else device,
    )


def sample_clients(
    setup: Setup,
    cohort: Cohort,
    round_index: int,
    *,
    count: int,
    besides: Collection[int],
    last: Collection[int],
) -> list[int]:
    """The clients of one round: a seeded draw without replacement, ascending.

    Those that are not connected give way to the next of the draw, where there are others.

    Args:
        besides: clients that are not to be drawn.
        last: clients that are drawn where there are no others.
    """
    clients = sorted(cohort.clients)
    order = rng(SEED_SAMPLING, setup.config.seed, round_index).permutation(len(clients))
    drawn = [clients[i] for i in order.tolist() if clients[i] not in besides]
    connected = cohort.connected
    drawn.sort(key=lambda client: (client not in connected, client in last))
    return sorted(drawn[:count])


def _resumed(setup: Setup, folder: RunFolder) -> RunState | None:
    """The state of the last checkpoint, which keeps names sorted, in the order of messages.

    Raises:
        RunError: it is of another network.
    """
    state = folder.state
    if state is None:
        return None
    if state.model.shapes() != setup.shapes:
        raise RunError(
            f"the checkpoint in {folder.path} is of another network than {setup.config.model_name}:"
            " continue with the network that the run began with, or use another folder"
        )
    return replace(state, model=state.model.ordered(setup.shapes))


def _testers(cohort: Cohort) -> list[int]:
    """The clients that have something to test with."""
    return [client for client, info in sorted(cohort.clients.items()) if info.num_test]


def _nobody(folder: RunFolder, state: RunState, traffic: Traffic, answers: int) -> RunError:
    folder.append({"event": "no-reply", "round": state.round_index + 1, **skips(traffic)})
    what = f"only {answers} clients gave a usable answer, fewer than federation.quorum asks for"
    return RunError(
        f"round {state.round_index + 1}: {what if answers else 'no client gave a usable answer'}"
        f"{_reasons(traffic)}; the last checkpoint is kept, --resume continues from it"
    )


def _reasons(traffic: Traffic) -> str:
    """Why clients were skipped, those of the first three, in parentheses."""
    reasons = "; ".join(f"client {s['client']}: {s['reason']}" for s in traffic.skipped[:3])
    return f" ({reasons})" if reasons else ""


def _density(state: RunState) -> float:
    return 1.0 if state.model.patterns is None else state.model.patterns.density
