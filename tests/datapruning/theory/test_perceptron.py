"""The perceptron's theory against its trial, known limits, and an integral done otherwise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.integrate import dblquad, quad
from scipy.optimize import brentq
from scipy.stats import norm

from datapruning.theory.perceptron import LearningPoint, learning_point, trial
from prunelab.errors import PrunelabError

TRIALS = 12
DIMENSION = 150


def tried(alpha: float, **options: Any) -> tuple[float, float]:
    """Mean and standard error of trials."""
    errors = [
        trial(alpha, dimension=DIMENSION, seed=seed, **options).error for seed in range(TRIALS)
    ]
    return float(np.mean(errors)), float(np.std(errors, ddof=1)) / math.sqrt(TRIALS)


@pytest.mark.parametrize(
    ("alpha", "options"),
    [
        (0.5, {}),
        (4, {}),
        (2, {"fraction": 0.5}),
        (2, {"fraction": 0.5, "keep": "easy"}),
        (10, {"fraction": 0.3}),
        (10, {"fraction": 0.3, "keep": "easy"}),
        (6, {"fraction": 0.5, "keep": "random"}),
        (4, {"fraction": 0.4, "angle": 0.5}),
        (4, {"fraction": 0.4, "angle": 0.5, "keep": "easy"}),
        (12, {"fraction": 0.2, "angle": 0.2}),
        (6, {"fraction": 0.3, "angle": math.pi / 2}),
    ],
)
def test_theory_and_trial_agree(alpha: float, options: dict[str, Any]) -> None:
    """Within four standard errors and 1/N of the value, what finite dimensions cost."""
    mean, error = tried(alpha, **options)
    theory = learning_point(alpha, **options).error
    assert abs(mean - theory) < 4 * error + theory / DIMENSION
    # The trials are sharp enough to tell this from a point a third further off.
    assert 4 * error + theory / DIMENSION < theory / 3


def test_hard_wins_where_data_are_plentiful_and_easy_where_they_are_few() -> None:
    """In theory and in trials, at three tenths kept of 1.5 and of 20 inputs a dimension."""
    for alpha, better, worse in ((1.5, "easy", "hard"), (20.0, "hard", "easy")):
        options = {"fraction": 0.3}
        error = {
            k: learning_point(alpha, keep=k, **options).error for k in ("hard", "easy", "random")
        }  # type: ignore[arg-type]
        assert error[better] < min(error["random"], error[worse])
        (good, spread), (bad, other) = (tried(alpha, keep=k, **options) for k in (better, worse))
        assert bad - good > 3 * math.hypot(spread, other)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7])
def test_the_number_kept_decides_and_hardly_the_fraction(fraction: float) -> None:
    """What "auto" rests on: hard loses to random at 1 kept a dimension, wins at 2."""
    for kept, hard_wins in ((1.0, False), (2.0, True)):
        hard = learning_point(kept / fraction, fraction=fraction).error
        assert (hard < learning_point(kept).error) == hard_wins


def test_a_student_of_all_data_has_the_known_curve() -> None:
    """Opper, Kinzel, Kleinz, Nehl (1990): the perceptron of optimal stability, ε → 0.5005 / α."""
    for alpha in (200.0, 1000.0):
        assert learning_point(alpha).error * alpha == pytest.approx(0.5005, abs=5e-4)


def test_few_samples_lie_near_orthogonal_axes() -> None:
    """α → 0: the student is the mean of its inputs, R = √(α f) E[z], κ = 1/√(α f), 10 % above.

    For all data E[z] = √(2/π); for the easiest tenth E[z | z > 1.645] = 2 φ(1.645) / 0.1 = 2.063.
    """
    alpha = 1e-4
    assert learning_point(alpha).overlap == pytest.approx(math.sqrt(alpha * 2 / math.pi), rel=0.01)
    easy = learning_point(alpha, fraction=0.1, keep="easy")
    assert easy.overlap == pytest.approx(math.sqrt(0.1 * alpha) * 2.063, rel=0.01)
    assert easy.margin == pytest.approx(1 / math.sqrt(0.1 * alpha), rel=0.01)


def test_the_solution_satisfies_the_papers_pair_of_equations() -> None:
    """By adaptive quadrature in (z, t), without the closed mean over t: α = 5, hardest 40 %.

    f α E[(κ − R z − s t)²₊] = s², and its stationarity in R: R = f α E[(κ − h)₊ (z − R t / s)].
    """
    alpha, fraction = 5.0, 0.4
    point = learning_point(alpha, fraction=fraction)
    gamma = float(norm.ppf((1 + fraction) / 2))
    r, s, kappa = point.overlap, math.sqrt(1 - point.overlap**2), point.margin

    def mean(of: Any) -> float:
        def density(t: float, z: float) -> float:
            gap = kappa - r * z - s * t
            return of(gap, z, t) * 2 / fraction * float(norm.pdf(z)) * float(norm.pdf(t))

        value, _ = dblquad(
            density, 0, gamma, lambda _: -8.0, lambda z: min(8.0, (kappa - r * z) / s)
        )
        return float(value)

    squares = mean(lambda gap, z, t: gap**2)
    slope = mean(lambda gap, z, t: gap * (z - r * t / s))
    assert fraction * alpha * squares == pytest.approx(s * s, rel=1e-6)
    assert fraction * alpha * slope == pytest.approx(r, rel=1e-6)


def test_the_conditional_form_of_the_paper_gives_the_same() -> None:
    """Their second equation, with the probability of a kept label given the student's field:

    1 − R² = α ∫_{−∞}^κ Dt (2/f) [H(−R t/s) − H((γ − R t)/s)] (κ − t)², α the kept inputs.
    """
    alpha, fraction = 3.0, 0.6
    point = learning_point(alpha / fraction, fraction=fraction)
    gamma = float(norm.ppf((1 + fraction) / 2))
    r, s, kappa = point.overlap, math.sqrt(1 - point.overlap**2), point.margin

    def density(t: float) -> float:
        kept = norm.sf(-r * t / s) - norm.sf((gamma - r * t) / s)
        return float(norm.pdf(t) * kept * (kappa - t) ** 2)

    value, _ = quad(density, -9, kappa)
    assert 2 * alpha / fraction * value == pytest.approx(1 - r * r, rel=1e-6)


@settings(max_examples=8, deadline=None)
@given(
    st.floats(0.05, 100),
    st.floats(0.05, 1),
    st.sampled_from(["hard", "easy"]),
    st.floats(0, math.pi / 2),
)
@example(1.0, 1 - 2**-53, "hard", 0.0)  # (1 + f) / 2 rounds to 1: no finite quantile
def test_points_are_sound_and_continuous_in_the_angle(
    alpha: float, fraction: float, keep: Any, angle: float
) -> None:
    point = learning_point(alpha, fraction=fraction, keep=keep, angle=angle)
    assert 0 < point.error < 0.5
    assert point.margin > 0
    assert math.cos(math.pi * point.error) == pytest.approx(point.overlap, abs=1e-9)
    # The one-dimensional path (angle 0) is the limit of the two-dimensional one.
    exact = learning_point(alpha, fraction=fraction, keep=keep)
    near = learning_point(alpha, fraction=fraction, keep=keep, angle=1e-6)
    assert near.error == pytest.approx(exact.error, rel=1e-3)


@pytest.mark.parametrize("keep", ["hard", "easy"])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 3.0, 100.0])
def test_no_other_overlap_gives_a_larger_margin(keep: Any, alpha: float) -> None:
    """κ(R) by a root in κ on a plain midpoint rule over z, for overlaps from 0.02 to 0.98.

    A search in log r once slid off at f α = 0.9 and returned an overlap of 0.
    """
    fraction = 0.3
    point = learning_point(alpha, fraction=fraction, keep=keep)
    cut = float(norm.ppf((1 + fraction) / 2) if keep == "hard" else norm.ppf(1 - fraction / 2))
    low, high = (0.0, cut) if keep == "hard" else (cut, 7.0)
    z = low + (high - low) * (np.arange(4000) + 0.5) / 4000
    weights = norm.pdf(z) / norm.pdf(z).sum()

    def margin(overlap: float) -> float:
        s = math.sqrt(1 - overlap**2)

        def excess(kappa: float) -> float:
            a = (kappa - overlap * z) / s
            mean = weights @ ((1 + a * a) * norm.cdf(a) + a * norm.pdf(a))
            return fraction * alpha * float(mean) - 1

        return float(brentq(excess, -50, 50 + 10 / math.sqrt(fraction * alpha), xtol=1e-12))

    others = [margin(overlap) for overlap in np.linspace(0.02, 0.98, 25)]
    assert max(others) <= point.margin + 1e-5
    assert margin(point.overlap) == pytest.approx(point.margin, abs=1e-5)


def test_a_useless_probe_is_no_better_than_the_same_number_of_random_inputs_plus_noise() -> None:
    """f = 1 keeps all whatever the probe; more data never hurt."""
    assert learning_point(3, angle=1.0) == learning_point(3)
    assert learning_point(6, fraction=0.5, keep="random").error == pytest.approx(
        learning_point(3).error, rel=1e-9
    )
    errors = [learning_point(a, fraction=0.3, angle=0.3).error for a in (1, 3, 10, 30, 100)]
    assert errors == sorted(errors, reverse=True)


def test_the_trials_student_is_that_of_the_largest_margin() -> None:
    """Against coordinate ascent on the dual, on the same inputs drawn again."""
    n, alpha = 20, 3.0
    x = np.random.default_rng(5).standard_normal((round(alpha * n), n))
    x *= np.sign(x[:, :1])
    found, student = trial(alpha, dimension=n, seed=5), _student(x)
    length = float(np.linalg.norm(student))
    assert found.margin == pytest.approx(1 / length, rel=1e-8)
    assert found.overlap == pytest.approx(student[0] / length, rel=1e-8)
    assert (x @ student).min() == pytest.approx(1, abs=1e-8)


def _student(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The smallest w with x·w ≥ 1 by coordinate ascent on the dual, apart from the code's NNLS."""
    gram = x @ x.T
    weights = np.zeros(len(x))
    for _ in range(20_000):
        for i in range(len(x)):
            weights[i] = max(0.0, weights[i] + (1 - gram[i] @ weights) / gram[i, i])
        if np.abs((1 - gram @ weights)[weights > 0]).max() < 1e-12:
            break
    return x.T @ weights


def test_trials_follow_the_seed() -> None:
    first = trial(2, dimension=30, seed=1, fraction=0.5)
    assert isinstance(first, LearningPoint)
    assert first == trial(2, dimension=30, seed=1, fraction=0.5)
    assert first != trial(2, dimension=30, seed=2, fraction=0.5)
    assert trial(1000, dimension=2, seed=0).error < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha must be positive"),
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\]"),
        ({"angle": 2.0}, "angle must be in"),
        ({"keep": "middle"}, "keep must be hard, easy or random, got 'middle'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrunelabError, match=message):
        learning_point(**{"alpha": 1.0, **options})
    with pytest.raises(PrunelabError, match=message):
        trial(**{"alpha": 1.0, "dimension": 10, "seed": 0, **options})
    with pytest.raises(PrunelabError, match="expected at least 1"):
        trial(0.01, dimension=10, seed=0)
