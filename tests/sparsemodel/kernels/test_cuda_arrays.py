"""Optimiser steps and sums of updates: the kernels of arrays.cu, run on the host."""

import math
from fractions import Fraction
from functools import partial

import pytest
import torch

from sparsemodel.kernels import fixed_point
from sparsemodel.kernels.cuda import arrays as cuda_arrays
from sparsemodel.kernels.cuda.launch import Runner


@pytest.mark.parametrize("n", [1, 300])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1)])
def test_sgd_steps_are_torchs(cuda: Runner, n: int, momentum: float, decay: float) -> None:
    expected = torch.randn(n).double().requires_grad_()
    values = expected.detach().float()
    optimizer = torch.optim.SGD([expected], lr=0.1, momentum=momentum, weight_decay=decay)
    buffer = torch.zeros(n) if momentum else None
    for _ in range(3):
        gradient = torch.randn(n)
        expected.grad = gradient.double()
        optimizer.step()
        cuda_arrays.sgd_step(
            cuda, values, gradient, buffer, lr=0.1, momentum=momentum, weight_decay=decay
        )
    torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [1, 300])
@pytest.mark.parametrize(("decay", "decoupled"), [(0.0, False), (0.1, False), (0.1, True)])
def test_adam_steps_are_torchs(cuda: Runner, n: int, decay: float, decoupled: bool) -> None:
    expected = torch.randn(n).double().requires_grad_()
    values, mean, square = expected.detach().float(), torch.zeros(n), torch.zeros(n)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([expected], lr=0.01, weight_decay=decay)
    for step in range(1, 4):
        gradient = torch.randn(n)
        expected.grad = gradient.double()
        optimizer.step()
        cuda_arrays.adam_step(
            cuda, values, gradient, mean, square, lr=0.01, betas=(0.9, 0.999), eps=1e-8,
            weight_decay=decay, decoupled=decoupled, step=step,
        )  # fmt: skip
    state = optimizer.state[expected]
    torch.testing.assert_close(values.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(mean.double(), state["exp_avg"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(square.double(), state["exp_avg_sq"], rtol=1e-6, atol=1e-9)


def sums(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums that hold something, so that a kernel that overwrites shows."""
    return torch.arange(n), torch.arange(n) + 5


def fixed_parts(x: float, weight: int) -> tuple[int, int]:
    """weight times x in fixed point, in whole numbers: x = high / 2^16 + low / 2^52."""
    exact = Fraction(x)
    high = math.floor(exact * 2**16)
    return high * weight, round((exact * 2**16 - high) * 2**36) * weight


def updates(n: int) -> torch.Tensor:
    """Both signs, large, small, far below the resolution, whole and zero."""
    values = torch.randn(n) * 10.0 ** torch.randint(-14, 5, (n,))
    odd = torch.tensor([0.0, -0.0, 1.0, -3.0, 2.0**20 - 1, 1 - 2.0**20, -1e-30, 1e-30, 2.0**-53])
    values[: min(n, len(odd))] = odd[:n]
    return values


@pytest.mark.parametrize("n", [0, 1, 9, 300])
@pytest.mark.parametrize("with_means", [False, True])
def test_sums_of_updates_are_exact(cuda: Runner, n: int, with_means: bool) -> None:
    """Kernel and plain torch against whole numbers."""
    values, weight = updates(n), 97
    means = torch.randn(n) * 30 if with_means else None
    if means is not None:
        values[values.abs() > 1e6] = 7.0  # with a mean's square added they are too large
    pairs = []
    for i, x in enumerate(values.tolist()):
        mean = 0.0 if means is None else float(means[i])
        high, low = fixed_parts(x + mean * mean, weight)
        pairs.append((i + high, i + 5 + low))
    for compute in (fixed_point.add, partial(cuda_arrays.fixed_add, cuda)):
        high, low = sums(n)
        refused = torch.zeros(2, dtype=torch.int64)
        compute(high, low, values, means, None, weight, refused)
        assert list(zip(high.tolist(), low.tolist(), strict=True)) == pairs
        assert refused.tolist() == [0, 0]


def test_updates_go_to_their_positions(cuda: Runner) -> None:
    positions, values = torch.rand(1000).argsort()[:300].sort().values, updates(300)
    high, low = sums(1000)
    expected = [high.tolist(), low.tolist()]
    for p, x in zip(positions.tolist(), values.tolist(), strict=True):
        up, down = fixed_parts(x, 12)
        expected[0][p] += up
        expected[1][p] += down
    refused = torch.zeros(2, dtype=torch.int64)
    cuda_arrays.fixed_add(cuda, high, low, values, None, positions, 12, refused)
    assert [high.tolist(), low.tolist()] == expected
    assert refused.tolist() == [0, 0]


BAD = [math.nan, math.inf, -math.inf, 2.0**20, -(2.0**20)]


@pytest.mark.parametrize(
    ("positions", "bad"),
    [
        (None, 0), ([0, 1, 2, 3, 4, 5, 9], 0), ([0, 1, 2, 3, 4, 5, 10], 1),
        ([-1, 1, 2, 3, 4, 5, 6], 1), ([3, 3, 4, 5, 6, 7, 8], 1), ([6, 5, 6, 5, 6, 7, 8], 2),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_counted_and_the_rest_is_taken_back(
    cuda: Runner, positions: list[int] | None, bad: int
) -> None:
    values = torch.tensor([1.5, *BAD, -2.5])
    given = None if positions is None else torch.tensor(positions)
    results = []
    for compute in (fixed_point.add, partial(cuda_arrays.fixed_add, cuda)):
        high, low = sums(7 if positions is None else 10)
        before, refused = (high.clone(), low.clone()), torch.zeros(2, dtype=torch.int64)
        compute(high, low, values, None, given, 3, refused)
        assert refused.tolist() == [len(BAD), bad]
        results.append((high.clone(), low.clone()))
        compute(high, low, values, None, given, -3, refused)
        assert torch.equal(high, before[0])
        assert torch.equal(low, before[1])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_mean_that_is_no_number_is_refused(cuda: Runner) -> None:
    values, means = torch.ones(3), torch.tensor([math.nan, 1024.0, 3.0])
    for compute in (fixed_point.add, partial(cuda_arrays.fixed_add, cuda)):
        high, low = torch.zeros(2, 3, dtype=torch.int64)
        refused = torch.zeros(2, dtype=torch.int64)
        compute(high, low, values, means, None, 1, refused)
        assert refused.tolist() == [2, 0]
        assert high.tolist() == [0, 0, 10 * 2**16]
