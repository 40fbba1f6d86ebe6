"""Nodes with data of their own take part, whatever their data are."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from federation import digest
from flwr.app import Context, RecordDict
from PIL import Image

from fedprune.config import RunConfig
from fedprune.flower import client, server
from fedprune.flower.client import SETUP
from fedprune.flower.inline import InlineGrid
from fedprune.flower.launch import launch_values
from fedprune.local.private import REFUSAL
from fedprune.rounds.folder import prepare, read_metrics
from prunelab.data.own_store import RunSamples, write_own_store

NAMES = ("ant", "bee", "cow")


def pictures(root: Path, names: tuple[str, ...], *, each: int, seed: int) -> Path:
    """Pictures that are bright in the rows of their class."""
    random = np.random.default_rng(seed)
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(0, 60, (9, 9), dtype=np.uint8)
            pixels[3 * NAMES.index(name) :][:3] += 150
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def federated(out: Path, data: Path, own: Path) -> tuple[Path, InlineGrid]:
    """A run of two nodes, the second with its own data, as `flwr run` by hand has it."""
    config = RunConfig.parse(
        {
            "data.dataset": str(data), "data.clients": 2, "model.name": "resnet8",
            "model.width": 4, "training.rounds": 1, "method.name": "magnitude",
            "method.density": 0.3, "federation.max_share": 1.0, "server.per_class": 2,
        }
    )  # fmt: skip
    prepare(out, config, resume=False)
    values = {**config.flower(), **launch_values(out, resume=False, setup=out)}
    values.pop(SETUP)
    nodes = InlineGrid(client.app, run_config=values, num_nodes=2)
    nodes.contexts[1001].node_config["data-path"] = str(own)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=values)
    server.app(nodes, context)
    return out, nodes


@pytest.mark.slow
def test_class_folders_of_a_node_give_the_bits_of_their_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class is known by its name, though the node has no sample of another."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = pictures(tmp_path / "data", NAMES, each=20, seed=0)
    own = pictures(tmp_path / "own", ("cow", "bee"), each=15, seed=1)
    store = write_own_store(str(own), tmp_path / "store", expected=RunSamples(class_names=NAMES))
    assert np.bincount(store.targets).tolist() == [0, 15, 15]
    by_folder, _ = federated(tmp_path / "folder", data, own)
    by_store, _ = federated(tmp_path / "by-store", data, store.folder)
    assert digest(by_folder) == digest(by_store)
    for line in read_metrics(by_folder):
        assert not line.get("skipped")


@pytest.mark.slow
def test_a_node_with_a_class_that_the_run_does_not_know_is_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In its own log: names, files and cells of a node stay there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = pictures(tmp_path / "data", NAMES, each=20, seed=0)
    own = pictures(tmp_path / "own", ("cow",), each=4, seed=1)
    (own / "cow").rename(own / "owl")
    out, _ = federated(tmp_path / "run", data, own)
    skipped = [entry for line in read_metrics(out) for entry in line.get("skipped", [])]
    assert any(entry["reason"].endswith(REFUSAL) for entry in skipped)
    assert not any("owl" in entry["reason"] or "own/" in entry["reason"] for entry in skipped)
    assert "the class 'owl', which is none of 'ant'" in caplog.text
