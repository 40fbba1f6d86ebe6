"""The grid of ways to prune a language model: its runs, its tables, and a tiny one for real."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import llama, texts

from prunelab.language.tasks import Facts, choices, planted
from simulations.jobs import FINISHED, Outcome
from simulations.language_ways import NOT_IN_GROUPS, UNITS, WEIGHTS, Task
from simulations.prune_language_model import (
    REFUSED,
    PruneJob,
    Questions,
    Setting,
    body,
    jobs_of,
    parse,
)
from sparsemodel.masks.mask import Mask
from sparsemodel.masks.structure import is_n_of_m

SETTING = Setting("model", "text", "", 4, 4, 8, 5)


def finished(perplexity: float) -> Outcome:
    return Outcome(FINISHED, values={"perplexity": perplexity, "processor_seconds": 2.0})


def test_every_run_is_named_apart() -> None:
    jobs = jobs_of(SETTING, ["0.5", "2:4"], ["0.8"], range(2))
    assert len({job.name for job in jobs}) == len(jobs)
    assert len(jobs) == 1 + 2 * (2 * len(WEIGHTS) - len(NOT_IN_GROUPS) + len(UNITS))
    assert not any("/" in job.name or " " in job.name for job in jobs)


def test_tables_by_hand() -> None:
    jobs = jobs_of(SETTING, ["0.5", "4:8"], ["0.8"], range(2))
    values: Mapping[tuple[str, str], list[float]] = {
        ("magnitude", "0.5"): [10.0, 10.0], ("wanda", "0.5"): [5.0, 5.0],
        ("random", "0.5"): [float("inf"), 7.0], ("units, magnitude", "0.8"): [4.0, 4.0],
    }  # fmt: skip
    found = {
        job.name: finished(values.get((job.way, job.pattern), [20.0, 20.0])[job.draw])
        if job.way
        else finished(3.0)
        for job in jobs
    }
    found |= {
        job.name: Outcome(REFUSED, reason="rows of 172") for job in jobs if job.pattern == "4:8"
    }
    text = "\n".join(body(jobs, found))
    assert "dense model's perplexity is 3.00" in text
    assert "Refused: rows of 172." in text
    assert "| wanda | 5.00 ± 0.00 | - | 2.0 |" in text
    assert "| random | infinite | - | 2.0 |" in text
    assert "| wanda | -0.69 ± 0.00 | - |" in text
    assert "| random | -0.36 | - |" in text  # the draw that is finite
    assert "| units, amp | +1.61 ± 0.00 |" in text
    assert "What perplexity hides" not in text  # nobody was asked
    some = {job.name: found[job.name] for job in jobs if job.way in {"magnitude", "wanda"}}
    del some["wanda-0.5-1"]  # a page of what there is
    text = "\n".join(body(jobs, some))
    assert "| wanda | 5.00 | - | 2.0 |" in text
    assert "| wanda | -0.69 | - |" in text
    assert "random" not in text.split("over that of")[0]


def test_what_was_asked_is_listed_by_perplexity() -> None:
    jobs = jobs_of(SETTING, ["0.5"], [], range(1), ["random", "wanda"])
    assert [job.way for job in jobs] == ["", "random", "wanda"]
    found = {}
    for job, perplexity, share in zip(jobs, (3.0, 9.0, 4.0), (1.0, 0.25, 1234.5), strict=True):
        one = finished(perplexity)
        found[job.name] = Outcome(FINISHED, values={**one.values, "answers": {"facts": share}})
    text = "\n".join(body(jobs, found))
    order = [text.index(f"| {row} |") for row in (
        "dense | 1 | 3.00 | 1", "wanda | 0.5 | 4.00 | 1,234", "random | 0.5 | 9.00 | 0.250"
    )]  # fmt: skip
    assert order == sorted(order)
    assert "magnitude" not in text.split("## What")[0].split("over that of")[0]


def test_questions_are_those_of_the_dense_model() -> None:
    model, chosen = llama(), texts(1)[0]["input_ids"]
    known = Facts(chosen, torch.tensor([[0, 1]]))
    said = choices(model, chosen)
    asked = Questions(known, planted(chosen[:, :4], seed=0), chosen, said)
    assert asked.answers(model)["agreement"] == 1
    assert asked.answers(llama(seed=1))["agreement"] < 1


@pytest.mark.parametrize("way", [*WEIGHTS, *UNITS])
def test_every_way_prunes(way: str) -> None:
    model, batches = llama(), texts(2)
    mask = {**WEIGHTS, **UNITS}[way](model, Task(batches, 0.5, "row", 0, 5))
    for name in mask:
        assert torch.equal(model.get_parameter(name) * mask[name], model.get_parameter(name))
    cut = Mask({name: mask[name] for name in mask if not mask[name].all()})  # all, or channels'
    assert cut.density == pytest.approx(0.5, abs=0.1 if way in UNITS else 1e-3)
    if way in WEIGHTS and way not in NOT_IN_GROUPS:
        grouped = llama()
        mask = WEIGHTS[way](grouped, Task(batches, 0.5, "2:4", 0, 5))
        assert all(is_n_of_m(mask[name]) for name in mask)


def test_what_cannot_be_is_told(tmp_path: Path, capsys: Any) -> None:
    common = ["--model", "./nothing", "--data", "nothing.txt", "--out", str(tmp_path / "out")]
    for wrong, reason in (
        ([], "no such model"),
        (["--patterns", "half"], "could not convert"),
        (["--shares", "1.5"], "a density is in"),
    ):
        with pytest.raises(SystemExit):
            parse([*common, *wrong])
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert PruneJob(SETTING).name == "dense"
