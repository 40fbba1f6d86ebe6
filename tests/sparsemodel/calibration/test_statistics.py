"""Statistics that merge: those of a union, however it was divided."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemodel.calibration.statistics import Calibration, Moments, Sums
from sparsemodel.errors import CalibrationError

CUTS = st.lists(st.integers(0, 40), max_size=6)


def values(seed: int, *, mean: float = 1e4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(40, 5, generator=generator) * torch.tensor([0.0, 0.1, 1.0, 3.0, 30.0])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@given(st.integers(0, 1000), CUTS, st.randoms())
def test_moments_of_parts_are_those_of_the_union(seed: int, cuts: list[int], order: object) -> None:
    whole = values(seed)
    ends = [0, *sorted(cuts), 40]  # parts may be empty
    parts = [Moments.of(whole[a:b]) for a, b in pairwise(ends)]
    order.shuffle(parts)  # type: ignore[attr-defined]
    joint = parts[0]
    for part in parts[1:]:
        joint = joint.merge(part)
    exact = whole.double()
    assert joint.count == 40
    close(joint.mean, exact.mean(0))
    close(joint.variance, exact.var(0, unbiased=False))
    close(joint.absolute, exact.abs().sum(0))
    close(joint.norms, exact.norm(dim=0))
    assert (joint.deviations >= 0).all()


def test_the_variance_survives_a_large_mean_in_half_precision_too() -> None:
    whole = (100 + values(0, mean=0.0) / 30).half()
    found = Moments.of(whole)
    close(found.variance, whole.double().var(0, unbiased=False))


def test_nothing_is_the_neutral_element() -> None:
    some, nothing = Moments.of(values(1)), Moments.of(torch.zeros(0, 5))
    assert some.merge(nothing) is some
    assert nothing.merge(some) is some
    both = nothing.merge(nothing)
    assert both.count == 0
    assert both.variance.tolist() == [0.0] * 5


def test_sums_by_hand() -> None:
    one = Sums.of(2, a=torch.tensor([1.0, 2.0]))
    two = Sums.of(3, a=torch.tensor([4.0, 0.5]))
    assert one.merge(two).mean("a").tolist() == [1.0, 0.5]
    assert Sums.of(0, a=torch.zeros(2)).mean("a").tolist() == [0.0, 0.0]


def test_calibrations_merge_by_name_and_travel_as_arrays() -> None:
    whole = values(2)
    one = Calibration({("inputs", "a"): Moments.of(whole[:10])})
    two = Calibration(
        {("inputs", "a"): Moments.of(whole[10:]), ("gram", "b"): Sums.of(1, products=torch.eye(2))}
    )
    merged = Calibration.merged([Calibration(), one, two])
    again = Calibration.of_arrays(merged.arrays())
    assert list(again) == list(merged) == [("inputs", "a"), ("gram", "b")]
    close(again.moments("inputs", "a").variance, whole.double().var(0, unbiased=False))
    assert torch.equal(again.sums("gram", "b").totals["products"], torch.eye(2).double())


def test_what_does_not_fit_is_refused() -> None:
    five, two = Moments.of(values(0)), Moments.of(values(0)[:, :2])
    a = Calibration({("inputs", "x"): five})
    with pytest.raises(CalibrationError, match="inputs of x: statistics of 5 and of 2 features"):
        a.merge(Calibration({("inputs", "x"): two}))
    with pytest.raises(CalibrationError, match="moments and sums"):
        a.merge(Calibration({("inputs", "x"): Sums.of(1, a=torch.zeros(1))}))
    with pytest.raises(CalibrationError, match="cannot be merged"):
        Sums.of(1, a=torch.zeros(1)).merge(Sums.of(1, b=torch.zeros(1)))
    with pytest.raises(CalibrationError, match=r"no statistics of kind 'gram' of 'x'.*inputs"):
        a["gram", "x"]
    with pytest.raises(CalibrationError, match="no part of a calibration"):
        Calibration.of_arrays({"inputs/x": torch.zeros(1)})
    with pytest.raises(CalibrationError, match="without 'mean'"):
        Calibration.of_arrays({"moments/inputs/x/count": torch.ones(())})
