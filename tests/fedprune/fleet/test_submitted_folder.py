"""Where a submitted run writes: in the folder that the command prepared, or in one of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation import tiny
from flwr.app import Context, RecordDict

from fedprune.flower import client, server
from fedprune.flower.inline import InlineGrid
from fedprune.flower.launch import TICKET, submit_values
from fedprune.rounds.folder import SUMMARY, prepare
from fedprune.rounds.setup import lay_out
from prunelab.errors import RunError

CONFIG = tiny(method__name="magnitude", training__rounds=1, data__clients=2, data__num_train=80)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("laid out") / "setup"
    lay_out(CONFIG, folder, with_start=True)
    return folder


def serve(out: Path, setup: Path, *, resume: bool, ticket: str) -> None:
    """The ServerApp, as Flower runs it where the SuperLink is."""
    values = {**CONFIG.flower(), **submit_values(out, resume=resume, ticket=ticket)}
    values["run.setup"] = str(setup)
    nodes = InlineGrid(client.app, run_config=values, num_nodes=2)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=values)
    server.app(nodes, context)


def test_a_prepared_folder_is_begun_in_by_its_ticket_alone(tmp_path: Path, setup: Path) -> None:
    prepare(tmp_path / "run", CONFIG, resume=False)
    (tmp_path / "run" / TICKET).write_text("own")
    with pytest.raises(RunError, match=r"not empty|already|holds"):
        serve(tmp_path / "run", setup, resume=False, ticket="other")
    serve(tmp_path / "run", setup, resume=False, ticket="own")
    assert (tmp_path / "run" / SUMMARY).exists()


def test_a_server_elsewhere_makes_the_folder_and_goes_on_in_it(tmp_path: Path, setup: Path) -> None:
    serve(tmp_path / "run", setup, resume=True, ticket="elsewhere")  # had not begun when it died
    assert (tmp_path / "run" / SUMMARY).exists()
    with pytest.raises(RunError):
        serve(tmp_path / "run", setup, resume=False, ticket="another run")
    serve(tmp_path / "run", setup, resume=True, ticket="elsewhere")
