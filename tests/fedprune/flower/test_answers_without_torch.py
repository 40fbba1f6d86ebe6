"""The whole client in a process that cannot import torch gives the answers of one that can."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import run_inline, tiny
from flwr.app import Context, Message

from fedprune.flower import client, wire
from fedprune.flower.launch import launch_values
from fedprune.methods.widths import assigned
from fedprune.rounds.folder import read_metrics
from fedprune.rounds.workspace import open_workspace

FOLDER = Path(__file__).parent.parent

CHILD = """
import pickle
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in set(sys.argv[2:]):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Blocked())
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from fedprune.flower import client, wire

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
folder = Path(sys.argv[1])
config, node, questions = pickle.loads((folder / "questions").read_bytes())
context = Context(run_id=1, node_id=7, node_config=node, state=RecordDict(), run_config=config)
answers = []
for kind, header, frames in questions:
    message = Message(wire.build_record(header, frames), 7, kind, group_id="1")
    answers.append(wire.read_record(client.app(message, context).content))
(folder / "answers").write_bytes(pickle.dumps((answers, "torch" in sys.modules)))
"""

Part = tuple[dict[str, Any], dict[str, bytes]]


def recorded(out: Path, *, who: int, **settings: Any) -> tuple[list[tuple[str, *Part]], list[Part]]:
    """What one client is asked in a run of this process, and what it answers."""
    questions: list[tuple[str, *Part]] = []
    answers: list[Part] = []

    def listening(message: Message, context: Context) -> Message:
        reply = client.app(message, context)
        if context.node_config["partition-id"] == who:
            kind = message.metadata.message_type
            questions.append((kind, *wire.read_record(message.content)))
            answers.append(wire.read_record(reply.content))
        return reply

    run_inline(tiny(**settings), out, clients=listening)
    return questions, answers


def answered(
    folder: Path, questions: list[Any], *, who: int, blocked: list[str], **settings: Any
) -> tuple[list[Part], bool]:
    """The answers of a client in a process of its own, and whether it has imported torch."""
    config = tiny(**settings)
    open_workspace(config).lay_out(folder / "setup", with_start=False)
    values = config.flower() | launch_values(folder, resume=False, setup=folder / "setup")
    node = {"partition-id": who, "num-partitions": 4}
    (folder / "questions").write_bytes(pickle.dumps((values, node, questions)))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), *blocked],
        cwd=FOLDER, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers: tuple[list[Part], bool] = pickle.loads((folder / "answers").read_bytes())
    return answers


def same(ours: list[Part], theirs: list[Part]) -> None:
    """Headers but for the peak of memory, and every bit of the frames."""
    assert len(ours) == len(theirs)
    for (header, frames), (other, other_frames) in zip(ours, theirs, strict=True):
        held, other_held = header.pop("u", ""), other.pop("u", "")
        assert held[: len(held) // 2] == other_held[: len(other_held) // 2]
        assert header == other
        assert frames == other_frames


TORCH = ["torch", "torchvision", "datasets", "pyarrow", "sklearn", "flwr_datasets"]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fedtiny", {}),
        ("fedtiny", {"data__augment": True, "federation__value_dtype": "bf16"}),
        ("fedtiny", {"federation__uplink_dtype": "int8", "federation__uplink_topk": 0.3}),
        ("fedprox", {"method__mu": 0.1}),
    ],
)
def test_a_client_without_torch_gives_the_same_answers(
    method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {
        "method__name": method,
        "training__rounds": 2,
        "method__adjust_until": 2,
        **settings,
    }
    questions, answers = recorded(tmp_path / "run", who=2, **settings)
    actions = [header["a"] for _, header, _ in questions]
    selection = ["measure", "score"] if method == "fedtiny" else []
    assert actions == ["describe", *selection, "train", "train"]
    assert any("e0" in frames for _, frames in answers) == (method == "fedtiny")  # with growth
    assert not any("skip" in header for header, _ in answers)
    ours, has_torch = answered(tmp_path, questions, who=2, blocked=TORCH, **settings)
    assert not has_torch
    same(ours, answers)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("heterofl", {}),
        ("fjord", {"federation__uplink_dtype": "bf16"}),
        ("small-dense", {"training__execution": "sparse"}),
        ("fedavg", {"training__execution": "sparse"}),
    ],
)
def test_a_dense_client_without_torch_gives_the_same_answers(
    method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """One of a middle width, whose network the question brings, or where the setting says so."""
    settings = {"method__name": method, "training__rounds": 2, "model__width": 8, **settings}
    tiers = method in ("heterofl", "fjord")
    who = int(np.flatnonzero(assigned([1, 1, 1], 4, seed=7) == 1)[0]) if tiers else 2
    questions, answers = recorded(tmp_path / "run", who=who, **settings)
    actions = [header["a"] for _, header, _ in questions]
    assert actions == ["describe", "train", "train", *["measure"] * tiers]
    assert [bool(header.get("o")) for _, header, _ in questions[1:]] == [tiers] * (2 + tiers)
    assert not any("skip" in header for header, _ in answers)
    ours, has_torch = answered(tmp_path, questions, who=who, blocked=TORCH, **settings)
    assert not has_torch
    same(ours, answers)


def test_a_network_without_a_program_is_computed_by_torch(tmp_path: Path) -> None:
    """In this process and in one of its own, with the same bits."""
    settings = {"model__name": "smooth_network:smooth", "model__width": 0, "training__rounds": 2}
    questions, answers = recorded(tmp_path / "run", who=1, **settings)
    start, *rounds = read_metrics(tmp_path / "run")
    assert start["no_program"]
    assert [line["clients"] for line in rounds] == [[0, 1, 2, 3]] * 2
    assert any("e0" in frames for _, frames in answers)
    assert all("p" not in header for _, header, _ in questions)
    ours, has_torch = answered(tmp_path, questions, who=1, blocked=[], **settings)
    assert has_torch
    same(ours, answers)
