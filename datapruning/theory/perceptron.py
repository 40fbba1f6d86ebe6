"""The teacher-student perceptron with data pruned by margin: its learning curve and a trial of it.

Source: Sorscher et al., Beyond neural scaling laws (NeurIPS 2022), sections 2 and 3.

A teacher T labels Gaussian inputs x of N dimensions, y = sign(T·x). Of P = α N of them the
fraction f is kept that a probe J, at an angle θ to the teacher, finds hardest (|J·x| small) or
easiest (large), and a student of the largest margin κ is trained on the kept ones. In the limit
N → ∞ its overlap R with the teacher follows from the replica method; its error is arccos(R)/π.

Let z = y T·x and w = y e·x be an input's components along the teacher and along the part e of
the probe across it, signed by the label, with the density that pruning leaves of them. Where the
student's components along T, e and everything else are R, S and s = √(1 − R² − S²), its signed
field on an input is R z + S w + s t, with t a unit Gaussian. The replica-symmetric free energy,
for overlaps between two students going to one, is stationary and zero at

    f α E[(κ − R z − S w − s t)²₊] = s²,    the left side stationary in R and S,

which is the paper's pair of equations for (R, κ) where θ = 0 (then S = 0), and for (R, ρ, κ)
with the overlap ρ = R cos θ + S sin θ of student and probe where it is not. Taking the mean over
t, G(a) = E[(a − t)²₊] = (1 + a²) Φ(a) + a φ(a), and dividing by s, with b = κ/s, r = R/s, v = S/s,

    f α E[G(b − r z − v w)] = 1,    κ = b / √(1 + r² + v²) largest over r and v,

which is what is solved here: for each (r, v) the first equation has one root b. The largest
margin is a convex problem, so replica symmetry holds and the maximum is the only one.

Departs from it: written by components instead of conditional densities, which makes any angle
and either end of the margins one equation; θ = π/2 is a useless probe, not treated apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from prunelab.errors import PrunelabError, check_settings

Array = np.ndarray[Any, np.dtype[np.float64]]
Keep = Literal["hard", "easy", "random"]
_TAIL = 8.5  # a unit Gaussian holds 2e-17 beyond


@dataclass(frozen=True)
class LearningPoint:
    """The student of the largest margin in the limit of many dimensions.

    Attributes:
        overlap: R, cosine of its angle to the teacher.
        margin: κ, of a student of norm √N on inputs of norm √N.
        error: arccos(R)/π, the share of new inputs it gets wrong.
    """

    overlap: float
    margin: float
    error: float


def learning_point(
    alpha: float, *, fraction: float = 1.0, keep: Keep = "hard", angle: float = 0.0
) -> LearningPoint:
    """Solve the equations above at one point of the learning curve.

    Args:
        alpha: inputs per dimension before pruning.
        fraction: f in (0, 1], the share kept; f α inputs per dimension are trained on.
        keep: which end of the margins stays; "random": the same curve at f α, nothing pruned.
        angle: of the probe to the teacher, in radians, 0 to π/2.

    Raises:
        PrunelabError: values out of range.

    >>> point = learning_point(10.0)
    >>> round(point.error, 3)
    0.049
    """
    from scipy.optimize import minimize  # noqa: PLC0415

    _check(alpha, fraction, angle, keep)
    components, weights = _pruned(fraction, keep, angle)
    target = 1 / (fraction * alpha)

    # Variables in units of their own size, r and v as they are and not their logarithms: κ is
    # quasi-concave in them, and its gradient vanishes nowhere else.
    unit = 1 + fraction * alpha

    def negative_margin(x: Array) -> tuple[float, Array]:
        direction = unit * x
        b, gradient = _bias(direction @ components, components, weights, target)
        square = 1 + direction @ direction
        slope = gradient / math.sqrt(square) - b * direction / square**1.5
        return -b / math.sqrt(square), -unit * slope

    start = np.zeros(len(components))
    start[0] = 1.0
    found = minimize(
        negative_margin, start, jac=True, method="BFGS", options={"gtol": 1e-12, "maxiter": 1000}
    )
    r, *rest = (unit * found.x).tolist()
    across = math.hypot(1.0, *rest)
    # The angle by arctan: arccos would lose half the digits near R = 1.
    return LearningPoint(
        overlap=r / math.hypot(r, across),
        margin=float(-found.fun),
        error=math.atan2(across, r) / math.pi,
    )


def trial(
    alpha: float,
    *,
    dimension: int,
    seed: int,
    fraction: float = 1.0,
    keep: Keep = "hard",
    angle: float = 0.0,
) -> LearningPoint:
    """One student of the largest margin on one draw of pruned inputs, exact up to rounding.

    Keeps round(f α N) of round(α N) inputs. The margin problem, min |w| under y x·w ≥ 1, is
    solved as a least-distance problem by non-negative least squares (Lawson and Hanson, Solving
    Least Squares Problems, chapter 23); the teacher's labels make it solvable always.

    Args:
        dimension: N; what is measured differs from the limit by about 1/N.
        seed: decides the inputs.

    Raises:
        PrunelabError: values out of range, or no input kept.
    """
    _check(alpha, fraction, angle, keep)
    kept = round(fraction * alpha * dimension)
    if dimension < 2 or kept < 1:
        raise PrunelabError(
            f"{kept} of {alpha * dimension:g} inputs are kept in {dimension} dimensions; expected "
            "at least 1 in at least 2"
        )
    x = np.random.default_rng(seed).standard_normal((round(alpha * dimension), dimension))
    # Any rotation of the inputs is as good: the teacher is the first axis.
    probe = np.abs(x[:, 0] * math.cos(angle) + x[:, 1] * math.sin(angle))
    order = {"hard": np.argsort(probe), "easy": np.argsort(-probe)}.get(keep, np.arange(len(x)))
    chosen = x[order[:kept]]
    chosen *= np.sign(chosen[:, :1])
    student = _largest_margin(chosen)
    norm = float(np.linalg.norm(student))
    across = float(np.linalg.norm(student[1:]))
    return LearningPoint(
        overlap=float(student[0]) / norm,
        margin=float((chosen @ student).min()) / norm,
        error=math.atan2(across, float(student[0])) / math.pi,
    )


def _largest_margin(x: Array) -> Array:
    """The shortest w with x·w ≥ 1 for every row; rows are aligned to the first axis.

    Only rows of margin 1 decide w. So a few rows are solved for, those that the solution leaves
    below 1 are added, until it leaves none: then it is the solution for all.
    """
    from scipy.optimize import nnls  # noqa: PLC0415

    count, dimension = x.shape
    used = np.zeros(count, dtype=bool)
    used[np.argsort(x[:, 0])[: 2 * dimension]] = True
    while True:
        system = np.vstack([x[used].T, np.ones(int(used.sum()))])
        solution, _ = nnls(system, np.eye(dimension + 1)[-1], maxiter=30 * max(system.shape))
        residual = system @ solution
        residual[-1] -= 1
        student: Array = -residual[:-1] / residual[-1]
        margins = np.where(used, np.inf, x @ student)
        short = np.argsort(margins)[:dimension]
        short = short[margins[short] < 1 - 1e-10]
        if len(short) == 0:
            return student
        used[short] = True


def _check(alpha: float, fraction: float, angle: float, keep: str) -> None:
    checks = {
        f"alpha must be positive and finite, got {alpha}": 0 < alpha < math.inf,
        f"fraction must be in (0, 1], got {fraction}": 0 < fraction <= 1,
        f"angle must be in [0, π/2], got {angle}": 0 <= angle <= math.pi / 2,
        f"keep must be hard, easy or random, got {keep!r}": keep in ("hard", "easy", "random"),
    }
    check_settings("perceptron", checks, error=PrunelabError)


def _bias(fields: Array, components: Array, weights: Array, target: float) -> tuple[float, Array]:
    """The root b of E[G(b − field)] = target, and its slopes by r and v.

    G is convex and increasing, and by Jensen the first b lies right of the root: Newton's
    steps come down to it without passing.
    """
    from scipy.special import ndtr  # noqa: PLC0415

    b = float(weights @ fields) + math.sqrt(target)
    for _ in range(100):
        a = b - fields
        density, below = np.exp(-0.5 * a * a) / math.sqrt(2 * math.pi), ndtr(a)
        slope = 2 * (a * below + density)
        step = float(weights @ ((1 + a * a) * below + a * density) - target) / float(
            weights @ slope
        )
        b -= step
        if abs(step) <= 1e-14 * (1 + abs(b)):
            break
    weighted = weights * slope
    return b, components @ weighted / weighted.sum()


def _pruned(fraction: float, keep: Keep, angle: float) -> tuple[Array, Array]:
    """Nodes of (z) or (z, w), [1 or 2, M], and their weights, which sum to 1."""
    from scipy.special import ndtri  # noqa: PLC0415

    low, high = 0.0, _TAIL
    if keep == "hard" and fraction < 1:
        high = min(float(ndtri((1 + fraction) / 2)), _TAIL)
    if keep == "easy" and fraction < 1:
        low = float(-ndtri(fraction / 2))
        high = low + _TAIL
    if angle == 0 or keep == "random" or fraction == 1:
        z, weights = _graded(low, high, panels=36, nodes=16)
        weights = weights * np.exp(-0.5 * (z * z - low * low))
        return z[None], weights / weights.sum()
    # The probe's field p > 0 (the other sign is a mirror image) and u across it; the label
    # changes where the teacher's field does, at u = −p / tan θ: panels are graded from there.
    cosine, sine = math.cos(angle), math.sin(angle)
    parts = []
    for p, weight in zip(*_graded(low, high, panels=12, nodes=8), strict=True):
        turn = -p * cosine / sine if p * cosine < _TAIL * sine else -_TAIL
        for sign, end in ((1.0, _TAIL), (-1.0, -_TAIL)):
            away, piece = _graded(0.0, abs(end - turn), panels=14, nodes=8)
            u = turn + sign * away
            z, w = p * cosine + u * sine, p * sine - u * cosine
            mass = weight * piece * np.exp(-0.5 * (p * p - low * low + u * u))
            parts.append(np.stack([sign * z, sign * w, mass]))
    nodes = np.concatenate(parts, axis=1)
    return nodes[:2], nodes[2] / nodes[2].sum()


def _graded(low: float, high: float, *, panels: int, nodes: int) -> tuple[Array, Array]:
    """Gauss-Legendre points and weights on panels that halve towards `low`."""
    ends = low + (high - low) * np.concatenate([[0.0], 0.5 ** np.arange(panels - 1, -1, -1)])
    x, weights = np.polynomial.legendre.leggauss(nodes)
    middle, half = (ends[1:] + ends[:-1]) / 2, (ends[1:] - ends[:-1]) / 2
    return (middle[:, None] + half[:, None] * x).ravel(), (half[:, None] * weights).ravel()
