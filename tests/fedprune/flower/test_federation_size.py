"""`data.clients = 0`: as many clients as there are nodes; and what a laid-out folder depends on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from federation import digest, run_inline, tiny
from flwr.app import Context, Message, RecordDict

from fedprune.config import RunConfig
from fedprune.errors import ClientError
from fedprune.flower import client, server, wire
from fedprune.flower.inline import InlineGrid
from fedprune.local.site import setup_folder
from fedprune.rounds.folder import read_metrics, stored_config
from prunelab.errors import RunError
from prunelab.runs.imported import source_digest

CONFIG = tiny(training__rounds=3)
NODES = CONFIG.data.clients


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def run_open(
    out: Path, *, nodes: int, resume: bool = False, clients: Any = client.app, **changes: Any
) -> None:
    """As `flwr run` would: nothing is laid out, and nobody says how many clients there are."""
    values = {**CONFIG.flower(), "data.clients": 0, "run.out": str(out), "run.resume": resume}
    values |= changes
    grid = InlineGrid(clients, run_config=values, num_nodes=nodes)
    server.app(grid, Context(1, 1, {}, RecordDict(), values))


def test_the_nodes_that_there_are_become_the_clients(tmp_path: Path) -> None:
    run_open(tmp_path / "open", nodes=NODES)
    assert stored_config(tmp_path / "open") == CONFIG
    assert digest(tmp_path / "open") == digest(run_inline(CONFIG, tmp_path / "told"))
    assert not [entry for line in read_metrics(tmp_path / "open") for entry in line["skipped"]]


def test_steps_of_secure_sums_say_how_many_clients_there_are(tmp_path: Path) -> None:
    run_open(tmp_path / "open", nodes=NODES, **{"privacy.secure_aggregation": True})
    lines = read_metrics(tmp_path / "open")
    assert all(line["clients"] == list(range(NODES)) for line in lines[1:])
    assert not [entry for line in lines for entry in line["skipped"]]


def test_a_run_that_goes_on_keeps_its_number_of_clients(tmp_path: Path) -> None:
    """Stopped in its second round, continued with a node more: that one has no share."""
    trained = 0

    def stops(message: Message, context: Context) -> Message | None:
        nonlocal trained
        trained += message.metadata.message_type == "train"
        if trained > NODES:
            raise KeyboardInterrupt
        return client.app(message, context)

    with pytest.raises(KeyboardInterrupt):
        run_open(tmp_path / "run", nodes=NODES, clients=stops)
    run_open(tmp_path / "run", nodes=NODES + 1, resume=True)
    assert digest(tmp_path / "run") == digest(run_inline(CONFIG, tmp_path / "told"))


def test_a_client_that_is_not_told_does_not_guess(tmp_path: Path) -> None:
    values = {**CONFIG.flower(), "data.clients": 0}
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), values)
    with pytest.raises(ValueError, match=r"data.clients: expected at least 1, got 0"):
        client.run_config(context)
    assert client.run_config(context, clients=NODES) == CONFIG


@pytest.mark.parametrize("told", ["4", -1, 2.0, True, 2**60])
def test_a_number_of_clients_that_is_none_is_refused(told: object) -> None:
    record = wire.build_record({"a": "x", "r": 0, "n": told}, {})
    with pytest.raises(ClientError, match="field 'n'"):
        wire.receive(record, wire.Held()).clients()


class Arriving(InlineGrid):
    """Nodes that come one after the other, as often as somebody looks."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def get_node_ids(self) -> Iterable[int]:
        return range(self.counts.pop(0) if len(self.counts) > 1 else self.counts[0])


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([3, 5], 3), ([0, 0, 1, 2, 2, 5], 5), ([0, 1], 1)],
    ids=["there", "coming", "one"],
)
def test_nodes_are_counted_once_no_more_are_coming(counts: list[int], expected: int) -> None:
    assert server.count_nodes(Arriving(counts), settle=0.7) == expected


def test_without_a_node_the_run_says_what_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "JOIN_SECONDS", 0.0)
    with pytest.raises(RunError, match=r"no node is connected .* start the SuperNodes first"):
        server.count_nodes(Arriving([0]))


def test_edited_code_is_laid_out_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings are the same: an old folder would have the old network's program."""
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "edited_app"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "net.py").write_text(
        "from torch import nn\n"
        "def make(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    config = RunConfig.parse({"model.name": "edited_app.net:make", "method.name": "fedavg"})
    first = setup_folder(config, "")
    assert setup_folder(config, "") == first
    assert setup_folder(config, str(tmp_path / "given")) == tmp_path / "given"
    (package / "helper.py").write_text("WIDTH = 3\n")  # which net.py may import
    second = setup_folder(config, "")
    assert second != first
    assert (second / "network.json").exists()


def test_the_digest_of_code_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alone.py").write_text("raise SystemExit\n")
    digest = source_digest("alone:x")
    assert digest == source_digest("alone:y") != ""
    (tmp_path / "alone.py").write_text("raise SystemExit(1)\n")
    assert source_digest("alone:x") != digest
    assert source_digest("no_such_module:x") == source_digest("sys:path") == ""
