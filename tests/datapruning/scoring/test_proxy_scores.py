"""The benchmark of proxies' scores prints what it promises; nothing here is timed."""

from __future__ import annotations

import json

import pytest

from benchmarks import proxy_scores
from prunelab.data.datasets import load_dataset
from prunelab.training.loop import TrainingConfig
from sparsemodel.kernels.cpu import library as cpu


@pytest.mark.skipif(cpu.isa() is None, reason="no native kernels here")
def test_rows() -> None:
    """A proxy of density 1 is the dense network: as far from the next seed's as that is."""
    setting = proxy_scores.Setting(
        data=load_dataset("digits", num_train=100),
        model="resnet8",
        config=TrainingConfig(epochs=2, lr=0.05),
        criteria=["magnitude"],
        densities=[0.1, 1.0],
        seeds=[0, 1],
    )
    rows = list(proxy_scores.rows(setting, ["el2n", "grand"]))
    measures = ["time", "1 - Spearman", "1 - overlap of the kept half"]
    assert [(row.case, row.density) for row in rows] == [
        (f"{score} {measure}, resnet8 magnitude", density)
        for score in ("el2n", "grand")
        for measure in measures
        for density in (0.1, 1.0)
    ]
    for row in rows:
        assert json.loads(row.as_json())["ratio"] == pytest.approx(row.peer / row.ours)
        if row.density == 1 and row.unit == "":
            assert row.ours == pytest.approx(row.peer, abs=0.02)
            assert 0 < row.ours < 2
