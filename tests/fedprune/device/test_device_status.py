"""What a device says of its last message, and of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from federation import run_inline, tiny
from flwr.app import Context, Message, RecordDict

from fedprune.device.home import ANSWER, JOINED, Profile, make_home, read_json
from fedprune.device.status import rows_of, status_of
from fedprune.flower import client, wire


def test_the_status_says_what_was_answered(tmp_path: Path) -> None:
    home = tmp_path / "home"
    make_home(home, Profile())

    def at_home(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            context.node_config["home"] = str(home)
        return client.app(message, context)

    run_inline(tiny(training__rounds=1, data__clients=2), tmp_path / "run", clients=at_home)
    answer = read_json(home / ANSWER)
    assert (answer["action"], answer["round"], answer["run"]) == ("train", 0, "1")
    assert answer["seconds"] > 0
    assert answer["peak_rss_bytes"] > 10**7
    assert answer["samples"]["training"] > 0
    found = status_of(home)
    assert not found["alive"]
    rows = dict(rows_of(found))
    assert rows["node"] == "never joined"
    assert rows["last answer"].startswith("train, after 0 rounds, ")
    assert "its error" not in rows


def test_files_of_the_home_that_are_odd_are_told_as_far_as_they_go(tmp_path: Path) -> None:
    make_home(tmp_path, Profile())
    for name, text in ((JOINED, '{"state": "joined"}'), (ANSWER, '{"action": "train"}')):
        (tmp_path / name).write_text(text)
    rows = dict(rows_of(status_of(tmp_path)))
    assert (rows["node"], rows["last answer"]) == ("never joined", "none yet")
    ahead = {"action": "train", "round": 1, "time": 9e9, "seconds": 1.0, "peak_rss_bytes": 1}
    (tmp_path / ANSWER).write_text(json.dumps(ahead))  # the clock was set back
    assert dict(rows_of(status_of(tmp_path)))["last answer"] == "train, after 1 rounds, 0.0 s ago"


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
