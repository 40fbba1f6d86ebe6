"""What secure aggregation costs: bytes and seconds of a client against sending in the clear.

    python -m benchmarks.privacy_cost [--quick] [--json]

Eight clients of one round, all steps: the messages are the real ones, sized as the transport sends
them. The peers: the same answer in the clear (float32, what fedprune sends without it), and
Flower's SecAgg+ as it comes (client/mod/secure_aggregation), which takes the dense model. The time
is that of one client's answers to all steps, training left out.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import Key

from benchmarks.message_bytes import INPUT, SHARE_MOVED, pruned
from benchmarks.rows import Row, add_arguments, show
from fedprune.config import RunConfig
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.exchange.pooled import pooled
from fedprune.flower import secure, wire
from fedprune.methods.base import RunState, train_request
from fedprune.privacy import secure_sum
from fedprune.privacy.vector import Spec, vector_of
from fedprune.rounds.ledger import Traffic
from prunelab.networks import build_model, float_state
from sparsemodel.runtime.state import Entries, SparseState

# The package gives a function of the same name.
peer = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")

CLIENTS = 8
SAMPLES = 5_000  # of a client
DENSITIES = (0.01, 0.05, 0.2)
MODELS = ("resnet8", "resnet18")
FLOWER = "Flower's SecAgg+, dense"


class Cohort:
    """Clients in this process that answer the steps of a secure sum; sizes and seconds of each."""

    def __init__(self, replies: Mapping[int, Reply]) -> None:
        self.config = RunConfig.parse(
            {"data.clients": len(replies), "privacy.secure_aggregation": True}
        )
        self._replies = replies
        self._kept: dict[int, dict[str, bytes]] = {client: {} for client in replies}
        self.traffic = Traffic()
        self.seconds = 0.0

    def deliver(
        self, records: Mapping[int, RecordDict], action: str
    ) -> Iterator[tuple[int, wire.Frames]]:
        for client, record in records.items():
            self.traffic.down.append(wire.record_bytes(record))
            begun = time.perf_counter()
            header, frames = wire.read_record(record)
            answer = secure.answer(
                header, frames, self._kept[client], config=self.config, client=client
            )
            self.seconds += time.perf_counter() - begun
            self.traffic.up.append(wire.record_bytes(answer))
            yield client, wire.read_record(answer)[1]

    def ask(
        self, request: Request, *, clients: list[int] | None = None
    ) -> Iterator[tuple[int, Reply]]:
        spec = Spec.read(request.fields)
        assert spec is not None
        for client in clients or self._replies:
            begun = time.perf_counter()
            words = vector_of(self._replies[client], request, spec)
            masked = secure_sum.mask(
                self._kept[client], spec.session, words, clients=spec.clients, width=spec.width
            )
            self.seconds += time.perf_counter() - begun
            reply = Reply(SAMPLES, masked=masked)
            self.traffic.up.append(
                wire.record_bytes(wire.encode_reply(reply, request, dtype="fp32"))
            )
            yield client, reply

    def skip(self, client: int, reason: str) -> None:
        raise AssertionError(f"client {client}: {reason}")

    def take_traffic(self) -> Traffic:
        taken, self.traffic = self.traffic, Traffic()
        return taken

    def count_traffic(self, traffic: Traffic) -> None:
        self.traffic = traffic.joined(self.traffic)


def rows(models: Iterable[str], densities: Iterable[float] = DENSITIES) -> Iterator[Row]:
    """Rows of every model and density: a round that moves values, and one that grows its masks."""
    for name in models:
        model = build_model(name, num_classes=10, input_shape=INPUT, seed=0)
        dense = {n: tuple(v.shape) for n, v in float_state(model).items()}
        theirs, seconds = flower_client([v.numpy() for v in float_state(model).values()])
        for density in densities:
            state = pruned(model, density)
            for kind, grows in (("values", False), ("values and growth", True)):
                request, replies = asked(state, grows=grows)
                clear = wire.record_bytes(wire.encode_reply(replies[0], request, dtype="fp32"))
                cohort = Cohort(replies)
                found = secure.ask_sum(
                    cohort,
                    request,
                    weights=dict.fromkeys(replies, SAMPLES),
                    num_clients=CLIENTS,
                    shapes=dense,
                    threshold=0.5,
                )
                plain = pooled(replies.items(), request.expected)
                for layer, value in plain.states[MODEL].values.items():
                    assert np.array_equal(found.states[MODEL].values[layer], value)
                for layer, entries in plain.growth.items():
                    assert np.array_equal(found.growth[layer][1], entries[1])
                case, size = f"{name}, {kind}", max(cohort.traffic.up) / 1000
                row = partial(Row, "privacy_cost", case, density)
                yield row(size, clear / 1000, "the same in the clear", "kB")
                if not grows:
                    yield row(size, theirs / 1000, FLOWER, "kB")
                    yield row(cohort.seconds / CLIENTS, seconds, FLOWER, "s")


def asked(state: SparseState, *, grows: bool) -> tuple[Request, dict[int, Reply]]:
    """A question for training and eight answers to it; growth in the layer that has most weights,
    half of each client's entries among those of all, by the first adjustment's rate."""
    patterns = state.patterns
    assert patterns is not None
    largest = max(patterns, key=lambda name: patterns[name].num_weights)
    count = int(SHARE_MOVED / 2 * patterns[largest].num_active)
    request = train_request(RunState(0, state), growth={largest: count} if grows else None)
    pruned_places = np.setdiff1d(
        np.arange(patterns[largest].num_weights), patterns[largest].positions()
    )
    replies = {}
    for client in range(CLIENTS):
        draw = np.random.default_rng(client)
        values = {
            n: v * (1 + 0.1 * draw.random(v.shape, np.float32)) for n, v in state.values.items()
        }
        shared = pruned_places[: count // 2]
        own = draw.choice(pruned_places[count // 2 :], count - len(shared), replace=False)
        places = np.sort(np.concatenate([shared, own]))
        entries: Entries = {largest: (places, draw.normal(size=count).astype(np.float32))}
        reply = Reply(SAMPLES, {"loss": 1.0}, {MODEL: replace(state, values=values)})
        replies[client] = replace(reply, entries={MODEL: entries}) if grows else reply
    return request, replies


def flower_client(arrays: list[np.ndarray[Any, Any]]) -> tuple[int, float]:
    """Bytes and seconds of one of eight clients of Flower's SecAgg+, by its own functions."""
    nodes = range(1, CLIENTS + 1)
    states = {node: peer.SecAggPlusState(nid=node) for node in nodes}
    sent, seconds = 0, 0.0

    def step(node: int, work: Any, *given: Any) -> dict[str, Any]:
        nonlocal sent, seconds
        begun = time.perf_counter()
        answer: dict[str, Any] = work(states[node], *given)
        if node == 1:
            seconds += time.perf_counter() - begun
            sent += wire.record_bytes(RecordDict({"configs": ConfigRecord(answer)}))
        return answer

    setup = {
        Key.SAMPLE_NUMBER: CLIENTS, Key.SHARE_NUMBER: CLIENTS, Key.THRESHOLD: CLIENTS // 2 + 1,
        Key.CLIPPING_RANGE: 8.0, Key.TARGET_RANGE: 2**22, Key.MOD_RANGE: 2**32,
        Key.MAX_WEIGHT: float(SAMPLES),
    }  # fmt: skip
    keys = {node: step(node, peer._setup, ConfigRecord(setup)) for node in nodes}
    listed = {
        str(node): [keys[node][Key.PUBLIC_KEY_1], keys[node][Key.PUBLIC_KEY_2]] for node in nodes
    }
    shares = {node: step(node, peer._share_keys, ConfigRecord(listed)) for node in nodes}
    sources, sealed = [], []
    for node in list(nodes)[1:]:
        place = shares[node][Key.DESTINATION_LIST].index(1)
        sources.append(node)
        sealed.append(shares[node][Key.CIPHERTEXT_LIST][place])
    received = ConfigRecord({Key.SOURCE_LIST: sources, Key.CIPHERTEXT_LIST: sealed})
    step(1, peer._collect_masked_vectors, received, SAMPLES, ndarrays_to_parameters(arrays))
    left = {Key.ACTIVE_NODE_ID_LIST: list(nodes), Key.DEAD_NODE_ID_LIST: []}
    step(1, peer._unmask, ConfigRecord(left))
    return sent, seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.privacy_cost")
    add_arguments(parser, quick="resnet8 only")
    arguments = parser.parse_args()
    show(rows(MODELS[:1] if arguments.quick else MODELS), arguments)


if __name__ == "__main__":
    main()
