"""The oracle's simulation: networks cut exactly, figures and page by hand, one tiny seed."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from simulations.jobs import DID_DIVERGE, FINISHED, Outcome
from simulations.oracle_pruning import (
    PRESETS,
    Network,
    OracleJob,
    Preset,
    body,
    cut,
    main,
    said,
    sides,
    written,
)

TINY = Preset(filters=3, kept=(2,), most=3, epochs=1, retraining=(1,))


def test_a_cut_network_is_the_one_with_silenced_filters() -> None:
    torch.manual_seed(0)
    network = Network(6)
    x = torch.randn(4, 1, 8, 8)
    silenced = Network(6)
    silenced.load_state_dict(network.state_dict())
    with torch.no_grad():
        silenced.conv2.weight[:, [0, 2, 5]] = 0
    torch.testing.assert_close(cut(network, (1, 3, 4))(x), silenced(x))
    assert torch.equal(cut(network, range(6))(x), network(x))


def test_the_sides_are_apart_and_of_the_seed() -> None:
    (one, held), (again, _), (other, _) = (sides(0.25, seed=seed) for seed in (0, 0, 1))
    total = len(one) + len(held)
    assert len(held) == round(0.25 * total)
    assert torch.equal(one.images, again.images)
    assert not torch.equal(one.images, other.images)
    pictures = {each.numpy().tobytes() for each in one.images}
    # Two digits of the set are drawn alike now and then, never this often.
    assert sum(each.numpy().tobytes() in pictures for each in held.images) < 3


def cell(*after: list[float]) -> dict[str, Any]:
    return {
        "subsets": [[0, 1], [0, 2], [1, 2]],
        "before": [1.0, 2.0, 3.0],
        "after": {"5": [list(losses) for losses in after]},
    }


def test_what_is_said_by_hand() -> None:
    """Means .3, .2, .4 of before 1, 2, 3: two pairs in order, one not; two retrainings agree in
    one pair and differ in two; one of three subsets beats the oracle."""
    found = said(cell([0.1, 0.3, 0.6], [0.5, 0.1, 0.2]), "5")
    assert (found.tau, found.noise) == (pytest.approx(1 / 3), pytest.approx(-1 / 3))
    assert found.anomaly == pytest.approx(1 / 3)
    assert (found.oracle, found.best, found.median) == pytest.approx((0.3, 0.2, 0.3))


def outcome(*after: list[float]) -> Outcome:
    values = {"sizes": {"2": cell(*after)}, "dense": {"accuracy": 0.9}, "processor_seconds": 60}
    return Outcome(FINISHED, values=values, commit="abc")


def test_page_by_hand() -> None:
    """Taus 1, 1 and 1/3 mean .78, deviation .385, t of two degrees of freedom 4.303: ± .96."""
    preset = replace(TINY, retraining=(5,))
    right = outcome([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    other = outcome([0.2, 0.1, 0.3], [0.2, 0.1, 0.3])
    lines = "\n".join(body([right, right, other], preset)).splitlines()
    assert "| 2 of 3 | 5 | 0.78 ± 0.96 | 0 of 3 | 1.00 ± 0.00 | 11 ± 48 |" in lines
    assert any(line.startswith("| 2 of 3 | 5 | 0.133 ± 0.143 | 0.200 ± 0.000 |") for line in lines)
    lost = outcome([0.1, 0.2, math.inf], [0.1, 0.2, math.inf])
    assert any("| 0.100 | 0.200 | 0.100 | 0.100 |" in line for line in body([lost], preset))
    only = Outcome(DID_DIVERGE, reason="nothing", commit="abc")
    assert body([only], preset) == ["No seed has finished."]


def test_the_page_tells_of_seeds_that_did_not_finish() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "small", replace(TINY, retraining=(5,)))
        text = written(
            [outcome([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]), Outcome(DID_DIVERGE, commit="abd")],
            "small", [0, 7],
        )  # fmt: skip
    assert "`python -m simulations.oracle_pruning --preset small --seeds 0,7`" in text
    assert "commit abc, abd" in text
    assert "means over 1 of 2 seeds" in text
    assert "held-out accuracy of the dense networks: 90.0 %; a seed took 1.0 processor" in text
    assert "- `retraining = " in text


def test_one_seed_for_real_and_again() -> None:
    one, again = (OracleJob(TINY, 0).run(Path()) for _ in range(2))
    sizes = one.values["sizes"]
    assert one.status == FINISHED
    assert sizes == again.values["sizes"]
    assert sizes["2"]["subsets"] == list(combinations(range(3), 2))
    assert len(sizes["2"]["before"]) == 3
    assert list(sizes["2"]["after"]) == ["1"]
    repeats = sizes["2"]["after"]["1"]
    assert [len(losses) for losses in repeats] == [3, 3]
    assert repeats[0] != repeats[1]
    assert len(body([one], TINY)) > 5


def test_presets_are_whole_and_a_wrong_call_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for preset in PRESETS.values():
        assert preset.repeats >= 2
        assert all(1 <= size < preset.filters for size in preset.kept)
    for words in (["--preset", "none"], ["--seeds", "one"], ["--jobs", "-1"]):
        with pytest.raises(SystemExit):
            main(words)
    assert "invalid literal" in capsys.readouterr().err
