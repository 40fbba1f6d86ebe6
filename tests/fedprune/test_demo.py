"""The narrated run: what it says is what the runs left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from processes import Command

from fedprune.demo import INK, NEXT, drawn
from fedprune.rounds.folder import read_metrics, read_summary
from prunelab.pages.units import format_bytes, percent


def test_the_story_is_that_of_the_folder(tmp_path: Path) -> None:
    """Numbers on the terminal are those of both run folders; it is not written over."""
    words = ("fedprune", "demo", "--rounds", "2", "--out", "my demo")
    done = Command(*words, cwd=tmp_path).ended()
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "my demo"
    start, *rounds = read_metrics(folder / "pruned")
    tiny, dense = read_summary(folder / "pruned"), read_summary(folder / "dense")
    for line in rounds:
        assert f"{percent(line['test_accuracy'])}  " in done.stdout
    losses = start["selection"]["losses"]
    assert f"loss {losses[start['selection']['winner']]:.3f}  <- taken" in done.stdout
    for number in (
        percent(dense["test_accuracy"]),
        format_bytes(tiny["bytes_up_steady_round"]),
        format_bytes(tiny["bytes_dense_round"]),
        format_bytes(tiny["state_bytes"]),
    ):
        assert number in done.stdout
    for client in start["clients"]:
        row = next(r for r in done.stdout.splitlines() if f"client {client['client']} " in r)
        shown = [0 if cell == "." else int(cell) for cell in row.split()[2:]]
        assert shown == client["labels"]
    assert max(map(len, done.stdout.splitlines())) <= 80
    again = Command(*words, cwd=tmp_path).ended()
    assert again.returncode == 1
    assert "my demo" in again.stderr


def test_pictures_are_drawn_by_their_ink() -> None:
    images = np.array([[[[0, 255], [128, 51]]], [[[255, 0], [0, 0]]]], np.uint8)
    first, second, names = drawn(images, ["3", "cat"])
    assert first == "    @@  @@    "
    assert second.rstrip() == "  ::.."
    assert set(first + second) <= set(INK)
    assert names.split() == ["->", "3", "->", "cat"]


@pytest.mark.parametrize("command", [command for command, _ in NEXT])
def test_commands_that_it_names_exist(command: str, tmp_path: Path) -> None:
    name, *words = command.split()
    given = [word for word in words if word.startswith("--")]
    plain = words[: next((k for k, word in enumerate(words) if word.startswith("-")), len(words))]
    known = [word for word in plain if word not in {"digits"}]
    done = Command(name, *known, "--help", cwd=tmp_path).ended()
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for option in given)
