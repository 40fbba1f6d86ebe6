"""The round loop: one readable function for every method, engine and kind of trouble."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from fedprune.errors import ClientError
from fedprune.exchange.messages import MODEL, Fields, Reply, Request, Resources
from fedprune.exchange.pooled import Pooled, Pooler
from fedprune.exchange.robust import Aggregation, States
from fedprune.local.model import execution_of
from fedprune.methods.base import AskSome, RunState, Start
from fedprune.privacy.accounting import epsilon
from fedprune.privacy.noise import question, released
from fedprune.privacy.randomness import new_key, seeded_key
from fedprune.rounds.asking import Cohort, gather, gather_sum, ordered, quorum_of
from fedprune.rounds.evaluation import Evaluator, tested_by_server
from fedprune.rounds.folder import RunFolder, save_model
from fedprune.rounds.ledger import Traffic, mask_change, skips, stacked
from fedprune.rounds.population import told
from fedprune.rounds.server_optimizer import Moments, followed, stepped
from fedprune.rounds.setup import Setup
from prunelab.errors import RunError
from prunelab.runs.version import __version__
from sparsemodel.runtime.state import SparseState
from sparsemodel.storage.meter import peak_rss_bytes


def run(setup: Setup, cohort: Cohort, folder: RunFolder) -> RunState:
    """Run, or continue, until the last round; leaves model, metrics and summary in `folder`."""
    evaluator = Evaluator(
        setup,
        lambda request: cohort.ask(request, clients=_testers(cohort)),
        pooler=_sums(setup, lambda request: cohort.ask_sum(request, clients=_testers(cohort))),
    )
    if setup.config.privacy.dp != "none":  # whether it can be accounted for, before it is spent
        epsilon(setup.config.privacy, releases=1, asked=1, clients=1)
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
    privacy = config.privacy
    if privacy.dp != "none":
        request = question(request, privacy)
    # 2. Replies are folded into sums as they arrive; only the sums are kept.
    sent, per_round = request.states[MODEL], config.clients_per_round
    fold = Fold(setup, state, sent)
    if privacy.secure_aggregation:  # nobody's answer is seen alone
        fold.take(gather_sum(setup, cohort, folder, request, per_round=per_round), cohort)
        totals.count_held(fold.resources)
    else:
        for client, reply in gather(setup, cohort, folder, request, per_round=per_round):
            try:
                fold.add(client, reply)
            except ClientError as error:
                cohort.skip(client, str(error))
                continue
            totals.count_held(reply.resources)
    traffic = cohort.take_traffic()
    if len(fold.losses) < quorum_of(setup, cohort, per_round):
        raise _nobody(folder, state, traffic, len(fold.losses))
    # 3. The method makes the next state of what it got.
    pooled = fold.pooled()
    if privacy.dp != "none":
        seeded = privacy.seeds_noise(cohort.simulated)
        key = seeded_key("noise", config.seed, state.round_index) if seeded else new_key()
        mean = released(sent, pooled.model, privacy, num_clients=len(fold.losses), key=key)
        pooled = pooled.with_model(mean)
    pooled, moments = _stepped(setup, state, sent, pooled)
    updated = setup.method.update(state, pooled)
    updated = setup.method.settle(updated, _asking(setup, cohort, folder, updated))
    traffic = stacked([traffic, cohort.take_traffic()])  # what a client is sent in a round
    updated = replace(updated, kept={**updated.kept, **followed(moments, updated.model)})
    # 4. The new model is evaluated on test data, for the record only.
    own = setup.method.personal(updated)
    tested = evaluator.evaluate(updated.model, round_index=updated.round_index, personal=own)
    traffic = traffic.joined(cohort.take_traffic())
    totals.count_test(tested, setup.metric)
    # 5. The round is counted and written down.
    totals.count_round(traffic, request)
    totals.count_training(setup, request, sent, fold.samples())
    if privacy.dp != "none":
        totals.epsilon = epsilon(
            privacy,
            releases=_releases(setup, updated.round_index),
            asked=per_round,
            clients=config.data.clients,
        )
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
            **_spent(setup, folder),
            **skips(traffic),
        }
    )
    return updated


def start(setup: Setup, cohort: Cohort, folder: RunFolder) -> RunState:
    """Let the method begin."""

    def count_passes(request: Request) -> None:
        samples = sum(info.samples(request.on) for info in cohort.clients.values())
        folder.totals.count_passes(setup, request.forward_passes, samples)
        batches = setup.config.training.batch_size * len(cohort.clients)
        folder.totals.count_passes(setup, request.batch_passes, batches)

    def check_quorum(request: Request, answered: int, asked: int) -> None:
        if answered and answered < quorum_of(setup, cohort, asked):
            raise RunError(
                f"only {answered} of {asked} clients answered {request.action!r}, fewer than "
                "federation.quorum asks for"
            )

    def ask(request: Request) -> Iterator[tuple[int, Reply]]:
        check_single(setup, request)
        count_passes(request)
        answered, asked = 0, request.num_clients or len(cohort.clients)
        for answer in gather(setup, cohort, folder, request, per_round=asked):
            answered += 1
            yield answer
        check_quorum(request, answered, asked)

    def ask_sum(request: Request) -> Pooled:
        count_passes(request)
        everybody = len(cohort.clients)
        pooled = gather_sum(setup, cohort, folder, request, per_round=everybody)
        check_quorum(request, len(pooled.clients), everybody)
        return pooled

    server = Start(
        state=setup.start_state,
        prunable=setup.prunable,
        blocks=setup.blocks,
        ask=ask,
        rounds=setup.config.training.rounds,
        seed=setup.config.seed,
        metric=setup.metric,
        aggregation=aggregation_of(setup),
        pooler=_sums(setup, ask_sum),
        place=setup.place,
        num_clients=setup.config.data.clients,
        program=setup.program,
        no_program=setup.no_program,
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
            **told(cohort.clients),
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
            "client_seconds": totals.client_seconds and round(totals.client_seconds, 3),
            **_spent(setup, folder),
            **setup.method.account(state, partial(tested_by_server, setup)),
            "version": __version__,
        }
    )


class Fold:
    """What is made of the replies of a round.

    Args:
        state: before the round.
        sent: the model that clients trained.
    """

    def __init__(self, setup: Setup, state: RunState, sent: SparseState) -> None:
        self._aggregation = aggregation = aggregation_of(setup)
        self._collector = setup.method.collector(state)
        updates = setup.config.privacy.dp != "none"
        self._mean = aggregation.states(before=sent, updates=updates)
        self._growth = aggregation.entries()
        self._tensors: dict[str, States] = {}
        self._weight = 0
        self._pooled: Pooled | None = None
        self.losses: dict[int, tuple[float, int]] = {}
        self.resources: Resources | None = None

    def add(self, client: int, reply: Reply) -> None:
        """Fold in one reply, everywhere or, where it is refused, nowhere.

        Raises:
            ClientError: a value is not finite or too large.
        """
        if self._collector is not None:
            self._collector.add(client, reply)
        else:
            if MODEL in reply.states:
                self._mean.add(reply.states[MODEL], weight=reply.weight)
            self._growth.add(reply.entries.get(MODEL, {}), weight=reply.weight)
            for name, tensors in reply.tensors.items():
                mean = self._tensors.setdefault(name, self._aggregation.states())
                mean.add(SparseState(tensors), weight=reply.weight)
        self._weight += reply.weight
        self.losses[client] = (_loss(reply.fields), reply.num_examples)

    def take(self, pooled: Pooled, cohort: Cohort) -> None:
        """Take means that were made elsewhere; of single clients only their samples are known."""
        self._pooled, self.resources = pooled, pooled.resources
        for client in pooled.clients:
            self.losses[client] = (_loss(pooled.fields), cohort.clients[client].num_train)

    def pooled(self) -> Pooled:
        """The clients' answers made one, as the method or the run does it."""
        if self._pooled is not None:
            return self._pooled
        if self._collector is not None:
            return self._collector.result()
        return Pooled(
            sorted(self.losses),
            self._weight,
            states={MODEL: self._mean.result()} if self._mean.num_replies else {},
            tensors={name: mean.result().values for name, mean in self._tensors.items()},
            growth=self._growth.result(),
        )

    def samples(self) -> dict[int, int]:
        """Each client's number of samples."""
        return {client: count for client, (_, count) in self.losses.items()}

    def train_loss(self) -> float | None:
        """The clients' mean loss, added up in the order of clients; None where it is not told."""
        told = [self.losses[client] for client in sorted(self.losses)]
        samples = [count for _, count in told]
        sums = [loss * count for loss, count in told]
        mean = self._aggregation.mean_of(sums, samples=samples, weights=samples)
        return None if math.isnan(mean) else mean


