"""Roles as clients: what they say, whose samples are whose, the tables, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prunelab.errors import DataError
from simulations import federated_language
from simulations.federated_language import (
    METHODS,
    RolesJob,
    Setting,
    body,
    held_back,
    jobs_of,
    parse,
    pools,
    samples_of,
    spoken,
)
from simulations.jobs import FINISHED, Outcome

PLAY = "\n\n".join(
    f"{role}:\n" + " ".join(f"{word}{place}" for place in range(60))
    for role, word in (("KING", "a"), ("FOOL", "bb"), ("QUEEN", "ccc"))
)
SETTING = Setting("model", "text", 0.5, roles=2, samples=4, length=16, rounds=2, lr=0.01)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text, whose letters are tokens."""

    def letters(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    monkeypatch.setattr(federated_language, "read_text", lambda path: PLAY)
    monkeypatch.setattr(federated_language, "read_tokenizer", lambda source: letters)
    pools.cache_clear()


def test_who_says_most_comes_first() -> None:
    assert list(spoken(PLAY)) == ["QUEEN", "FOOL", "KING"]
    assert spoken("A:\nx\ny\n\nno role\n\nB C:\nlong words\n") == {"B C": "long words", "A": "x\ny"}
    with pytest.raises(DataError, match="ROLE:"):
        spoken("A text: without roles.\n\nAnother.")


def test_every_sample_is_its_role_s_and_none_is_tested(play: None) -> None:
    found, again, other = (samples_of(SETTING, seed) for seed in (0, 0, 1))
    assert found.train_groups is not None
    assert found.train_groups.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(found.train.input_ids, again.train.input_ids)  # type: ignore[union-attr]
    assert not torch.equal(found.train.input_ids, other.train.input_ids)  # type: ignore[union-attr]
    for place, letter in enumerate("cb"):
        own = found.train.input_ids[found.train_groups == place]  # type: ignore[union-attr]
        assert all(letter in bytes(row.tolist()).decode() for row in own)
    tests = {bytes(row.tolist()) for row in held_back(SETTING)}
    assert tests
    assert not tests & {bytes(row.tolist()) for row in found.train.input_ids}  # type: ignore[union-attr]


def test_tables_by_hand() -> None:
    jobs = jobs_of(SETTING, ["magnitude", "wanda"], range(2))
    assert [job.name for job in jobs] == ["magnitude-0", "wanda-0", "magnitude-1", "wanda-1"]

    def outcome(job: RolesJob) -> Outcome:
        is_wanda = job.method == "wanda"
        return Outcome(
            FINISHED,
            values={
                "start": 70.0, "pruned": 90.0 - job.seed, "perplexity": 20.0 if is_wanda else 40.0,
                "density": 0.5, "bytes_before": 3000 * is_wanda, "bytes_up": [8000, 6000],
            },
        )  # fmt: skip

    text = "\n".join(body(jobs, {job.name: outcome(job) for job in jobs}))
    assert "before all is 70.00" in text
    assert "| magnitude | 0.500 | 89.50 ± 0.71 | 40.000 ± 0.000 |  | 0 | 8 | 6 | 14 |" in text
    wanda = "| wanda | 0.500 | 89.50 ± 0.71 | 20.000 ± 0.000 | -0.693 ± 0.000 | 3 | 8 | 6 | 17 |"
    assert wanda in text


def test_every_method_takes_a_density() -> None:
    assert [make(0.25).name for make in METHODS.values()] == [n.split("-")[0] for n in METHODS]
    assert {make(0.25).target_density for make in METHODS.values()} == {0.25, 1.0}


def test_what_cannot_be_is_told(play: None, tmp_path: Path, capsys: Any) -> None:
    common = ["--model", "m", "--data", "t", "--length", "16", "--out", str(tmp_path / "out")]
    for wrong, reason in (
        (["--methods", "fedtinny"], "no method 'fedtinny'"),
        (["--density", "1.5"], "expected 0 < density <= 1"),
        (["--roles", "9"], "the text has 3 roles; expected 9"),
        (["--roles", "3", "--length", "500"], "less than one sequence"),
    ):
        with pytest.raises(SystemExit):
            parse([*common, *wrong])
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert len(parse([*common, "--roles", "3", "--seeds", "2"])[1]) == 2 * len(METHODS)
