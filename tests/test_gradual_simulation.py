"""Pruning a small language model in training: names, text, the page by hand, one tiny run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simulations.gradual_pruning import (
    DENSE,
    NARROW,
    WAYS,
    Setting,
    TrainJob,
    body,
    grammar_text,
    jobs_of,
    narrow,
    num_parameters,
)
from simulations.jobs import FAILED, FINISHED, Outcome

TINY = Setting("", steps=8, width=32, layers=1, length=16)


def test_jobs_are_named_apart() -> None:
    jobs = jobs_of(TINY, [0.1, 0.2, 0.5], range(3))
    assert len({job.name for job in jobs}) == len(jobs) == 3 * (1 + 3 * (len(WAYS) + 1))
    assert all(re.fullmatch(r"[\w.,-]+", job.name) for job in jobs)
    assert [job.way for job in jobs[:2]] == [DENSE, "magnitude, once"]


def test_sentences_agree_and_sums_are_right() -> None:
    text = grammar_text(0, num_sentences=500)
    assert text == grammar_text(0, num_sentences=500) != grammar_text(1, num_sentences=500)
    lines = text.splitlines()
    assert len(lines) == 500
    sums = [list(map(int, re.findall(r"\d+", line))) for line in lines if "make" in line]
    assert 60 < len(sums) < 140
    assert all(a + b == total for a, b, total in sums)
    plain = [line for line in lines if "make" not in line and "that" not in line]
    for line in plain:
        words = line.removesuffix(".").split()
        subject, verb = words[1:3] if len(words) in {5, 6} and words[3] == "the" else words[2:4]
        is_plural = subject in {"cats", "birds", "children", "wolves", "kings"}
        assert verb.endswith("s") is not is_plural, line


def test_page_by_hand() -> None:
    """Perplexities 2 and 2e in two seeds, of pruning once 2 and 2: ln 1 and ln e, mean .5.

    Their deviation is .707, the t of one degree of freedom 12.706: ± 6.353.
    """
    jobs = jobs_of(TINY, [0.5], range(2))
    found = {}
    for job in jobs:
        value = 2 * 2.718281828 if (job.way, job.seed) == ("GMP", 1) else 2.0
        found[job.name] = Outcome(
            FINISHED, values={"perplexity": value, "average_parameters": 1000.0 + job.seed}
        )
    found[TrainJob(TINY, "GraNet", 0.5, 0).name] = Outcome(FAILED)
    found[TrainJob(TINY, "GraNet", 0.5, 1).name] = Outcome(FAILED)
    lines = "\n".join(body(jobs, found)).splitlines()
    assert "The dense model's is 2.000 ± 0.000." in lines
    assert "| GMP | 3.718 ± 2.430 |" in lines
    assert "| GMP | +0.500 ± 6.353 |" in lines
    assert lines.count("| 25-75 % | +0.000 ± 0.000 |") == 2
    assert "| GraNet | - |" in lines
    assert f"| {NARROW} | 1,000 |" in lines


@pytest.mark.parametrize("wanted", [6_000, 9_000, 14_000])
def test_the_narrow_model_has_as_many_parameters(wanted: int) -> None:
    """To half of what one more feed-forward feature brings."""
    model = narrow(TINY, vocabulary=36, seed=0, parameters=wanted)
    assert abs(num_parameters(model) - wanted) <= 3 * model.get_input_embeddings().embedding_dim / 2


@pytest.mark.parametrize("way", [DENSE, NARROW, *WAYS])
def test_one_tiny_run_and_again(way: str, tmp_path: Path) -> None:
    job = TrainJob(TINY, way, 0.1, 0)
    values = dict(job.run(tmp_path).values)
    assert 1 < values["perplexity"] < 60
    whole = TrainJob(TINY, DENSE, 1.0, 0).run(tmp_path).values["average_parameters"]
    assert (values["average_parameters"] < whole) is (way != DENSE)
    again = dict(job.run(tmp_path).values)
    del values["processor_seconds"], again["processor_seconds"]
    assert again == values