def aggregation_of(setup: Setup) -> Aggregation:
    """How the run makes one of its clients' answers."""
    federation, device = setup.config.federation, setup.config.training.device
    return Aggregation(
        federation.aggregation,
        clip=federation.clip,
        byzantine=federation.byzantine,
        device=None if device == "cpu" else device,
    )


def check_single(setup: Setup, request: Request) -> None:
    """Raise RunError where nobody's answer is to be seen alone."""
    if setup.config.privacy.secure_aggregation:
        raise RunError(
            f"method {setup.config.method.name!r} asks {request.action!r} of single clients, and "
            "privacy.secure_aggregation hides them; a method that calls server.pooled works with "
            "both"
        )


def _asking(setup: Setup, cohort: Cohort, folder: RunFolder, state: RunState) -> AskSome:
    """How a method asks clients of the model that a round has made."""

    def ask(request: Request, *, among: Collection[int]) -> Iterator[tuple[int, Reply]]:
        check_single(setup, request)
        drawn = [c for c in ordered(setup, cohort.clients, state.round_index) if c in among]
        chosen = sorted(drawn[: setup.config.clients_per_round])
        for client, reply in cohort.ask(request, clients=chosen):
            folder.totals.count_pass(setup, request, state.model, reply.num_examples)
            yield client, reply

    return ask


