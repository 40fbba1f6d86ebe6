"""Ways in which a client of a fleet fails, and who fails how and when; drawn by a seed.

`schedule` knows no transport: real processes can be killed and restarted by the same one. `lie`
is a client that answers with what nobody honest sends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedprune.exchange.gate import is_statistic
from fedprune.exchange.messages import MODEL, Reply, Request
from fedprune.flower import client, wire
from fedprune.local.data import Split
from fedprune.local.site import Local
from prunelab.runs.seeds import rng
from sparsemodel.runtime.pattern import Pattern
from sparsemodel.runtime.state import Array, SparseState

# These befall the first message of a round; one that is sent again is answered.
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
FAULTS = {**ABSENCES, **LIES}
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
        if round_number == 0 or round_number % BLOCK == 1:  # the start, and rounds 1, 21, ...
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
        if kind in BYTES or kind == "stale":
            answer = client.app(message, context).content
            self.last = answer
            if kind == "stale":
                answer = earlier or answer
            elif not wire.wants_resync(answer):
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
        if request.action == "train":
            reply = _changed(kind, reply, request, rng(self.seed, request.round_index))
        else:
            reply = _selection_lie(reply)
        return client.encode_answer(reply, request, local)


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
    return {
        name: np.full_like(value, 900.0 if name.endswith("running_mean") else 1e5)
        for name, value in values.items()
        if is_statistic(name)
    }


def _changed(kind: str, reply: Reply, request: Request, generator: np.random.Generator) -> Reply:
    before = request.state(MODEL)
    if kind in VALUES:
        state = reply.states[MODEL]
        changed = VALUES[kind](before, state.values, generator)
        return replace(reply, states={MODEL: state.replace(changed)})
    if kind in FIELDS:
        return replace(reply, fields={**reply.fields, **FIELDS[kind]})
    if kind == "wrong mask":
        return replace(reply, states={MODEL: _moved(reply.states[MODEL])})
    if kind == "huge entries":
        return replace(reply, entries={MODEL: _entries(reply, before, generator)})
    return reply


FIELDS = {"loss": {"loss": 1e12}, "unasked": {"more": 1}}
Values = dict[str, Array]


def _weights(values: Mapping[str, Array]) -> Values:
    return {name: value for name, value in values.items() if not is_statistic(name)}


def _times(factor: float) -> Callable[[SparseState, Mapping[str, Array], Any], Values]:
    """The update times a factor, or as much of it as the gate's bound on norms allows."""

    def lie(before: SparseState, values: Mapping[str, Array], _: np.random.Generator) -> Values:
        most = 8 * (_norm(_weights(before.values)) + 1) / max(_norm(_update(before, values)), 1e-9)
        used = float(np.clip(factor, -most, most))
        update = _update(before, values)
        return {
            n: (before.values[n] + used * step).astype(np.float32) for n, step in update.items()
        }

    return lie


def _noise(
    before: SparseState, values: Mapping[str, Array], generator: np.random.Generator
) -> Values:
    update = _update(before, values)
    size = 3 * _norm(update) / sum(step.size for step in update.values()) ** 0.5
    return {
        name: (before.values[name] + size * generator.standard_normal(step.shape)).astype(
            np.float32
        )
        for name, step in update.items()
    }


def _one(worth: float) -> Callable[[SparseState, Mapping[str, Array], Any], Values]:
    """One weight of this value."""

    def lie(before: SparseState, values: Mapping[str, Array], _: np.random.Generator) -> Values:
        name, value = next(iter(_weights(values).items()))
        spoiled = value.copy()
        spoiled.reshape(-1)[0] = worth
        return {name: spoiled}

    return lie


VALUES = {
    "update x -100": _times(-100.0),
    "update x 10": _times(10.0),
    "sign flip": _times(-1.0),
    "noise": _noise,
    "zeros": lambda before, values, _: {n: 0 * v for n, v in _weights(values).items()},
    "statistics": lambda before, values, _: _ruined(values),
    "nan": _one(np.nan),
    "huge": _one(1e9),
}


def _update(before: SparseState, values: Mapping[str, Array]) -> Values:
    return {name: value - before.values[name] for name, value in _weights(values).items()}


def _norm(values: Mapping[str, Array]) -> float:
    return float(sum(float(np.vdot(value, value)) for value in values.values()) ** 0.5)


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
}
