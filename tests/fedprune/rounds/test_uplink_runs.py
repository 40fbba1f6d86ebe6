"""Whole runs whose models travel up in fewer bytes: bits, memory, lies and lost residuals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import digest, run_inline, tiny
from flwr.app import ConfigRecord, Context, Message

from fedprune.errors import ClientError
from fedprune.flower import client, wire
from fedprune.local.residual import RESIDUAL
from fedprune.rounds import run as runner
from fedprune.rounds.folder import read_metrics, read_model, read_summary
from sparsemodel.codec import encode_mask, encode_state

FEW = {"federation__uplink_dtype": "int8", "federation__uplink_topk": 0.3}
LIAR = 1

Spoil = Callable[[dict[str, Any], dict[str, bytes]], tuple[dict[str, Any], dict[str, bytes]]]


@pytest.fixture(scope="module", name="finished")
def fixture_finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_inline(tiny(**FEW), tmp_path_factory.mktemp("few") / "run")


def test_a_run_gives_the_same_bits_again_and_feedback_plays_a_part(
    finished: Path, tmp_path: Path
) -> None:
    assert not any(line["skipped"] for line in read_metrics(finished))
    assert digest(run_inline(tiny(**FEW), tmp_path / "again")) == digest(finished)
    without = run_inline(tiny(**FEW, federation__error_feedback=False), tmp_path / "without")
    assert digest(without) != digest(finished)
    assert abs(read_summary(without)["bytes_up"] / read_summary(finished)["bytes_up"] - 1) < 0.02


def test_a_model_that_loses_nothing_travels_as_it_always_did(tmp_path: Path) -> None:
    whole = run_inline(tiny(), tmp_path / "whole")
    named = run_inline(tiny(federation__uplink_dtype="fp32"), tmp_path / "named")
    assert digest(named) == digest(whole)
    assert read_summary(named)["bytes_up"] == read_summary(whole)["bytes_up"]
    # Of what goes down in few bits, only the way up is spared.
    down = run_inline(
        tiny(federation__value_dtype="int8", federation__uplink_dtype="fp32"), tmp_path / "down"
    )
    assert read_summary(down)["bytes_up"] == read_summary(whole)["bytes_up"]
    assert read_summary(down)["bytes_down"] < read_summary(whole)["bytes_down"]


def test_what_is_kept_is_counted(finished: Path, tmp_path: Path) -> None:
    """A float32 for each weight, and the mask; both sides of the run are otherwise the same."""
    without = run_inline(tiny(**FEW, federation__error_feedback=False), tmp_path / "without")
    more = read_summary(finished)["state_bytes"] - read_summary(without)["state_bytes"]
    state, _ = read_model(finished)
    assert state.patterns is not None
    weights = sum(v.size for n, v in state.values.items() if "running" not in n)
    assert abs(more - 4 * weights - len(encode_mask(state.patterns))) < 120


def test_a_client_that_lost_its_residual_starts_at_zero(finished: Path, tmp_path: Path) -> None:
    seen = []

    def forgetful(message: Message, context: Context) -> Message:
        seen.append(RESIDUAL in context.state.config_records.get("kept", ConfigRecord()))
        context.state["kept"] = ConfigRecord()
        return client.app(message, context)

    out = run_inline(tiny(**FEW), tmp_path / "run", clients=forgetful)
    assert any(seen)
    assert not any(line["skipped"] for line in read_metrics(out))
    without = run_inline(tiny(**FEW, federation__error_feedback=False), tmp_path / "without")
    assert digest(out) == digest(without) != digest(finished)


def test_a_client_that_is_not_drawn_keeps_what_it_owes(tmp_path: Path) -> None:
    """After each message a client holds what it held, or, where it trained, what it owes now."""
    owed: dict[int, bytes] = {}
    changed: list[tuple[bool, bool]] = []

    def watching(message: Message, context: Context) -> Message:
        reply = client.app(message, context)
        kept = context.state.config_records["kept"].get(RESIDUAL, b"")
        assert isinstance(kept, bytes)
        who = int(context.node_config["partition-id"])
        trains = wire.read_record(message.content)[0]["a"] == "train"
        changed.append((trains, kept != owed.get(who, b"")))
        owed[who] = kept
        return reply

    config = tiny(**FEW, federation__clients_per_round=2, federation__evaluate="clients")
    run_inline(config, tmp_path / "run", clients=watching)
    assert {trains for trains, _ in changed} == {True, False}
    assert all(trains == moved for trains, moved in changed)


def test_clients_that_train_together_keep_what_they_owe(tmp_path: Path) -> None:
    few = {**FEW, "training__execution": "masked"}
    outs = {}
    for name, feedback in (("one", True), ("two", True), ("without", False)):
        outs[name] = tmp_path / name
        config = tiny(**few, federation__error_feedback=feedback)
        runner.run(config, outs[name], engine="batched")
        assert not any(line["skipped"] for line in read_metrics(outs[name]))
    assert digest(outs["one"]) == digest(outs["two"]) != digest(outs["without"])
    alone = run_inline(tiny(**few), tmp_path / "alone")
    sizes = [read_summary(out)["bytes_up"] for out in (outs["one"], alone)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02


# --- lies --------------------------------------------------------------------------------------


def without_frame(kind: str) -> Spoil:
    return lambda header, frames: (header, {k: v for k, v in frames.items() if k != kind})


def exchanged(one: str, other: str) -> Spoil:
    return lambda header, frames: (header, {**frames, one: frames[other], other: frames[one]})


def cut(header: dict[str, Any], frames: dict[str, bytes]) -> tuple[dict[str, Any], Any]:
    return header, {**frames, "k0": frames["k0"][:-3]}


def whole(header: dict[str, Any], frames: dict[str, bytes]) -> tuple[dict[str, Any], Any]:
    from sparsemodel.runtime.state import SparseState  # noqa: PLC0415

    return header, {**frames, "w0": encode_state(SparseState({"x": np.ones(9, np.float32)}))}


LIES: dict[str, Spoil] = {
    "no values": without_frame("u0"),
    "no positions": without_frame("k0"),
    "no statistics": without_frame("b0"),
    "statistics as weights": exchanged("u0", "b0"),
    "positions as values": exchanged("u0", "k0"),
    "cut": cut,
    "a whole state beside it": whole,
    "no state": lambda header, frames: ({**header, "s": []}, frames),
    "two states": lambda header, frames: ({**header, "s": ["model", "model"]}, frames),
}


@pytest.fixture(scope="module", name="absent")
def fixture_absent(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of a run in which the client fails instead of lying."""

    def failing(message: Message, context: Context) -> Message:
        if _is_lie(message, context):
            raise ClientError("no power")
        return client.app(message, context)

    out = tmp_path_factory.mktemp("absent") / "run"
    return digest(run_inline(tiny(**FEW, training__rounds=1), out, clients=failing))


