"""Whole runs whose models travel up in fewer bytes: bits, memory, lies and lost residuals."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import run_inline, tiny
from flwr.app import ConfigRecord, Context, Message

from fedprune.errors import ClientError
from fedprune.flower import client, wire
from fedprune.flower.batched import BatchedGrid
from fedprune.local.residual import RESIDUAL
from fedprune.rounds.folder import read_metrics, read_model, read_summary
from prunelab.errors import DataWarning
from sparsemodel.codec import encode_mask, encode_state
from sparsemodel.codec.frame import DEFAULT_LIMITS, Kind, open_frame, seal_frame
from sparsemodel.runtime.state import SparseState

FEW = {
    "federation__uplink_dtype": "int8",
    "federation__uplink_topk": 0.3,
    "training__rounds": 3,
    "method__adjust_until": 3,
}

Spoil = Callable[[dict[str, Any], dict[str, bytes]], tuple[dict[str, Any], dict[str, bytes]]]


def bits(out: Path) -> str:
    """Of the final model's arrays; its file names the configuration too."""
    state, _ = read_model(out)
    assert state.patterns is not None
    sha = hashlib.sha256(state.patterns.digest().encode())
    for name, value in sorted(state.values.items()):
        sha.update(name.encode() + value.tobytes())
    return sha.hexdigest()


@pytest.fixture(scope="module", name="finished")
def fixture_finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_inline(tiny(**FEW), tmp_path_factory.mktemp("few") / "run")


@pytest.fixture(scope="module", name="without")
def fixture_without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny(**FEW, federation__error_feedback=False)
    return run_inline(config, tmp_path_factory.mktemp("without") / "run")


def test_a_run_gives_the_same_bits_again_and_feedback_plays_a_part(
    finished: Path, without: Path, tmp_path: Path
) -> None:
    assert not any(line["skipped"] for line in read_metrics(finished))
    assert bits(run_inline(tiny(**FEW), tmp_path / "again")) == bits(finished)
    assert bits(without) != bits(finished)
    assert abs(read_summary(without)["bytes_up"] / read_summary(finished)["bytes_up"] - 1) < 0.02


def test_a_model_that_loses_nothing_travels_as_it_always_did(tmp_path: Path) -> None:
    whole = run_inline(tiny(), tmp_path / "whole")
    named = run_inline(tiny(federation__uplink_dtype="fp32"), tmp_path / "named")
    assert bits(named) == bits(whole)
    assert read_summary(named)["bytes_up"] == read_summary(whole)["bytes_up"]
    # Of what goes down in few bits, only the way up is spared.
    down = run_inline(
        tiny(federation__value_dtype="int8", federation__uplink_dtype="fp32"), tmp_path / "down"
    )
    assert abs(read_summary(down)["bytes_up"] / read_summary(whole)["bytes_up"] - 1) < 0.02
    assert read_summary(down)["bytes_down"] < read_summary(whole)["bytes_down"]


def test_what_is_kept_is_counted(finished: Path, without: Path) -> None:
    """A float32 for each weight, and the mask; both sides of the run are otherwise the same."""
    more = read_summary(finished)["state_bytes"] - read_summary(without)["state_bytes"]
    state, _ = read_model(finished)
    assert state.patterns is not None
    weights = sum(v.size for n, v in state.values.items() if "running" not in n)
    assert abs(more - 4 * weights - len(encode_mask(state.patterns))) < 120


def test_a_client_that_lost_its_residual_starts_at_zero(
    finished: Path, without: Path, tmp_path: Path
) -> None:
    seen = []

    def forgetful(message: Message, context: Context) -> Message:
        seen.append(RESIDUAL in context.state.config_records.get("kept", ConfigRecord()))
        context.state["kept"] = ConfigRecord()
        return client.app(message, context)

    out = run_inline(tiny(**FEW), tmp_path / "run", clients=forgetful)
    assert any(seen)
    assert not any(line["skipped"] for line in read_metrics(out))
    assert bits(out) == bits(without) != bits(finished)


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
    with pytest.warns(DataWarning, match="left aside"):
        run_inline(config, tmp_path / "run", clients=watching)
    assert {trains for trains, _ in changed} == {True, False}
    assert all(trains == moved for trains, moved in changed)


