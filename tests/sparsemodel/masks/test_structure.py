"""Structured masks: exact counts, order, ties, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemodel.errors import DensityError, MaskError
from sparsemodel.masks.structure import (
    block_counts,
    block_mask,
    block_side,
    is_n_of_m,
    n_of_m_mask,
    row_mask,
)

scored = st.integers(0, 2**16)


def scores(seed: int, *shape: int, levels: int = 4) -> torch.Tensor:
    """Whole numbers, so that many are equal."""
    return torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed)).float()


@settings(deadline=None, max_examples=40)
@given(scored, st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.data())
def test_n_of_m_equals_a_plain_loop(
    seed: int, out: int, groups: int, m: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, m))
    score = scores(seed, out, groups * m)
    pattern = n_of_m_mask({"w": score}, n=n, m=m)["w"]
    for row in range(out):
        for start in range(0, groups * m, m):
            group = score[row, start : start + m].tolist()
            best = sorted(range(m), key=lambda i: (-group[i], i))[:n]
            assert pattern[row, start : start + m].nonzero().flatten().tolist() == sorted(best)
    assert is_n_of_m(pattern, n=n, m=m)
    assert n == 1 or not is_n_of_m(pattern, n=n - 1, m=m)


@settings(deadline=None, max_examples=30)
@given(scored, st.integers(1, 4), st.integers(1, 4), st.sampled_from([16, 32]), st.data())
def test_blocks_equal_a_plain_loop(
    seed: int, height: int, width: int, side: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(0, height * width))
    few = scores(seed, height, width, levels=3)
    noise = scores(seed + 1, height * side, width * side)
    score = few.repeat_interleave(side, 0).repeat_interleave(side, 1) * side * side + noise
    pattern = block_mask({"w": score}, {"w": keep}, side=side)["w"]
    places = [(i, j) for i in range(height) for j in range(width)]
    cut = {(i, j): (slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side))
           for i, j in places}  # fmt: skip
    best = sorted(places, key=lambda p: (-float(score[cut[p]].double().sum()), p))[:keep]
    expected = torch.zeros_like(pattern)
    for place in best:
        expected[cut[place]] = True
    assert torch.equal(pattern, expected)
    found = block_side(pattern)
    assert found is not None
    assert found >= side


@settings(deadline=None, max_examples=40)
@given(scored, st.integers(1, 5), st.integers(1, 6), st.data())
def test_rows_keep_as_many_as_they_can(
    seed: int, out: int, width: int, data: st.DataObject
) -> None:
    """One weight after the other, each by the rows that have kept the fewest, −inf never."""
    score = scores(seed, out, width)
    score[score == 0] = -torch.inf
    left = [sorted(range(width), key=lambda i, r=row: (-score[r, i], i)) for row in range(out)]
    left = [[i for i in each if score[row, i] > -torch.inf] for row, each in enumerate(left)]
    most = sum(map(len, left))
    count = data.draw(st.integers(0, most))
    expected = torch.zeros(out, width, dtype=torch.bool)
    for _ in range(count):
        rows = [row for row in range(out) if left[row]]
        fewest = min(int(expected[row].sum()) for row in rows)
        rows = [row for row in rows if int(expected[row].sum()) == fewest]
        row = max(rows, key=lambda r: (score[r, left[r][0]], -r))
        expected[row, left[row].pop(0)] = True
    assert torch.equal(row_mask({"w": score}, {"w": count})["w"], expected)
    if most < out * width:
        with pytest.raises(DensityError, match=f"'w': {most} weights can stay, not {most + 1}"):
            row_mask({"w": score}, {"w": most + 1})


def test_ties_go_to_the_lower_index() -> None:
    assert n_of_m_mask({"w": torch.ones(1, 8)})["w"].tolist() == [[True, True, False, False] * 2]
    blocks = block_mask({"w": torch.ones(32, 48)}, {"w": 4}, side=16)["w"][::16, ::16]
    assert blocks.tolist() == [[True, True, True], [True, False, False]]


def test_masks_are_made_on_the_cpu_whatever_the_default_device() -> None:
    score = scores(0, 32, 32)
    with torch.device("meta"):
        found = n_of_m_mask({"w": score}), block_mask({"w": score}, {"w": 2}, side=16)
    assert found == (n_of_m_mask({"w": score}), block_mask({"w": score}, {"w": 2}, side=16))


def test_a_convolution_is_a_matrix_of_channels_and_window() -> None:
    score = scores(0, 16, 4, 2, 2, levels=1000)
    assert torch.equal(
        n_of_m_mask({"w": score})["w"].view(16, 16), n_of_m_mask({"w": score.view(16, 16)})["w"]
    )
    assert block_mask({"w": score}, {"w": 1}, side=16)["w"].shape == score.shape


def test_block_side_is_the_largest_that_fits() -> None:
    pattern = torch.zeros(128, 128, dtype=torch.bool)
    pattern[64:, :64] = True
    assert block_side(pattern) == 64
    pattern[:32, 32:64] = True
    assert block_side(pattern) == 32
    pattern[:16, :16] = True
    assert block_side(pattern) == 16
    pattern[0, 0] = False
    assert block_side(pattern) is None
    assert block_side(torch.ones(16, 24, dtype=torch.bool)) is None


def test_counts_are_rounded_and_never_none() -> None:
    assert block_counts({"a": (64, 64), "b": (32, 32)}, 0.4, side=32) == {"a": 2, "b": 1}
    assert block_counts({"a": (64, 64)}, 1.0, side=16) == {"a": 16}
    for density in (0.0, 1.1, float("nan")):
        with pytest.raises(DensityError, match="density must be in"):
            block_counts({"a": (64, 64)}, density)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(MaskError, match=r"'w'.*multiple of 4 weights, these have 6"):
        n_of_m_mask({"w": torch.ones(2, 6)})
    assert not is_n_of_m(torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(MaskError, match="NaN"):
        n_of_m_mask({"w": torch.full((2, 4), torch.nan)})
    with pytest.raises(MaskError, match="expected a weight"):
        n_of_m_mask({"w": torch.ones(4)})
    with pytest.raises(DensityError, match="5 of 4"):
        n_of_m_mask({"w": torch.ones(2, 4)}, n=5)
    with pytest.raises(MaskError, match="40×32, which does not divide into blocks of 32×32"):
        block_mask({"w": torch.ones(40, 32)}, {"w": 1})
    with pytest.raises(MaskError, match=r"one of \(64, 32, 16\), got 8"):
        block_counts({"w": (64, 64)}, 0.5, side=8)
    with pytest.raises(DensityError, match="cannot keep 5"):
        block_mask({"w": torch.ones(64, 64)}, {"w": 5})
    with pytest.raises(MaskError, match="scores for"):
        block_mask({"w": torch.ones(64, 64)}, {"v": 1})
