"""Ways in which a client of a fleet fails, and who fails how and when; drawn by a seed.

`schedule` knows no transport: real processes can be killed and restarted by the same one. `lie`
is a client that answers with what nobody honest sends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.flower import client, wire
from fedprune.local.data import Split
from fedprune.local.site import Local
from prunelab.runs.seeds import rng
from sparsemodel.runtime.pattern import Pattern
from sparsemodel.runtime.state import Array, SparseState

ABSENCES = {
    "killed": "gets its message and dies; the node is gone for a round, then back with a new "
    "identity and an empty state",
    "restarted": "dies while it works; back at once with a new identity and an empty state",
    "forgetful": "has lost its state, under its old identity, and asks for a re-sync",
    "silent": "never answers",
    "slow": "answers after the deadline",
    "failing": "raises an error",
}
LIES = {
    "update x -100": "the update times -100, cut to what the gate lets through",
    "update x 10": "the update times 10",
    "sign flip": "the update times -1",
    "label flip": "trained on classes in reverse",
    "noise": "the start and normal noise of three times the update's norm",
    "zeros": "all weights zero",
    "statistics": "batch-norm means of 900 and variances of 10^5",
    "huge entries": "growth entries of 10^5 at pruned places drawn at random",
    "loss": "a loss of 10^12",
    "count": "10^8 samples",
    "duplicate": "the answer twice",
    "stale": "the answer of an earlier round again",
    "nan": "a NaN among the weights",
    "huge": "a weight of 10^9",
    "wrong mask": "weights under another mask",
    "bit flip": "a frame with a bit changed",
    "garbage": "random bytes for a frame",
    "no header": "no header",
    "unasked": "a field that nobody asked for",
}
BLOCK = 20
"""Rounds after which other clients are the faulty ones."""


def schedule(
    seed: int, *, num_clients: int, rounds: int, share: float, kinds: Sequence[str]
) -> list[dict[int, str]]:
    """For the start (0) and each round: client -> how it fails.

    So many clients fail in every round; which ones is drawn anew every BLOCK rounds, and kinds are
    dealt from a shuffled deck, so that each comes up as often as any other.
    """
    generator = rng(seed)
    faulty: list[int] = []
    deck: list[str] = []
    result = []
    for round_number in range(rounds + 1):
        if round_number % BLOCK in {0, 1}:  # the start, and rounds 1, 21, ...
            order = generator.permutation(num_clients).tolist()
            faulty = sorted(order[: round(share * num_clients)])
        if len(deck) < len(faulty):
            deck += [kinds[place] for place in generator.permutation(len(kinds)).tolist()]
        result.append({who: deck.pop() for who in faulty})
    return result


@dataclass
class Liar:
    """What a lying client answers; remembers its answers for "stale"."""

    seed: int
    last: RecordDict | None = None

    def __call__(self, kind: str, message: Message, context: Context) -> Message:
        """The reply to a message, wrong in one way."""
        earlier = self.last
        if kind in BYTES:
            answer = client.app(message, context).content
            self.last = answer
            if not wire.wants_resync(answer):
                if kind == "stale":
                    answer = earlier or answer
                else:
                    header, frames = wire.read_record(answer)
                    answer = BYTES[kind](header, dict(frames), self.seed)
        else:
            answer = client.guarded(lambda: self._answer(kind, message.content, context))
        return Message(answer, reply_to=message)

    def _answer(self, kind: str, record: RecordDict, context: Context) -> RecordDict:
        request, local = client.open_request(record, context)
        if kind == "label flip":
            local = _flipped(local)
        reply = local.config.method.actions[request.action](request, local)
        changed = _selection_lie(reply) if request.action != "train" else None
        if changed is None:
            generator = rng(self.seed, request.round_index)
            changed = _changed(kind, reply, request, generator)
        return client.encode_answer(changed, request, local)


def _flipped(local: Local) -> Local:
    data = local.data
    classes = data.num_classes or 1
    turned = Split(data.train.inputs, classes - 1 - data.train.targets)
    return replace(local, data=replace(data, train=turned))


def _selection_lie(reply: Reply) -> Reply:
    """Statistics that ruin a candidate, and losses that favour the last one."""
    if "losses" in reply.fields:
        count, samples = len(reply.fields["losses"]), reply.num_examples
        losses = [1e9 * samples] * (count - 1) + [0.0]
        return replace(reply, fields={**reply.fields, "losses": losses})
    tensors = {key: _ruined(values) for key, values in reply.tensors.items()}
    return replace(reply, tensors=tensors)


def _ruined(values: Mapping[str, Array]) -> dict[str, Array]:
    """Batch-norm statistics that the gate lets through and no model survives."""
    worth = {"running_mean": 900.0, "running_var": 1e5}
    return {
        name: np.full_like(value, next((w for end, w in worth.items() if name.endswith(end)), 0.0))
        for name, value in values.items()
    }


def _changed(kind: str, reply: Reply, request: Request, generator: np.random.Generator) -> Reply:
    before, after = request.state(MODEL), reply.states.get(MODEL, request.state(MODEL))
    factors = {"update x -100": -100.0, "update x 10": 10.0, "sign flip": -1.0}
    weights = {n: v for n, v in after.values.items() if "running" not in n}
    if kind in factors:
        return _with(reply, _scaled(before, weights, factors[kind]))
    if kind == "noise":
        update = np.concatenate([(v - before.values[n]).reshape(-1) for n, v in weights.items()])
        size = 3 * float(np.linalg.norm(update)) / len(update) ** 0.5
        noise = {
            n: (before.values[n] + size * generator.standard_normal(v.shape)).astype(np.float32)
            for n, v in weights.items()
        }
        return _with(reply, noise)
    if kind == "zeros":
        return _with(reply, {name: np.zeros_like(value) for name, value in weights.items()})
    if kind == "statistics":
        return _with(reply, _ruined({n: v for n, v in after.values.items() if "running" in n}))
    if kind in {"nan", "huge"}:
        name, value = next(iter(weights.items()))
        spoiled = value.copy()
        spoiled.reshape(-1)[0] = np.nan if kind == "nan" else 1e9
        return _with(reply, {name: spoiled})
    if kind == "loss":
        return replace(reply, fields={**reply.fields, "loss": 1e12})
    if kind == "unasked":
        return replace(reply, fields={**reply.fields, "more": 1})
    if kind == "wrong mask":
        return replace(reply, states={MODEL: _moved(after)})
    if kind == "huge entries":
        return replace(reply, entries={MODEL: _entries(reply, before, generator)})
    return reply


def _with(reply: Reply, values: Mapping[str, Array]) -> Reply:
    return replace(reply, states={MODEL: reply.states[MODEL].replace(dict(values))})


def _scaled(
    before: SparseState, weights: Mapping[str, Array], factor: float
) -> dict[str, Array]:
    """The update times a factor, or as much of it as the gate's bound on norms allows."""
    start = float(sum(float(np.vdot(before.values[n], before.values[n])) for n in weights) ** 0.5)
    length = float(
        sum(float(np.sum((v - before.values[n]) ** 2)) for n, v in weights.items()) ** 0.5
    )
    most = (8 * (start + 1)) / max(length, 1e-9)
    factor = float(np.clip(factor, -most, most))
    return {
        n: (before.values[n] + factor * (v - before.values[n])).astype(np.float32)
        for n, v in weights.items()
    }


