"""What a node holds on disk: a SuperNode that was killed goes on without being sent it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from federation import digest, run_inline, tiny
from flwr.app import Context, Message, RecordDict

from fedprune.device import memory
from fedprune.device.home import ANSWER, STATE, Profile, make_home, read_json
from fedprune.device.status import rows_of, status_of
from fedprune.flower import client, wire
from fedprune.flower.client import app


def test_the_last_run_is_recalled_and_no_other(tmp_path: Path) -> None:
    records = {"held": {"m:1": b"\x00mask\n", "v:2": b""}, "kept": {"residual": bytes(1000)}}
    memory.remember(tmp_path, 1, {"held": {"m:0": b"x"}})
    memory.remember(tmp_path, 2, records)
    assert memory.recall(tmp_path, 2) == records
    assert memory.recall(tmp_path, 1) == {}
    assert [file.name for file in (tmp_path / STATE).iterdir()] == ["2.bin"]


def test_secrets_are_never_written(tmp_path: Path) -> None:
    memory.remember(tmp_path, 1, {"kept": {"secret:share": b"dont tell", "open": b"tell"}})
    assert memory.recall(tmp_path, 1) == {"kept": {"open": b"tell"}}
    assert not any(b"dont" in file.read_bytes() for file in (tmp_path / STATE).iterdir())


def test_a_damaged_file_counts_as_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One changed byte, or another run's name."""
    memory.remember(tmp_path, 1, {"held": {"m:1": b"mask"}})
    file = tmp_path / STATE / "1.bin"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"mask", b"mosk"))
    assert memory.recall(tmp_path, 1) == {}
    assert "damaged" in caplog.text
    (tmp_path / STATE / "3.bin").write_bytes(whole)
    assert memory.recall(tmp_path, 3) == {}


def test_too_much_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LIMIT", 10)
    memory.remember(tmp_path, 1, {"held": {"m:1": bytes(11)}})
    assert memory.recall(tmp_path, 1) == {}


class Restarted:
    """Client apps whose SuperNodes are killed after each message, with or without homes."""

    def __init__(self, homes: Path | None) -> None:
        self._homes = homes
        self.resyncs = 0

    def __call__(self, message: Message, context: Context) -> Message:
        context.state = RecordDict()
        if self._homes is not None:
            home = self._homes / str(context.node_config["partition-id"])
            if not home.exists():
                make_home(home, Profile())
            context.node_config["home"] = str(home)
        reply = app(message, context)
        header, _ = wire.read_record(reply.content)
        self.resyncs += bool(header.get("resync"))
        return reply


def test_killed_nodes_with_homes_are_not_sent_everything_again(tmp_path: Path) -> None:
    config = tiny(training__rounds=3, data__clients=2, method__adjust_until=3)
    plain = run_inline(config, tmp_path / "plain")
    without, with_homes = Restarted(None), Restarted(tmp_path / "homes")
    run_inline(config, tmp_path / "without", clients=without)
    run_inline(config, tmp_path / "with", clients=with_homes)
    assert without.resyncs
    assert not with_homes.resyncs
    assert digest(tmp_path / "with") == digest(tmp_path / "without") == digest(plain)


def test_the_status_says_what_was_answered(tmp_path: Path) -> None:
    homes = Restarted(tmp_path / "homes")
    run_inline(tiny(training__rounds=1, data__clients=2), tmp_path / "run", clients=homes)
    home = tmp_path / "homes" / "1"
    answer = read_json(home / ANSWER)
    assert (answer["action"], answer["round"], answer["run"]) == ("train", 0, "1")
    assert answer["seconds"] > 0
    assert answer["peak_rss_bytes"] > 10**7
    assert answer["samples"]["training"] > 0
    found = status_of(home)
    assert not found["alive"]
    rows = dict(rows_of(found))
    assert rows["node"] == "never joined"
    assert rows["last answer"].startswith("train, round 0, ")
    assert "its error" not in rows


def test_what_goes_wrong_is_in_the_status(tmp_path: Path) -> None:
    """And a message goes on as before: the server is told the same."""
    home = tmp_path / "home"
    make_home(home, Profile())
    node: dict[str, Any] = {"home": str(home), "partition-id": 9}
    context = Context(
        run_id=5, node_id=7, node_config=node, state=RecordDict(),
        run_config=tiny(data__clients=2).flower(),
    )  # fmt: skip
    record = wire.build_record({"a": "describe", "r": 0}, {})
    reply = client.guarded(lambda: client._answer(record, context))
    assert read_json(home / ANSWER)["error"].startswith("partition-id 9: expected 0 to 1")
    header, _ = wire.read_record(reply)
    assert header["skip"] == read_json(home / ANSWER)["error"]
