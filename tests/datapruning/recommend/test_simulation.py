"""The DEALRec experiment: its page by hand, and a small run that finds its cells again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from datapruning.recommend import steps
from datapruning.recommend.finetune import FinetuneConfig
from datapruning.recommend.surrogate import SurrogateConfig
from simulations import dealrec_games
from simulations.dealrec_table import SCORES, page

from .made import made_histories
from .test_cli import written

pytest.importorskip("transformers")


def cells(out: Path, *, seed: int, dealrec: float, random: float, full: float) -> None:
    """Results of one seed: NDCG@10 of three arms, 0 for the others; 100 s a full run."""
    for name, seconds in (("influence", 30.0), ("effort", 50.0), ("grand", 60.0), ("el2n", 20.0)):
        _write(out / f"s{seed}" / f"score-{name}", {"seconds": seconds})
    values = {"dealrec": dealrec, "random": random, "full": full}
    for arm in SCORES:
        for budget in ("steps", "epochs"):
            found: dict[str, Any] = {
                name: values.get(arm, 0.0) for name in ("recall@10", "ndcg@10")
            }
            found |= {"recall@20": 0.0, "ndcg@20": 0.0, "test_loss": 3.0, "num_samples": 2}
            found |= {
                "commit": "abc",
                "steps": 10,
                "finetune_seconds": 100.0 if arm == "full" else 5.0,
            }
            _write(out / f"s{seed}" / f"{arm}-{budget}", found)
    for arm, fraction, loss in (("dealrec", 0.1, 3.5), ("dealrec", 0.5, 2.9), ("random", 0.1, 4.0)):
        _write(out / f"s{seed}" / f"{arm}-{fraction:g}", {"test_loss": loss + 0.1 * seed})
    _write(out / f"s{seed}" / "random-0.5", {"test_loss": 3.2})


def _write(folder: Path, found: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(found))


def test_claims_and_times_by_hand(tmp_path: Path) -> None:
    """DEALRec pays 30 + 50 s of scores and 5 of training against 100: 15 % saved, random 95 %.

    NDCG@10 against random: +1 and −3 hundredths, mean −1, s = 2.828; against all: −2, −2.
    Losses at half the samples: 2.9 and 3.0 against 3.0 and 3.0 of all, so −.05 ± .071: met.
    """
    cells(tmp_path, seed=0, dealrec=0.03, random=0.02, full=0.05)
    cells(tmp_path, seed=1, dealrec=0.01, random=0.04, full=0.03)
    metrics = ("recall@10", "ndcg@10", "recall@20", "ndcg@20")
    text = page(
        tmp_path, [0, 1], settings={"keep": 0.02}, fractions=(0.1, 0.5), pool=100, questions=50,
        references={"popularity": dict.fromkeys(metrics, 0.01)},
        command="--preset small --seeds 0,1",
    )  # fmt: skip
    assert "| **DEALRec**: both, coverage | 2.00 ± 1.41 | 2.00 ± 1.41 |" in text
    assert "| 10 | 80 | 5.0 | 85 % |" in text
    assert "ndcg@10 -1.000 ± 2.828, 1 of 2 seeds" in text
    assert "ndcg@10 -2.000 ± 0.000, 0 of 2 seeds" in text
    assert "Time saved by dealrec (equal steps, scoring included): +15 %." in text
    assert "Time saved by random (equal epochs, scoring included): +95 %." in text
    assert "| 0.5 | 2.950 ± 0.071 | -0.050 ± 0.071 | 3.200 ± 0.000 | +0.200 ± 0.000 |" in text
    assert (
        "- **DEALRec**: both, coverage: a mean loss of at most that of all samples from 0.5 on."
        in text
    )
    assert (
        "- random: a mean loss of at most that of all samples at none of these fractions." in text
    )
    assert "- commit abc, " in text
    assert "| popularity | 1.00 | 1.00 | 1.00 | 1.00 |" in text


def test_a_small_run_finds_its_cells_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = dealrec_games.Preset(
        model="scratch:tiny",
        users=30,
        test_users=8,
        surrogate=SurrogateConfig(epochs=1, hidden=8, negatives=10),
        training=FinetuneConfig(epochs=1, batch_size=16),
        max_titles=2,
        max_length=96,
        keep=0.3,
        fractions=(0.6,),
    )
    monkeypatch.setattr(steps, "DEPTH", 20)
    monkeypatch.setattr(steps, "TITLES", FinetuneConfig(steps=2, batch_size=8))
    monkeypatch.setitem(dealrec_games.PRESETS, "small", preset)
    data, out = written(made_histories(num_users=50), tmp_path / "games"), tmp_path / "out"
    arguments = ["--data", str(data), "--seeds", "0", "--out", str(out), "--model", "scratch:tiny"]
    threads = torch.get_num_threads()
    try:
        dealrec_games.main(arguments)
        first = (out / "table.md").read_text()
        times = {path: path.stat().st_mtime_ns for path in out.glob("s0/*/result.json")}
        assert len(times) == 4 + 1 + 7 * 2 + 2
        dealrec_games.main(arguments)
    finally:
        torch.set_num_threads(threads)
    assert (out / "table.md").read_text() == first
    assert {path: path.stat().st_mtime_ns for path in times} == times
    random, dealrec = (
        json.loads((out / "s0" / f"{arm}-steps" / "result.json").read_text())
        for arm in ("random", "dealrec")
    )
    assert random["num_samples"] == dealrec["num_samples"]
    assert (
        random["steps"]
        == dealrec["steps"]
        == json.loads((out / "s0" / "full-steps" / "result.json").read_text())["steps"]
    )
    with pytest.raises(SystemExit, match="other settings"):
        dealrec_games.main([*arguments[:-1], "scratch:small"])
