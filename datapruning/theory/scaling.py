"""How error falls with the number of samples: power law or exponential, fitted and compared.

Source of the question: Sorscher et al., Beyond neural scaling laws (NeurIPS 2022): error falls
as a power of the number of random samples, and may fall faster where the samples kept of a
larger set are chosen well and their fraction with the size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from prunelab.errors import DataError

Array = np.ndarray[Any, np.dtype[np.float64]]
Law = Literal["power", "exponential"]
LAWS: tuple[Law, ...] = ("power", "exponential")
_OFFSET_STARTS = (0.0, 0.5, 0.9, 0.99)  # of the smallest error


@dataclass(frozen=True)
class Fit:
    """A law with its constants: a n^(−b) + c, or a exp(−b n) + c.

    Attributes:
        amplitude, rate, offset: a, b and c; c is 0 where none was fitted.
        has_offset: whether it was.
        residual: mean squared difference of log errors.
        num_points: points that were fitted, over all seeds.
    """

    law: Law
    amplitude: float
    rate: float
    offset: float
    has_offset: bool
    residual: float
    num_points: int

    @property
    def aicc(self) -> float:
        """Akaike's criterion for small samples, of Gaussian log errors; lower is better.

        n log(residual) + 2 k + 2 k (k + 1) / (n − k − 1), the variance counted among the k.
        Infinite where there are too few points.
        """
        n, k = self.num_points, 3 + int(self.has_offset)
        if n - k - 1 <= 0:
            return math.inf
        # Points made by the law itself fit to the last digit: that digit says nothing.
        return n * math.log(max(self.residual, 1e-24)) + 2 * k + 2 * k * (k + 1) / (n - k - 1)

    def predict(self, sizes: Any) -> Array:
        """Errors at these numbers of samples."""
        n = np.asarray(sizes, dtype=np.float64)
        falling: Array = n**-self.rate if self.law == "power" else np.exp(-self.rate * n)
        return self.amplitude * falling + self.offset


class Comparison(NamedTuple):
    """Both laws on the same points.

    Attributes:
        power, exponential: the fits.
        aicc_difference: of the exponential minus that of the power law: below 0 speaks for the
            exponential; within 2 of it for neither.
        held_out: law -> log(predicted / measured) at the largest size, by the fit to the others.
    """

    power: Fit
    exponential: Fit
    aicc_difference: float
    held_out: dict[Law, float]

    @property
    def better(self) -> Law | None:
        """The law that both AICc (by 2 or more) and the held-out size prefer; None: undecided."""
        by_aicc: Law = "exponential" if self.aicc_difference < 0 else "power"
        by_size: Law = min(LAWS, key=lambda law: abs(self.held_out[law]))
        decided = abs(self.aicc_difference) >= 2 and by_aicc == by_size
        return by_aicc if decided else None


def fit(sizes: Any, errors: Any, *, law: Law, offset: bool = False) -> Fit:
    """Least squares of log errors, so that every size counts by its relative error.

    Args:
        sizes: numbers of samples, [K], positive, at least three (with an offset four) different.
        errors: [K], or [seeds, K]; shares of wrong answers or losses, positive.
        law: "power" or "exponential".
        offset: fit c ≥ 0 too, an error that no number of samples removes.

    Raises:
        DataError: shapes or values that cannot be fitted.

    >>> found = fit([100, 200, 400], [0.4, 0.2, 0.1], law="power")
    >>> round(found.rate, 6), round(found.amplitude, 6)
    (1.0, 40.0)
    """
    n, e = _points(sizes, errors, least=4 if offset else 3)
    if law not in LAWS:
        raise DataError(f"unknown law {law!r}; known: {', '.join(LAWS)}")
    # Sizes in units of the largest: both laws then have constants of moderate size.
    largest = float(n.max())
    unit = n / largest
    x = np.log(unit) if law == "power" else unit
    log_a, b, c = _with_offset(x, e) if offset else (*_line(x, np.log(e)), 0.0)
    residual = float(np.mean((np.log(np.exp(log_a - b * x) + c) - np.log(e)) ** 2))
    scale = largest**b if law == "power" else 1.0
    return Fit(
        law=law,
        amplitude=math.exp(log_a) * scale,
        rate=b if law == "power" else b / largest,
        offset=c,
        has_offset=offset,
        residual=residual,
        num_points=e.size,
    )


def compare(sizes: Any, errors: Any, *, offset: bool = False) -> Comparison:
    """Fit both laws, to all sizes and to all but the largest.

    Raises:
        DataError: as `fit`; one size more is needed.
    """
    n, e = _points(sizes, errors, least=5 if offset else 4)
    power, exponential = (fit(n, e, law=law, offset=offset) for law in LAWS)
    rest, last = n < n.max(), n == n.max()
    measured = float(np.log(e[:, last]).mean())
    held_out = {
        law: float(np.log(fit(n[rest], e[:, rest], law=law, offset=offset).predict(n.max())))
        - measured
        for law in LAWS
    }
    return Comparison(power, exponential, exponential.aicc - power.aicc, held_out)


def band(
    sizes: Any,
    errors: Any,
    *,
    law: Law,
    at: Any,
    offset: bool = False,
    level: float = 0.9,
    num_resamples: int = 500,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Where the fitted curve lies, by bootstrap over seeds: (low, high), each of the shape of `at`.

    Whole seeds are drawn with replacement and fitted anew; the band holds the share `level` of
    the fits at each size. With few seeds it is too narrow: n seeds give at most n^n draws, and
    the spread that they show is √((n − 1) / n) of the true one.

    Args:
        errors: [seeds, K], two seeds or more.

    Raises:
        DataError: as `fit`; a single seed; a level outside (0, 1).
    """
    n, e = _points(sizes, errors, least=4 if offset else 3)
    if len(e) < 2:
        raise DataError("a band over seeds needs errors of two seeds or more, [seeds, K]")
    if not 0 < level < 1 or num_resamples < 1:
        raise DataError(f"level = {level} must be in (0, 1), num_resamples = {num_resamples} ≥ 1")
    random = np.random.default_rng(seed)
    curves = np.stack(
        [
            fit(n, e[random.integers(len(e), size=len(e))], law=law, offset=offset).predict(at)
            for _ in range(num_resamples)
        ]
    )
    low, high = np.quantile(curves, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def plot(
    curves: Mapping[str, tuple[Any, Any]],
    path: Path,
    *,
    title: str = "",
    offset: bool = False,
    seed: int = 0,
) -> None:
    """Draw error against samples on logarithmic axes: points, both fits, 90 % bands.

    The power law is drawn solid with its band, the exponential dashed.

    Args:
        curves: label -> (sizes [K], errors [K] or [seeds, K]).
        path: .png, .svg or .pdf.

    Raises:
        DataError: as `fit`.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, (sizes, errors)) in enumerate(curves.items()):
        n, e = _points(sizes, errors, least=4 if offset else 3)
        colour = f"C{number % 10}"
        spread = e.std(axis=0, ddof=1) if len(e) > 1 else None
        axes.errorbar(n, e.mean(axis=0), yerr=spread, fmt="o", color=colour, label=label)
        at = np.geomspace(n.min(), n.max(), 100)
        for law, style in zip(LAWS, ("-", "--"), strict=True):
            fitted = fit(n, e, law=law, offset=offset).predict(at)
            axes.plot(at, fitted, style, color=colour, lw=1)
        if len(e) > 1:
            low, high = band(n, e, law="power", at=at, offset=offset, num_resamples=200, seed=seed)
            axes.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="samples", ylabel="error", title=title)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _points(sizes: Any, errors: Any, *, least: int) -> tuple[Array, Array]:
    """Sizes [K] and errors [seeds, K], checked."""
    n = np.asarray(sizes, dtype=np.float64)
    e = np.atleast_2d(np.asarray(errors, dtype=np.float64))
    if n.ndim != 1 or e.ndim != 2 or e.shape[1:] != n.shape or e.size == 0:
        raise DataError(
            f"sizes are {n.shape}, errors {np.shape(errors)}; expected [K], and [K] or [seeds, K]"
        )
    if not (np.isfinite(n) & (n > 0)).all() or len(np.unique(n)) < least:
        raise DataError(f"a fit needs {least} different positive sizes, got {n.tolist()}")
    if not (np.isfinite(e) & (e > 0)).all():
        raise DataError(
            "errors must be positive and finite: a logarithm is taken; an error of 0 means that "
            "the test side is too small to tell"
        )
    return n, e


def _line(x: Array, log_e: Array) -> tuple[float, float]:
    """(log a, b) of log e = log a − b x by least squares; log_e is [seeds, K]."""
    slope, intercept = np.polyfit(x, log_e.mean(axis=0), 1)
    return float(intercept), float(-slope)


def _with_offset(x: Array, e: Array) -> tuple[float, float, float]:
    """(log a, b, c) of log(a exp(−b x) + c) by least squares, the best of several starts."""
    from scipy.optimize import least_squares  # noqa: PLC0415

    smallest = float(e.mean(axis=0).min())
    target = np.log(e)

    def residuals(p: Array) -> Array:
        return np.asarray(np.logaddexp(p[0] - p[1] * x, np.log(p[2] * smallest)) - target).ravel()

    best: Any = None
    for share in _OFFSET_STARTS:
        log_a, b = _line(x, np.log(np.maximum(e - share * smallest, 1e-3 * e)))
        start = [log_a, max(b, 1e-6), min(max(share, 1e-9), 1.0)]
        bounds = ([-np.inf, 0.0, 1e-12], [np.inf, np.inf, 1.5])
        found = least_squares(residuals, start, bounds=bounds, xtol=1e-12, ftol=1e-12, gtol=1e-12)
        if best is None or found.cost < best.cost:
            best = found
    return float(best.x[0]), float(best.x[1]), float(best.x[2]) * smallest
