"""Planted label noise: exact flips, a page by hand, and one small cell for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from datapruning.scoring.methods import METHODS as KNOWN
from prunelab.data.datasets import load_dataset
from prunelab.data.samples import ImageSamples
from simulations.noisy_labels import METHODS, RULES, Preset, body, found_by, measured, with_noise

TINY = Preset("digits", 60, epochs=2, batch_size=30, noise=(0.2,), runs=4, epochs_looked_at=(1, 2))


@pytest.fixture(scope="module")
def clean() -> ImageSamples:
    return ImageSamples.of(load_dataset("digits", num_train=TINY.num_train))


def test_the_share_is_exact_and_every_flip_is_to_another_class(clean: ImageSamples) -> None:
    assert set(METHODS) <= set(KNOWN)
    seen = []
    for seed in range(20):
        noisy, is_noisy = with_noise(clean, noise=0.3, seed=seed)
        assert int(is_noisy.sum()) == 18
        assert torch.equal(noisy.labels != clean.labels, is_noisy)
        seen += ((noisy.labels - clean.labels) % 10)[is_noisy].tolist()
        assert torch.equal(with_noise(clean, noise=0.3, seed=seed)[0].labels, noisy.labels)
    # 360 steps of 1 to 9, 40 of each expected; six standard deviations are 36.
    assert set(seen) == set(range(1, 10))
    assert max(map(seen.count, range(1, 10))) < 76


def test_named_by_hand() -> None:
    """Of ten samples four are noisy; five are named, three of them rightly."""
    is_noisy, issues = torch.zeros(10).bool(), torch.zeros(10).bool()
    is_noisy[:4], issues[1:6] = True, True
    assert found_by(is_noisy, issues) == {"named": 0.5, "precision": 0.6, "recall": 0.75}


def made(auc: float) -> dict[str, Any]:
    issue = {"named": 0.2, "precision": auc, "recall": 0.5}
    return {
        "auc": {"random": 0.5, "loss": auc},
        "by_epoch": {name: {"1": auc, "2": 0.75} for name in ("el2n", "loss")},
        "issues": dict.fromkeys(RULES, issue),
    }


def test_page_by_hand() -> None:
    """.7, .8, .9: mean .8, deviation .1, t of two degrees of freedom 4.303: ± .248."""
    lines = "\n".join(body({0.2: [made(0.7), made(0.8), made(0.9)]}, TINY)).splitlines()
    assert "| loss | 1 | 0.800 ± 0.248 |" in lines
    assert "| random | 0 | 0.500 ± 0.000 |" in lines
    assert lines.index("| loss | 1 | 0.800 ± 0.248 |") < lines.index(
        "| random | 0 | 0.500 ± 0.000 |"
    )
    assert "| 1 | 0.800 ± 0.248 | 0.800 ± 0.248 |" in lines
    assert "| both | 20.0 ± 0.0 | 80.0 ± 24.8 | 50.0 ± 0.0 |" in lines


def test_one_cell_and_again(clean: ImageSamples, tmp_path: Path) -> None:
    """The tables that it left are what it goes on from, to the same figures."""
    methods, out = ("loss", "self-confidence", "random"), tmp_path / "cell" / "scores.parquet"
    found = measured(clean, TINY, noise=0.2, seed=0, out=out, methods=methods)
    assert set(found["auc"]) == set(methods)
    assert all(0 <= value <= 1 for value in found["auc"].values())
    assert list(found["by_epoch"]["loss"]) == ["1", "2"]
    assert set(found["issues"]) == set(RULES)
    assert len(list(out.parent.glob("scores-*.parquet"))) == 7
    again = measured(clean, TINY, noise=0.2, seed=0, out=out, methods=methods)
    del found["processor_seconds"], again["processor_seconds"]
    assert again == found
