"""Fits of scaling laws: exact constants recovered, laws told apart, bands that cover."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapruning.theory.scaling import LAWS, Law, band, compare, fit, plot
from prunelab.errors import DataError

SIZES = np.array([100, 200, 400, 800, 1600, 3200])


def curve(law: Law, *, offset: float = 0.0) -> np.ndarray[Any, Any]:
    falling = 3 * SIZES**-0.5 if law == "power" else 0.4 * np.exp(-SIZES / 1000)
    return np.asarray(falling + offset)


def noisy(errors: np.ndarray[Any, Any], *, seeds: int, seed: int = 0) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng(seed).standard_normal((seeds, len(errors)))
    return np.asarray(errors * np.exp(0.05 * noise))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("offset", [0.0, 0.01])
def test_exact_points_give_their_constants_back(law: Law, offset: float) -> None:
    found = fit(SIZES, curve(law, offset=offset), law=law, offset=offset > 0)
    constants = (3.0, 0.5) if law == "power" else (0.4, 1e-3)
    assert (found.amplitude, found.rate) == pytest.approx(constants, rel=1e-4)
    assert found.offset == pytest.approx(offset, rel=1e-4, abs=1e-12)
    assert found.predict(SIZES) == pytest.approx(curve(law, offset=offset), rel=1e-5)
    assert found.num_points == 6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.sampled_from(LAWS), st.floats(0.1, 50))
def test_without_offset_it_is_linear_regression_of_logs(seed: int, law: Law, unit: float) -> None:
    """By the normal equations over all seeds' points, in any unit of size."""
    e = noisy(curve("power"), seeds=3, seed=seed)
    n = SIZES * unit
    x = np.tile(np.log(n) if law == "power" else n, 3)
    y = np.log(e).ravel()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    found = fit(n, e, law=law)
    assert found.rate == pytest.approx(-slope, rel=1e-8)
    assert math.log(found.amplitude) == pytest.approx(y.mean() - slope * x.mean(), rel=1e-8)
    rest = y - y.mean() - slope * (x - x.mean())
    assert found.residual == pytest.approx((rest**2).mean(), rel=1e-8)


def test_an_offset_never_fits_worse_and_stays_at_zero_or_above() -> None:
    for seed in range(5):
        for law in LAWS:
            e = noisy(curve("power"), seeds=2, seed=seed)
            plain, more = fit(SIZES, e, law=law), fit(SIZES, e, law=law, offset=True)
            assert more.residual <= plain.residual + 1e-9
            assert more.offset >= 0


@pytest.mark.parametrize("law", LAWS)
def test_with_offset_no_constants_nearby_fit_the_logs_better(law: Law) -> None:
    e = np.exp(0.3 * np.log(noisy(curve(law, offset=0.01), seeds=3)))  # noise that is not small
    e *= np.exp(0.4 * np.random.default_rng(1).standard_normal(e.shape))
    found = fit(SIZES, e, law=law, offset=True)
    for moved in (0.99, 1.01):
        for name in ("amplitude", "rate", "offset"):
            other = replace(found, **{name: getattr(found, name) * moved})
            residual = float(np.mean((np.log(other.predict(SIZES)) - np.log(e)) ** 2))
            assert residual >= found.residual * (1 - 1e-9)


def test_aicc_by_hand() -> None:
    """Residual 1 in the mean, 6 points, k = 3: 6 log 1 + 6 + 24/2 = 18; with an offset 48 more."""
    errors = np.exp(np.array([1.0, -1, -1, 1, 1, -1]) + 0.0)
    found = fit(SIZES, errors, law="power")
    expected = 6 * math.log(found.residual) + 6 + 2 * 3 * 4 / 2
    assert found.aicc == pytest.approx(expected)
    offset = fit(SIZES, errors, law="power", offset=True)
    assert offset.aicc == pytest.approx(6 * math.log(offset.residual) + 8 + 2 * 4 * 5 / 1)
    assert fit(SIZES[:3], errors[:3], law="power").aicc == math.inf


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("offset", [False, True])
def test_the_law_behind_the_points_is_found(law: Law, offset: bool) -> None:
    errors = noisy(curve(law, offset=0.005 if offset else 0.0), seeds=4)
    found = compare(SIZES, errors, offset=offset)
    assert found.better == law
    assert (found.aicc_difference < 0) == (law == "exponential")
    assert abs(found.held_out[law]) < 0.25
    other: Law = "power" if law == "exponential" else "exponential"
    assert abs(found.held_out[law]) < abs(found.held_out[other])