def _is_lie(message: Message, context: Context) -> bool:
    mine = context.node_config["partition-id"] == LIAR
    return mine and wire.read_record(message.content)[0]["a"] == "train"


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_left_out_and_changes_nothing_else(name: str, absent: str, tmp_path: Path) -> None:
    def lying(message: Message, context: Context) -> Message:
        reply = client.app(message, context)
        if not _is_lie(message, context):
            return reply
        record = wire.build_record(*LIES[name](*wire.read_record(reply.content)))
        return Message(record, reply_to=message)

    out = run_inline(tiny(**FEW, training__rounds=1), tmp_path / "run", clients=lying)
    ((_, reasons),) = [
        (line["round"], line["skipped"]) for line in read_metrics(out) if "round" in line
    ]
    assert [entry["client"] for entry in reasons] == [LIAR]
    assert reasons[0]["reason"]
    assert digest(out) == absent


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_changes_that_cannot_be_are_left_out(value: float, absent: str, tmp_path: Path) -> None:
    """The client's own words: values of another format, which a reader takes, and impossible."""

    def lying(message: Message, context: Context) -> Message:
        reply = client.app(message, context)
        if not _is_lie(message, context):
            return reply
        header, frames = wire.read_record(reply.content)
        data = _filled(frames["u0"], value)
        return Message(wire.build_record(header, {**frames, "u0": data}), reply_to=message)

    out = run_inline(tiny(**FEW, training__rounds=1), tmp_path / "run", clients=lying)
    assert [entry["client"] for entry in read_metrics(out)[-1]["skipped"]] == [LIAR]
    assert "diverged" in read_metrics(out)[-1]["skipped"][0]["reason"]
    assert digest(out) == absent


def _filled(frame: bytes, value: float) -> bytes:
    """An int8 frame of as many values, all of them this, in fp32."""
    from sparsemodel.codec.frame import DEFAULT_LIMITS, Kind, open_frame, seal_frame  # noqa: PLC0415

    reader = open_frame(frame, kind=Kind.TENSORS, limits=DEFAULT_LIMITS)
    assert reader.byte(what="the dtype") == 3
    digests = bytes(reader.take(16, what="digests"))
    count = reader.remaining - 4
    values = np.full(count, value, "<f4").tobytes()
    return seal_frame([b"\x00", digests, values], kind=Kind.TENSORS)
