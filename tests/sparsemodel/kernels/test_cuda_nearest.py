"""The nearest prototype: the kernel of nearest.cu, run on the host, against float64."""

import pytest
import torch

from sparsemodel.kernels.cuda import nearest as cuda_nearest
from sparsemodel.kernels.cuda.launch import Runner

# (points, prototypes, width): one of each, less than a tile, a tile, no multiples of one.
SIZES = [(1, 1, 1), (5, 3, 7), (64, 64, 16), (70, 150, 37), (3, 200, 100)]


@pytest.mark.parametrize(("num_points", "num_prototypes", "width"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distance_and_index(
    cuda: Runner, num_points: int, num_prototypes: int, width: int, dtype: torch.dtype
) -> None:
    points = torch.randn(num_points, width).to(dtype)
    prototypes = torch.randn(num_prototypes, width).to(dtype)
    index, distance = cuda_nearest.nearest(cuda, points, prototypes)
    exact = (points.double()[:, None] - prototypes.double()).square().sum(2)
    assert torch.equal(index, exact.argmin(1))
    torch.testing.assert_close(distance.double(), exact.min(1).values, rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lower_index(cuda: Runner) -> None:
    """Few integers, so that distances are exact and most of them tie."""
    points, prototypes = torch.randint(0, 3, (90, 4)), torch.randint(0, 3, (140, 4))
    exact = (points[:, None] - prototypes).square().sum(2)
    index, distance = cuda_nearest.nearest(cuda, points.float(), prototypes.float())
    first = [row.tolist().index(least) for row, least in zip(exact, exact.amin(1), strict=True)]
    assert index.tolist() == first
    assert torch.equal(distance.long(), exact.amin(1))


def test_points_far_from_the_origin_keep_their_digits(cuda: Runner) -> None:
    """Through |x|² − 2xp + |p|² float32 could not tell these prototypes apart."""
    points = torch.full((1, 3), 4096.0)
    prototypes = points + torch.tensor([[0.5], [0.25], [0.75]])
    index, distance = cuda_nearest.nearest(cuda, points, prototypes)
    assert index.tolist() == [1]
    assert distance.tolist() == [3 / 16]


def test_infinity_and_nan(cuda: Runner) -> None:
    """As torch.argmin: NaN counts as the least, at its first place; all infinite is the first."""
    points = torch.tensor([[0.0], [1e30], [float("nan")]])
    prototypes = torch.tensor([[3.0], [1.0], [float("nan")], [2.0]])
    index, distance = cuda_nearest.nearest(cuda, points, prototypes)
    assert index.tolist() == [2, 2, 0]
    assert distance.isnan().all()
    index, distance = cuda_nearest.nearest(cuda, points[1:2], prototypes[:2])
    assert (index.tolist(), distance.tolist()) == ([0], [float("inf")])


def test_of_several_nan_the_first_wins(cuda: Runner) -> None:
    """5 and 18 fall to threads 5 and 2 of a row, so the later index is met first."""
    prototypes = torch.zeros(40, 2)
    prototypes[[18, 5]] = float("nan")
    index, _ = cuda_nearest.nearest(cuda, torch.ones(1, 2), prototypes)
    assert index.tolist() == [5]


def test_no_points(cuda: Runner) -> None:
    index, distance = cuda_nearest.nearest(cuda, torch.empty(0, 3), torch.randn(2, 3))
    assert len(index) == len(distance) == 0