def _moved(state: SparseState) -> SparseState:
    """The same values under a mask with one place moved."""
    assert state.patterns is not None
    name, pattern = next(iter(state.patterns.items()))
    pruned = np.setdiff1d(np.arange(pattern.num_weights), pattern.positions())[:1]
    places = np.sort([*pattern.positions()[1:], *pruned])
    moved = state.patterns.replace({name: Pattern.from_positions(pattern.shape, places)})
    return SparseState(state.values, moved)


def _entries(reply: Reply, before: SparseState, generator: np.random.Generator) -> Any:
    assert before.patterns is not None
    found = {}
    for name, (indices, _) in reply.entries.get(MODEL, {}).items():
        pattern = before.patterns[name]
        pruned = np.setdiff1d(np.arange(pattern.num_weights), pattern.positions())
        chosen = np.sort(generator.choice(pruned, size=len(indices), replace=False))
        found[name] = chosen, np.full(len(indices), 1e5, np.float32)
    return found


def _count(header: dict[str, Any], frames: wire.Frames, seed: int) -> RecordDict:
    return wire.build_record({**header, "n": 10**8}, frames)


def _bit_flip(header: dict[str, Any], frames: wire.Frames, seed: int) -> RecordDict:
    name = next(iter(frames), "")
    if name:
        frame = bytearray(frames[name])
        frame[len(frame) // 2] ^= 1
        frames[name] = bytes(frame)
    return wire.build_record(header, frames)


def _garbage(header: dict[str, Any], frames: wire.Frames, seed: int) -> RecordDict:
    return wire.build_record(header, {name: rng(seed).bytes(99) for name in frames or ("w0",)})


def _no_header(header: dict[str, Any], frames: wire.Frames, seed: int) -> RecordDict:
    return RecordDict({"c": ConfigRecord({"h": "{", **frames})})


BYTES = {
    "count": _count,
    "bit flip": _bit_flip,
    "garbage": _garbage,
    "no header": _no_header,
    "stale": _no_header,
}
"""Lies that are told in bytes; "stale" is told by who remembers."""