def _stepped(
    setup: Setup, state: RunState, sent: SparseState, pooled: Pooled
) -> tuple[Pooled, Moments]:
    """The mean after the server's own step towards it, and what its optimiser remembers.

    Raises:
        RunError: there is no mean that a step could be taken to.
    """
    server = setup.config.server
    if server.optimizer == "none":
        return pooled, {}
    if MODEL not in pooled.states:
        raise RunError(
            f"server.optimizer: method {setup.config.method.name!r} makes no mean of clients' "
            "models that a step could be taken to; leave it at 'none'"
        )
    model, moments = stepped(sent, pooled.model, state.kept, server)
    return pooled.with_model(model), moments


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


def _releases(setup: Setup, rounds: int) -> int:
    """Rounds so far; of noise that clients add themselves, answers of the busiest client."""
    config = setup.config
    if config.privacy.dp == "central":
        return rounds
    everybody, asked = range(config.data.clients), config.clients_per_round
    drawn = Counter(c for index in range(rounds) for c in ordered(setup, everybody, index)[:asked])
    return max(drawn.values())


def _spent(setup: Setup, folder: RunFolder) -> dict[str, Any]:
    """What differential privacy amounts to so far; empty where there is none."""
    privacy = setup.config.privacy
    if privacy.dp == "none":
        return {}
    return {"epsilon": folder.totals.epsilon, "delta": privacy.delta}


def _loss(fields: Fields) -> float:
    return float(fields.get("loss", math.nan))


def _sums(setup: Setup, pooler: Pooler) -> Pooler | None:
    """How answers are added up where nobody's is seen alone."""
    return pooler if setup.config.privacy.secure_aggregation else None


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
