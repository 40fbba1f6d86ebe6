"""What a node keeps in its folder: messages whole, answers with their state, nothing secret."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.flower import wire
from fedprune.flower.node.memory import ANSWER, MESSAGE, Memory
from fedprune.flower.node.parcel import Parcel


def message(*, text: str = "{}", frame: bytes = b"", group: str = "1") -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    record = wire.build_record({"a": text}, {"w0": frame})
    return Message(record, 5, "train", group_id=group, ttl=60.0)


def context(run_id: int, **kept: bytes) -> Context:
    names = {name.replace("_", ":"): data for name, data in kept.items()}
    state = RecordDict({"kept": ConfigRecord(dict(names))})
    return Context(run_id, 5, {"partition-id": 0}, state, {"seed": 3, "a": "b"}, series_id=9)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=40), st.binary(max_size=3000))
def test_a_message_survives_as_bytes(text: str, frame: bytes) -> None:
    sent = message(text=text, frame=frame)
    parcel = Parcel.from_bytes(Parcel.of(sent).to_bytes())
    opened = parcel.open()
    assert wire.read_record(opened.content) == ({"a": text}, {"w0": frame})
    assert parcel.run_id == 7
    assert opened.metadata.message_id == parcel.message_id == sent.metadata.message_id
    assert opened.metadata.ttl == 60.0


def test_large_frames_survive_whole() -> None:
    """As Flower arrays, which it cuts into chunks."""
    frame = bytes(range(256)) * 4 * 6000  # 6 MB
    parcel = Parcel.from_bytes(Parcel.of(message(frame=frame)).to_bytes())
    content = parcel.open().content
    assert isinstance(content["a"], ArrayRecord)
    assert wire.read_record(content)[1]["w0"] == frame


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_are_no_message(data: st.DataObject) -> None:
    whole = Parcel.of(message(frame=b"0123456789" * 20)).to_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip"]))
    flipped = bytes([whole[place] ^ data.draw(st.integers(1, 255))])
    damaged = whole[:place] if kind == "cut" else whole[:place] + flipped + whole[place + 1 :]
    with pytest.raises(ValueError, match="damaged"):
        Parcel.from_bytes(damaged)


def test_what_a_killed_process_left_is_found(tmp_path: Path) -> None:
    asked, folder = Parcel.of(message(frame=b"question")), tmp_path / "a node"
    Memory(folder).received(asked)
    found = Memory(folder).message()
    assert found is not None
    assert found.to_bytes() == asked.to_bytes()
    assert 0 <= Memory(folder).message_age() < 60
    os.utime(folder / MESSAGE, (0, time.time() - 1000))
    assert 1000 <= Memory(folder).message_age() < 1060
    assert Memory(folder).context(7) is None

    reply = Parcel.of(message(frame=b"reply"))
    Memory(folder).answered(reply, context(7, residual=b"after"))
    again = Memory(folder)
    assert again.message() is None  # it is answered
    unsent = again.answer()
    assert unsent is not None
    assert unsent.to_bytes() == reply.to_bytes()
    state = again.context(7)
    assert state is not None
    assert state.state.config_records["kept"]["residual"] == b"after"
    assert (state.run_config, state.series_id) == ({"seed": 3, "a": "b"}, 9)

    again.sent(reply)
    assert Memory(folder).answer() is None
    kept = Memory(folder).context(7)
    assert kept is not None
    assert kept.state.config_records["kept"]["residual"] == b"after"


def test_a_state_is_the_one_before_the_message_until_it_is_answered(tmp_path: Path) -> None:
    """A message that is worked on again must find what the first try found."""
    first = Parcel.of(message(frame=b"one"))
    memory = Memory(tmp_path)
    memory.answered(first, context(7, residual=b"before"))
    memory.sent(first)
    memory.received(Parcel.of(message(frame=b"two")))
    found = Memory(tmp_path).context(7)  # the process was killed while it worked
    assert found is not None
    assert found.state.config_records["kept"]["residual"] == b"before"


def test_secrets_are_never_written(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    held = context(7, secret_key=b"do not write", residual=b"write")
    memory.answered(Parcel.of(message()), held)
    assert b"do not write" not in (tmp_path / ANSWER).read_bytes()
    assert held.state.config_records["kept"]["secret:key"] == b"do not write"
    assert b"write" in (tmp_path / ANSWER).read_bytes()


def test_damaged_files_are_as_none(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.received(Parcel.of(message(frame=b"x" * 100)))
    memory.answered(Parcel.of(message(frame=b"x" * 100)), context(7, residual=b"r"))
    memory.received(Parcel.of(message(frame=b"x" * 100)))
    for name in (MESSAGE, ANSWER):
        whole = (tmp_path / name).read_bytes()
        for damaged in (
            b"",
            whole[:9],
            whole[: len(whole) // 2],
            whole[:-1] + b"\0",
            b"\0" + whole[1:],
        ):
            (tmp_path / name).write_bytes(damaged)
            fresh = Memory(tmp_path)
            assert (fresh.message() if name == MESSAGE else fresh.answer()) is None


def test_states_of_two_runs_are_kept_and_no_more(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    for run_id in (1, 2, 3):
        memory.begin(run_id, node_id=5, series=run_id, config={"seed": run_id})
        state = memory.context(run_id)
        assert state is not None
        TaskIdentity.run_id = run_id
        reply = Parcel.of(Message(wire.build_record({}, {}), 5, "train", group_id="1"))
        memory.answered(reply, state)
        memory.sent(reply)
    assert sorted(file.name for file in tmp_path.glob("state-*")) == ["state-2", "state-3"]
    assert memory.context(1) is None
    assert memory.last_node("127.0.0.1:1") == 0
    memory.note_node("127.0.0.1:1", 2**63)
    assert Memory(tmp_path).last_node("127.0.0.1:1") == 2**63
    assert Memory(tmp_path).last_node("127.0.0.1:2") == 0