def test_undecided_points_are_left_undecided() -> None:
    """Between 100 and 130 samples a power law and an exponential are one line."""
    n = np.array([100, 110, 120, 130])
    assert compare(n, noisy(3 * n**-0.5, seeds=3)).better is None


def test_held_out_looks_at_no_error_of_the_largest_size() -> None:
    errors = noisy(curve("power"), seeds=2)
    moved = errors.copy()
    moved[:, -1] *= math.e
    before, after = compare(SIZES, errors).held_out, compare(SIZES, moved).held_out
    assert all(after[law] == pytest.approx(before[law] - 1) for law in LAWS)


def test_a_band_covers_the_true_curve_about_as_often_as_it_says() -> None:
    """Twelve seeds a band, 100 bands at 80 %, two sizes: 60 to 97 of each hold the truth."""
    held = np.zeros(2)
    at = np.array([400, 6400])
    for trial in range(100):
        errors = noisy(curve("power"), seeds=12, seed=trial)
        low, high = band(SIZES, errors, law="power", at=at, level=0.8, num_resamples=60, seed=trial)
        truth = 3 * at**-0.5
        held += (low <= truth) & (truth <= high)
    assert (held >= 60).all()
    assert (held <= 97).all()


def test_a_band_follows_its_seed_and_widens_with_its_level() -> None:
    errors = noisy(curve("power"), seeds=5)
    options: dict[str, Any] = {"law": "power", "at": [800], "num_resamples": 100}
    low, high = band(SIZES, errors, **options)
    again, _ = band(SIZES, errors, **options)
    other, _ = band(SIZES, errors, **options, seed=1)
    narrow, wide = band(SIZES, errors, **options, level=0.5)
    assert low == again != other
    assert low < narrow < wide < high


def test_a_plot_is_written(tmp_path: Path) -> None:
    curves = {"all": (SIZES, noisy(curve("power"), seeds=3)), "one": (SIZES, curve("exponential"))}
    plot(curves, tmp_path / "new" / "curves.svg", title="made")
    text = (tmp_path / "new" / "curves.svg").read_text()
    assert text.count("<path") > 10
    plot({"one": curves["one"]}, tmp_path / "curves.png", offset=True)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("sizes", "errors", "message"),
    [
        ([1, 2, 3], [0.1, 0.0, 0.2], "the test side is too small"),
        ([1, 2, 3], [0.1, math.nan, 0.2], "positive and finite"),
        ([1, 2, 2], [0.1, 0.2, 0.2], "3 different positive sizes"),
        ([0, 1, 2], [0.1, 0.2, 0.2], "3 different positive sizes"),
        ([1, 2, 3], [0.1, 0.2], r"sizes are \(3,\), errors \(2,\)"),
    ],
)
def test_points_that_cannot_be_fitted(sizes: list[int], errors: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit(sizes, errors, law="power")


def test_other_refusals() -> None:
    with pytest.raises(DataError, match="unknown law 'linear'; known: power, exponential"):
        fit(SIZES, curve("power"), law="linear")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="two seeds or more"):
        band(SIZES, curve("power"), law="power", at=[100])
    with pytest.raises(DataError, match="5 different"):
        compare(SIZES[:4], curve("power")[:4], offset=True)
    with pytest.raises(DataError, match="level = 1"):
        band(SIZES, noisy(curve("power"), seeds=2), law="power", at=[100], level=1.0)
