"""A run as the command shows it while it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from federation import tiny

from fedprune.reports import progress
from fedprune.reports.progress import Watch, round_line
from prunelab.runs.folder import append_metrics, prepare


def a_round(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "round": number, "test_accuracy": 0.5, "bytes_up": 10_000, "bytes_down": 20_000, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("left", [None, 3599.4, 86_399.0, 999 * 86_400.0])
def test_the_longest_line_of_a_round_fits_80_columns(left: float | None) -> None:
    line = a_round(1000, test_accuracy=1.0, bytes_up=99_900_000, bytes_down=9_990_000_000)
    assert len(round_line(line, rounds=1000, left=left)) <= 80


def watched(
    folder: Path,
    looks: list[list[int]],
    rounds: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> list[list[str]]:
    """The lines of each look, 10 s after the one before, at a run with these new rounds."""
    config = tiny(training__rounds=rounds)
    prepare(folder, config.toml())
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(progress, "say", print)
    watch, printed = Watch(folder, config), []
    for numbers in looks:
        for number in numbers:
            append_metrics(folder, a_round(number))
        watch()
        printed.append(capsys.readouterr().out.splitlines())
    return printed


def test_what_is_left_is_told_by_rounds_that_were_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounds of 10 s: of four, the third leaves 10 s. Two that were there before tell nothing."""
    printed = watched(tmp_path, [[1, 2], [3], [4], [], [5]], 5, monkeypatch, capsys)
    assert [["left" in line for line in lines] for lines in printed] == [
        [False, False], [False], [True], [], [True],
    ]  # fmt: skip
    assert printed[2][0].endswith("left 10 s")


def test_rounds_that_are_seen_together_are_told_by_the_time_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rounds in 10 s: of the six that are left, one takes 5 s."""
    printed = watched(tmp_path, [[0], [1], [2, 3]], 9, monkeypatch, capsys)
    assert printed[-1][-1].endswith("left 30 s")


def test_clients_left_out_are_warnings_whatever_else_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = a_round(1, skipped=[{"client": 2, "reason": "away [/b]"}])
    prepare(tmp_path, tiny().toml())
    append_metrics(tmp_path, line)
    seen: list[Any] = []
    Watch(tmp_path, tiny(), show=seen.append)()
    assert seen == [line]
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err == "warning: round 1: client 2 left out: away [/b]\n"
