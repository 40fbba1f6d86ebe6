"""The simulation of fewer bytes up: its grid, its table by hand, and one short run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedprune import RunConfig
from simulations.uplink_bytes import (
    COMMON,
    EXACT,
    PRESETS,
    Way,
    feedback_rows,
    result_rows,
    run_one,
    ways,
)


def test_every_way_is_a_valid_configuration_of_its_own() -> None:
    """Of each format at each share with and without feedback; what is exact needs none."""
    for name, count in (("small", 1 + 2 * (3 + 3 * 2)), ("full", 1 + 2 * (3 + 3 * 4))):
        found = ways(PRESETS[name])
        assert (found[0], len(found)) == (EXACT, count)
        assert len({way.name for way in found}) == count
        for way in found:
            uplink = RunConfig.parse({**COMMON, **way.settings()}).federation.uplink
            assert (uplink.dtype, uplink.topk) == (way.dtype, way.topk)
            assert uplink.exact == (way == EXACT)


def result(accuracy: float, size: int) -> dict[str, Any]:
    return {
        "test_accuracy": accuracy,
        "bytes_up_steady_round": size,
        "bytes_up": 10 * size,
        "state_bytes": 3 * size,
    }


def test_table_by_hand() -> None:
    """96 and 94: 95.0 ± 1.4; 95 and 92: 93.5 ± 2.1; −1 and −2: −1.5 ± 0.7."""
    way = Way("int8", 0.1, error_feedback=True)
    results = {
        (0.05, EXACT, 0): result(0.96, 2000),
        (0.05, way, 0): result(0.95, 200),
        (0.05, EXACT, 1): result(0.94, 2000),
        (0.05, way, 1): result(0.92, 400),
        (0.01, EXACT, 0): result(0.1, 1),
    }
    assert result_rows(results, density=0.05, seeds=[0, 1]) == [
        ["fp32", "1", "–", "95.0 ± 1.4", "", "2.00 kB", "20.0 kB", "6.00 kB"],
        ["int8", "0.1", "on", "93.5 ± 2.1", "-1.5 ± 0.7", "300 B", "3.00 kB", "900 B"],
    ]


def test_feedback_by_hand() -> None:
    """+1 and +3: 2.0 ± 1.4, two of two; the exact way has none."""
    on, off = Way("int8", 0.1, error_feedback=True), Way("int8", 0.1)
    results = {(0.05, EXACT, 0): result(0.9, 1)}
    for seed, (with_it, without) in enumerate(((0.91, 0.90), (0.93, 0.90))):
        results[0.05, on, seed], results[0.05, off, seed] = result(with_it, 1), result(without, 1)
    assert feedback_rows(results) == [["0.05", "0.1", "+2.0 ± 1.4", "2 of 2"]]


def test_a_cell_is_run_once(tmp_path: Path) -> None:
    settings = {
        **COMMON, **Way("int8", 0.3, error_feedback=True).settings(),
        "data.num_train": 300, "data.num_test": 60, "data.clients": 3, "model.width": 4,
        "training.rounds": 2, "training.local_epochs": 1, "method.density": 0.2,
    }  # fmt: skip
    first = run_one(settings, tmp_path / "cell")
    stamp = (tmp_path / "cell" / "summary.json").stat().st_mtime_ns
    assert run_one(settings, tmp_path / "cell") == first
    assert (tmp_path / "cell" / "summary.json").stat().st_mtime_ns == stamp
