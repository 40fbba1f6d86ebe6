"""Masks as bits, optimiser steps and sums of updates: the kernels of arrays.cu, run on the host."""

import numpy as np
import pytest
import torch

from sparsemodel.kernels import cuda_arrays
from sparsemodel.kernels.cuda import Runner

SIZES = [1, 7, 8, 31, 33, 256, 1000]


@pytest.mark.parametrize("n", SIZES)
def test_packing_is_numpys_and_unpacking_its_inverse(cuda: Runner, n: int) -> None:
    mask = torch.rand(n) < 0.4
    packed = cuda_arrays.pack_mask(cuda, mask)
    assert packed.tolist() == np.packbits(mask.cpu().numpy()).tolist()
    assert torch.equal(cuda_arrays.unpack_mask(cuda, packed, n), mask)


@pytest.mark.parametrize("n", [1, 33, 1000, 5000])
def test_popcount_counts_bits(cuda: Runner, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_arrays, "_MAX_BLOCKS", 2)
    packed = torch.randint(0, 256, (n,), dtype=torch.uint8)
    assert int(cuda_arrays.popcount(cuda, packed)) == np.unpackbits(packed.cpu().numpy()).sum()


def test_an_empty_mask_has_no_bytes_and_no_bits(cuda: Runner) -> None:
    packed = cuda_arrays.pack_mask(cuda, torch.empty(0, dtype=torch.bool))
    assert packed.numel() == 0
    assert int(cuda_arrays.popcount(cuda, packed)) == 0


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


def test_updates_of_clients_add_up(cuda: Runner) -> None:
    """total = 1 + 0.25 a + 0.75 b, each client at positions of its own."""
    total = torch.ones(1000)
    expected = total.double()
    for weight in (0.25, 0.75):
        positions = torch.rand(1000).argsort()[:300].sort().values
        values = torch.randn(300)
        assert cuda_arrays.refused_positions(cuda, positions, 1000) == 0
        cuda_arrays.scatter_add(cuda, total, positions, values, weight)
        expected[positions] += weight * values.double()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("positions", "refused"),
    [([], 0), ([0, 9], 0), ([0, 10], 1), ([-1, 3], 1), ([3, 3], 1), ([5, 4, 3], 2)],
)
def test_positions_out_of_range_or_order_are_counted(
    cuda: Runner, positions: list[int], refused: int
) -> None:
    given = torch.tensor(positions, dtype=torch.int64)
    assert cuda_arrays.refused_positions(cuda, given, 10) == refused