def test_clients_that_train_together_keep_what_they_owe(tmp_path: Path) -> None:
    grids: list[BatchedGrid] = []

    class Watched(BatchedGrid):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named, size=4)
            grids.append(self)

    config = tiny(**{**FEW, "training__rounds": 1, "training__execution": "masked"})
    out = run_inline(config, tmp_path / "run", grid=Watched)
    assert not any(line["skipped"] for line in read_metrics(out))
    (grid,) = grids
    owed = [context.state.config_records["kept"][RESIDUAL] for context in grid.contexts.values()]
    assert len(set(map(str, owed))) == 4


# --- lies --------------------------------------------------------------------------------------


def without_frame(kind: str) -> Spoil:
    return lambda header, frames: (header, {k: v for k, v in frames.items() if k != kind})


def with_frames(make: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Spoil:
    return lambda header, frames: (header, {**frames, **make(frames)})


def of_values(value: float) -> Spoil:
    """In another format, which a reader takes; what they say cannot be."""
    return with_frames(lambda frames: {"u0": _filled(frames["u0"], value)})


STATE = encode_state(SparseState({"x": np.ones(9, np.float32)}))
LIES: dict[str, Spoil] = {
    "no values": without_frame("u0"),
    "no positions": without_frame("k0"),
    "no statistics": without_frame("b0"),
    "statistics as weights": with_frames(lambda f: {"u0": f["b0"], "b0": f["u0"]}),
    "positions as values": with_frames(lambda f: {"u0": f["k0"], "k0": f["u0"]}),
    "cut": with_frames(lambda f: {"k0": f["k0"][:-3]}),
    "a whole state beside it": with_frames(lambda f: {"w0": STATE}),
    "no state": lambda header, frames: ({**header, "s": []}, frames),
    "two states": lambda header, frames: ({**header, "s": ["model", "model"]}, frames),
    "NaN": of_values(math.nan),
    "infinity": of_values(math.inf),
    "too large": of_values(1e30),
}


def test_every_lie_is_left_out_and_changes_nothing_else(tmp_path: Path) -> None:
    """Twelve clients, each with a lie of its own, and one that is honest."""
    iid = {"data__clients": len(LIES) + 1, "data__partition": "iid", "training__rounds": 1}
    config = tiny(**{**FEW, **iid})

    def lying(message: Message, context: Context) -> Message:
        reply = client.app(message, context)
        if not _trains_as_a_liar(message, context):
            return reply
        spoil = list(LIES.values())[int(context.node_config["partition-id"])]
        record = wire.build_record(*spoil(*wire.read_record(reply.content)))
        return Message(record, reply_to=message)

    def failing(message: Message, context: Context) -> Message:
        if _trains_as_a_liar(message, context):
            raise ClientError("no power")
        return client.app(message, context)

    lied = run_inline(config, tmp_path / "lied", clients=lying)
    reasons = {s["client"]: s["reason"] for s in read_metrics(lied)[-1]["skipped"]}
    assert list(reasons) == list(range(len(LIES)))
    assert all(reasons.values())
    assert all("diverged" in reasons[who] for who in range(len(LIES) - 3, len(LIES)))
    assert bits(lied) == bits(run_inline(config, tmp_path / "failed", clients=failing))


def _trains_as_a_liar(message: Message, context: Context) -> bool:
    lies = int(context.node_config["partition-id"]) < len(LIES)
    return lies and wire.read_record(message.content)[0]["a"] == "train"


def _filled(frame: bytes, value: float) -> bytes:
    """An int8 frame of as many values, all of them this, in fp32."""
    reader = open_frame(frame, kind=Kind.TENSORS, limits=DEFAULT_LIMITS)
    assert reader.byte(what="the dtype") == 3
    digests = bytes(reader.take(16, what="digests"))
    count = reader.remaining - 4
    values = np.full(count, value, "<f4").tobytes()
    return seal_frame([b"\x00", digests, values], kind=Kind.TENSORS)
