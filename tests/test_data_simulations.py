"""The simulations of data pruning: rankings and verdicts by hand, and small grids for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datapruning.scoring.methods import METHODS as KNOWN
from datapruning.students.comparison import (
    FULL,
    Cell,
    cells,
    compare_training,
    full_steps,
    result_table,
)
from prunelab.data.datasets import load_dataset
from prunelab.errors import RunError
from prunelab.training.loop import TrainingConfig
from simulations import kd_fractions, ten_metrics
from simulations.data_table import Preset


def test_presets_name_known_methods_and_ten_metrics() -> None:
    assert set(ten_metrics.METHODS) <= set(KNOWN)
    assert len(ten_metrics.TEN) == 10
    assert {method for method, _ in kd_fractions.CHOSEN} <= set(KNOWN)


def test_grid_has_all_data_once_a_seed() -> None:
    """Two methods × three fractions × two budgets and all data: 13 cells a seed."""
    grid = cells(["a", "b"], [0.1, 0.5, 0.9], [0, 1], ["epochs", "steps"])
    assert len(grid) == 26
    assert len({cell.name for cell in grid}) == 26
    assert [cell.seed for cell in grid] == [0] * 13 + [1] * 13


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "steps"), [(10, 4, 6), (9, 4, 4), (8, 4, 4), (1, 4, 2)]
)
def test_full_steps(num_samples: int, batch_size: int, steps: int) -> None:
    """Two epochs: ⌈10/4⌉ = 3 steps each; of 9, the last batch of one joins the one before it."""
    assert full_steps(num_samples, TrainingConfig(epochs=2, batch_size=batch_size)) == steps


def test_tables_and_ranking_by_hand() -> None:
    """a − random: .52 − .50, .50 − .50 → +1.00 points, 1 of 2 won; b: −2 and refused → −2.00."""
    results: dict[Cell, dict[str, Any]] = {Cell(FULL, 1.0, s, "epochs"): {"test_accuracy": 0.9} for s in (0, 1)}  # noqa: E501  # fmt: skip
    for method, values in {"a": (0.52, 0.5), "random": (0.5, 0.5), "b": (0.48, None)}.items():
        for seed, value in enumerate(values):
            result = {"refused": "constant"} if value is None else {"test_accuracy": value}
            results[Cell(method, 0.3, seed, "epochs")] = result
    header, rows = result_table(results, budget="epochs")
    assert header == ["method", "30 % kept"]
    assert rows == [
        ["a", "51.00 ± 1.41"],
        ["random", "50.00 ± 0.00"],
        ["b", "–"],
        [FULL, "90.00 ± 0.00"],
    ]
    ranked = ten_metrics.ranking(results, budget="epochs")
    assert ranked == [["a", "+1.00", "1 of 2"], ["b", "-2.00", "0 of 1"]]


def test_a_comparison_is_resumable_and_refuses_other_settings(tmp_path: Path) -> None:
    data = load_dataset("digits", num_train=120, num_test=60)
    arguments: dict[str, Any] = {
        "keeps": [0.5],
        "seeds": [0],
        "out": tmp_path,
        "training": TrainingConfig(epochs=1, batch_size=40),
        "scoring": {"training": TrainingConfig(epochs=1, batch_size=40)},
        "progress": lambda line: None,
    }
    first = compare_training(data, ["el2n", "random"], **arguments)
    assert len(first) == 5
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    assert compare_training(data, ["el2n", "random"], **arguments) == first
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    arguments["training"] = TrainingConfig(epochs=2, batch_size=40)
    with pytest.raises(RunError, match="of other settings"):
        compare_training(data, ["el2n", "random"], **arguments)


def kd_results(changes: dict[str, float]) -> tuple[dict[int, Any], Preset]:
    """One seed in which all four claims hold; then some accuracies are changed."""
    preset = Preset(
        "x", "resnet8", 1, 1, None, None,
        {"kept": (0.1, 0.5), "teachers": ("small", "large"), "temperature": 4.0},
    )  # fmt: skip
    found: dict[str, Any] = {"full": {"test_accuracy": 0.9}}
    for keep, best in ((0.1, 4), (0.5, 2)):
        curve = [{"accuracy": 0.8 + 0.01 * (place == best)} for place in range(5)]
        for budget in ("epochs", "steps"):
            for method, policy in (("random", "random"), *kd_fractions.CHOSEN):
                found[f"{method}-{policy}-k{keep:g}-{budget}"] = {"test_accuracy": 0.7}
            found[f"kd-small-k{keep:g}-{budget}"] = {"test_accuracy": 0.92}
            found[f"kd-large-k{keep:g}-{budget}"] = {"test_accuracy": 0.85}
        for teacher in ("small", "large"):
            found[f"kd-{teacher}-k{keep:g}-alpha"] = {"alpha": 0.5, "curve": curve}
    for name, value in changes.items():
        found[name] = {"test_accuracy": value}
    return {0: found}, preset


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, set()),
        ({"el2n-ccs-k0.5-steps": 0.93}, {"1, equal steps"}),
        ({"full": 0.95}, {"2, equal epochs", "2, equal steps"}),
        ({"kd-large-k0.1-epochs": 0.93}, {"4, equal epochs"}),
    ],
)
def test_verdicts_by_hand(changes: dict[str, float], broken: set[str]) -> None:
    rows = kd_fractions.claims(*kd_results(changes))
    assert {name for name, _, verdict in rows if verdict != "holds"} == broken


def test_alpha_has_to_rise() -> None:
    results, preset = kd_results({})
    low, high = (results[0][f"kd-small-k{k}-alpha"] for k in ("0.1", "0.5"))
    low["curve"], high["curve"] = high["curve"], low["curve"]
    (row,) = [row for row in kd_fractions.claims(results, preset) if row[0] == "3"]
    assert row[2] == "does not hold"


def test_a_small_laboratory_for_real(tmp_path: Path) -> None:
    preset = Preset(
        "digits", "resnet8", 1, 40, 120, 60,
        {"kept": (0.5,), "teachers": ("resnet8", "resnet20"), "temperature": 4.0},
    )  # fmt: skip
    data = load_dataset("digits", num_train=120, num_test=60)
    lab = kd_fractions.Laboratory(preset, data, 0, tmp_path)
    results = {0: kd_fractions.run_seed(lab)}
    page = "\n".join(kd_fractions.page_body(results, preset))
    assert "| random + KD, resnet20 teacher |" in page
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    assert kd_fractions.run_seed(lab) == results[0]
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
