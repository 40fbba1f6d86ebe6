"""Whole runs with a client that lies: the run ends, as if the lie had not been told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar

import numpy as np
import pytest
from federation import digest, run_inline, tiny
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hostile import hostile
from hypothesis import given, settings
from hypothesis import strategies as st
from long import FACTOR

from fedprune.exchange.messages import DESCRIBE, Expected, Reply, Request
from fedprune.flower import client, wire
from fedprune.flower.inline import InlineGrid
from fedprune.local.site import Local
from fedprune.methods import Method, RunState, Start
from fedprune.rounds.folder import read_metrics
from fedprune.rounds.workspace import open_workspace
from prunelab.errors import RunError
from sparsemodel.codec import decode_state, encode_state
from sparsemodel.runtime.state import SparseState

LIAR = 1
ACTIONS = (DESCRIBE, "measure", "score", "train")
CONFIG = {"training__rounds": 2}


Spoil = Callable[[RecordDict], RecordDict]


_base: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def _base_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    _base[:] = [tmp_path_factory.mktemp("hostile")]


def new_folder() -> Path:
    return Path(mkdtemp(dir=_base[0])) / "run"


class Ordered(InlineGrid):
    """Replies arrive in the order of these places among the nodes asked, whoever is asked first."""

    order: tuple[int, ...] = ()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._waiting: dict[str, int] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(super().push_messages(messages))
        for message_id, message in zip(ids, messages, strict=True):
            place = message.metadata.dst_node_id - 1000
            self._waiting[message_id] = self.order.index(place) if self.order else place
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            if self._waiting.get(message_id) == min(self._waiting.values(), default=-1):
                del self._waiting[message_id]
                yield from super().pull_messages([message_id])


def run(
    spoil: Spoil, action: str, *, order: tuple[int, ...] = (), round_number: int = 1
) -> tuple[str, Path]:
    """A run whose client LIAR changes its answers to one question; the model's digest, the folder.

    Args:
        round_number: of the training that it lies about.
    """

    def app(message: Message, context: Context) -> Message:
        header, _ = wire.read_record(message.content)
        reply = client.app(message, context)
        mine = context.node_config["partition-id"] == LIAR and header["a"] == action
        if not mine or (action == "train" and header["r"] != round_number - 1):
            return reply
        return Message(spoil(reply.content), reply_to=message)

    grid = type("Grid", (Ordered,), {"order": order})
    out = run_inline(tiny(**CONFIG), new_folder(), clients=app, grid=grid)
    return digest(out), out


def failing(_: RecordDict) -> RecordDict:
    raise OSError("no power")


@cache
def without(action: str, round_number: int = 1) -> str:
    """The model of a run in which the client fails instead of lying."""
    return run(failing, action, round_number=round_number)[0]


def skipped(out: Path) -> list[tuple[int, str]]:
    return [(s["client"], s["reason"]) for line in read_metrics(out) for s in line["skipped"]]


@cache
def description(place: int) -> dict[str, Any]:
    """What a client says of itself, as it travels."""
    found = {}

    def app(message: Message, context: Context) -> Message:
        reply = client.app(message, context)
        if wire.read_record(message.content)[0]["a"] == DESCRIBE:
            found[context.node_config["partition-id"]] = wire.read_record(reply.content)[0]
        return reply

    run_inline(tiny(training__rounds=1), new_folder(), clients=app)
    return found[place]


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """A lie in the header."""

    def spoil(record: RecordDict) -> RecordDict:
        values, frames = wire.read_record(record)
        change(values)
        return RecordDict({"c": ConfigRecord({"h": json.dumps(values), **frames})})

    return spoil


def field(**fields: Any) -> Spoil:
    return header(lambda values: values["f"].update(fields))


def frame(change: Callable[[SparseState], SparseState], name: str) -> Spoil:
    """A lie in the statistics of a candidate."""

    def spoil(record: RecordDict) -> RecordDict:
        values, frames = wire.read_record(record)
        shapes = open_workspace(tiny()).shapes
        wanted = {key: shapes[key] for key in values["k"][0]}
        state = decode_state(frames[name], shapes=wanted, patterns=None)
        return wire.build_record(values, {**frames, name: encode_state(change(state))})

    return spoil


def statistic(suffix: str, value: float) -> Spoil:
    def change(state: SparseState) -> SparseState:
        name = next(name for name in state.values if name.endswith(suffix))
        return state.replace({name: np.full_like(state.values[name], value)})

    return frame(change, "t1")


def more_frames(record: RecordDict) -> RecordDict:
    values, frames = wire.read_record(record)
    return wire.build_record(values, {**frames, **{f"x{n}": b"?" for n in range(5000)}})


def more_records(record: RecordDict) -> RecordDict:
    return RecordDict({**record, "more": ConfigRecord({"k": list(range(10_000))})})


NUMBERS = [0, 1, 10**8, 2**27 - 1, 2**62, -1, 1.5, True, None, "9"]
LIES: list[tuple[str, str, Spoil]] = [
    *((action, f"n = {n}", header(lambda v, n=n: v.update(n=n)))  # type: ignore[misc]
      for action in ACTIONS for n in NUMBERS),
    *((action, words, spoil) for action in ACTIONS for words, spoil in (
        ("an unknown key", header(lambda v: v.update(z=1))),
        ("an unknown field", field(z=list(range(9)))),
        ("frames that nobody named", more_frames),
        ("another record", more_records),
        ("a resync each time", lambda _: wire.resync_record()),
        ("control characters", lambda _: wire.skip_record("\x1b[2Jbad [/x] \a\n" * 99)),
    )),
    *((DESCRIBE, f"client {c}", field(client=c)) for c in (0, 4, 2**62, -1, True, "1", None)),
    *((DESCRIBE, f"labels {str(h)[:9]}", field(labels=h)) for h in (
        [], [1] * 200_000, [2**62] + [0] * 9, [-1] * 10, [0] * 10, None, "labels", [0.5] * 10)),
    *((DESCRIBE, f"dev {d}", field(dev=d)) for d in (0, 10**8, 2**62, -1, None)),
    *((DESCRIBE, f"test {d}", field(test=d)) for d in (1, 10**8, 2**62, -1, None)),
    *(("measure", f"variance {v}", statistic("running_var", v))
      for v in (-1e-9, -1e5, 1e7, math.nan, math.inf)),
    *(("measure", f"mean {v}", statistic("running_mean", v)) for v in (2e3, -1e9, math.nan)),
    *(("score", f"losses {v}", field(losses=[v, 1.0]))
      for v in (-1e308, -1e-9, 1e308, math.nan, math.inf, "low", None, [1.0])),
    *(("score", f"correct {c}", field(metrics=[c, 0])) for c in (-1, 10**6, 2**62, 0.5, None)),
    *(("train", f"loss {v}", field(loss=v)) for v in (-1.0, 1e308, math.nan, -math.inf, "low")),
]  # fmt: skip


@pytest.mark.parametrize(("action", "words", "spoil"), LIES, ids=[f"{a}: {w}" for a, w, _ in LIES])
def test_a_lie_is_left_out_and_changes_nothing_else(action: str, words: str, spoil: Spoil) -> None:
    model, out = run(spoil, action)
    lines = skipped(out)
    assert len(lines) >= 1
    assert {who for who, _ in lines} <= {LIAR, -1}
    assert all(text.isprintable() and 0 < len(text) <= 500 for _, text in lines)
    assert model == without(action)


@pytest.mark.parametrize("copied", [True, False])
def test_a_node_cannot_take_another_client_s_place(copied: bool) -> None:
    """With samples of its own it is refused; of two with the same words neither is believed.

    Whoever answered first would be: the model would depend on it.
    """

    def app(message: Message, context: Context) -> Message:
        reply = client.app(message, context)
        if wire.read_record(message.content)[0]["a"] != DESCRIBE:
            return reply
        values, _ = wire.read_record(reply.content)
        if context.node_config["partition-id"] != LIAR:
            return reply
        claim = {**values, "f": {**values["f"], "client": 0}}
        return Message(wire.build_record(first if copied else claim, {}), reply_to=message)

    first = description(0)
    models = set()
    for order in ((0, 1, 2, 3), (1, 0, 2, 3), (3, 2, 1, 0)):
        grid = type("Grid", (Ordered,), {"order": order})
        out = run_inline(tiny(**CONFIG), new_folder(), clients=app, grid=grid)
        models.add(digest(out))
        ((who, why),) = skipped(out)
        assert who == (0 if copied else -1)
        assert ("all say that they are client 0" if copied else "other samples") in why
        assert read_metrics(out)[-1]["clients"] == ([2, 3] if copied else [0, 2, 3])
    assert len(models) == 1


@pytest.mark.parametrize("factor", [-1e6, -100.0, 100.0, 1e30, 0.0])
def test_an_update_out_of_all_proportion_is_left_out(factor: float) -> None:
    """Weights as far as `factor` updates away; at the zero everything is zero, which can be."""

    def spoil(record: RecordDict) -> RecordDict:
        values, frames = wire.read_record(record)
        state = decode_state(
            frames["w0"], shapes=open_workspace(tiny()).shapes, patterns=patterns[0]
        )
        changed = {
            name: (value * np.float32(factor)).astype(np.float32)
            for name, value in state.values.items()
            if "running" not in name
        }
        return wire.build_record(values, {**frames, "w0": encode_state(state.replace(changed))})

    patterns: list[Any] = []

    def app(message: Message, context: Context) -> Message:
        values, _ = wire.read_record(message.content)
        reply = client.app(message, context)
        if context.node_config["partition-id"] == LIAR and values["a"] == "train":
            held = context.state.config_records["held"]
            masks = wire.Held({t: d for t, d in held.items() if isinstance(d, bytes)})
            patterns[:] = [masks.mask(f"m:{values['s'][0]['m']}")]
            if values["r"] == 0:
                return Message(spoil(reply.content), reply_to=message)
        return reply

    out = run_inline(tiny(**CONFIG), new_folder(), clients=app)
    if factor == 0.0:
        assert not skipped(out)
    else:
        ((who, why),) = skipped(out)
        assert who == LIAR
        assert "diverged" in why
        assert digest(out) == without("train")


def test_an_answer_that_arrives_twice_counts_once(tmp_path: Path) -> None:
    class Twice(InlineGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            for message in super().pull_messages(message_ids):
                yield message
                yield message

    out = run_inline(tiny(**CONFIG), tmp_path / "twice", grid=Twice)
    assert digest(out) == digest(run_inline(tiny(**CONFIG), tmp_path / "once"))
    assert not skipped(out)


@pytest.mark.parametrize("reason", ["", "  \n ", "\x1b[31m", None])
def test_an_error_of_flower_without_words_is_a_skipped_client(
    reason: str | None, tmp_path: Path
) -> None:
    from flwr.app import Error  # noqa: PLC0415

    def app(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == LIAR:
            TaskIdentity.node_id = 1
            return Message(Error(code=7, reason=reason), reply_to=message)
        return client.app(message, context)

    out = run_inline(tiny(**CONFIG), tmp_path / "run", clients=app)
    assert skipped(out)
    assert all(text.isprintable() and text for _, text in skipped(out))


def test_messages_live_as_long_as_they_are_waited_for(tmp_path: Path) -> None:
    seen = []

    def app(message: Message, context: Context) -> Message:
        seen.append(message.metadata.ttl)
        return client.app(message, context)

    run_inline(tiny(**CONFIG, federation__timeout=77.0), tmp_path / "run", clients=app)
    assert set(seen) == {77.0}


def numbers(request: Request, local: Local) -> Reply:
    told = request.fields["lie"] if local.client else [1.0, 2.0, 3.0]
    return Reply(len(local.data.train), {"numbers": told})


@dataclass(frozen=True)
class Numbers(Method):
    """It adds up what clients answer and leaves what they can answer to the gate."""

    name: ClassVar[str] = "numbers"
    actions = {"numbers": numbers}  # noqa: RUF012
    lie: str = ""

    def start(self, server: Start) -> RunState:
        fields = {"lie": json.loads(self.lie)}
        asked = {"model": server.state()}
        expected = Expected(sums={"numbers": 3})
        found = server.pooled(Request("numbers", 0, fields, asked, expected=expected))
        raise RunError(f"{list(found.clients)} of the clients")


@pytest.mark.parametrize("aggregation", ["mean", "median"])
@pytest.mark.parametrize("lie", ['"text"', "[1.0]", "[1.0, 2.0, {}]", "[1, 2, 3, 4]", "5"])
def test_what_cannot_be_added_up_is_left_out(lie: str, aggregation: str, tmp_path: Path) -> None:
    """Of a method of one's own, which does not check it."""
    settings = {
        "method__name": f"{__name__}:Numbers", "method__lie": lie, "data__clients": 2,
        "federation__byzantine": 0.0,
    }  # fmt: skip
    with pytest.raises(RunError, match=r"\[0\] of the clients.*client 1: field 'numbers'"):
        run_inline(tiny(**settings, federation__aggregation=aggregation), tmp_path / "run")


ORDERS = st.permutations(range(4)).map(tuple)


@settings(max_examples=15 * FACTOR, deadline=None)
@given(st.data())
def test_whatever_a_client_answers_the_run_ends_and_arrival_plays_no_part(
    data: st.DataObject,
) -> None:
    """Refused, the model is that of a run without the answer; taken, that of any order."""
    action = data.draw(st.sampled_from(ACTIONS))
    round_number = data.draw(st.integers(1, 2)) if action == "train" else 1
    answers: list[RecordDict] = []

    def spoil(record: RecordDict) -> RecordDict:
        if not answers:  # drawn once: both runs are told the same
            answers.append(data.draw(hostile([record])))
        return answers[0]

    orders = [data.draw(ORDERS) for _ in range(2)]
    models, outs = zip(
        *(run(spoil, action, order=o, round_number=round_number) for o in orders), strict=True
    )
    assert models[0] == models[1]
    assert sorted(skipped(outs[0])) == sorted(skipped(outs[1]))
    claimed = [who for who, _ in skipped(outs[0])]
    if claimed and set(claimed) <= {LIAR, -1}:
        assert models[0] == without(action, round_number)
    for line in read_metrics(outs[0]):
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
