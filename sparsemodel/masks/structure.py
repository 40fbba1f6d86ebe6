"""Masks with a structure: n of m along the input, and square blocks.

A weight is looked at as a matrix [out, row_length], a convolution's as [out, in/groups · kh · kw]:
that row is what one output value multiplies, and what a convolution written as a matrix product
hands to the tensor cores. Groups of m then cross from one input channel into the next.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping

import torch

from sparsemodel.errors import DensityError, MaskError
from sparsemodel.masks.mask import Mask, mask_from_scores

SIDES = (64, 32, 16)


def row_mask(scores: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> Mask:
    """Keep the weights of highest score within each row, as many in one row as in another.

    Of `counts[name]` weights each of R rows keeps ⌊count / R⌋; what is left over goes, one each, to
    the rows whose next weight scores highest. Of equal scores the lower index is kept. Weights that
    score −inf are no choice: a row with fewer others keeps those, and the rest goes to other rows.

    Args:
        scores: name -> score of each weight, [out, ...] (any real dtype); higher means keep.
        counts: name -> how many weights of the layer stay active.

    Raises:
        MaskError: scores that are NaN or a vector, or names that differ.
        DensityError: a count outside [0, numel], or of more weights than there is a choice of.

    >>> row_mask({"w": torch.tensor([[4.0, 3.0], [2.0, 1.0]])}, {"w": 3})["w"]
    tensor([[ True,  True],
            [ True, False]])
    """
    if scores.keys() != counts.keys():
        raise MaskError(f"scores for {list(scores)} but counts for {list(counts)}")
    patterns = {}
    for name, score in scores.items():
        rows, count = _rows(name, score), counts[name]
        if not 0 <= count <= rows.numel():
            raise DensityError(f"{name!r} has {rows.numel()} weights; cannot keep {count}")
        choices = (rows > -torch.inf).sum(1)
        if count > (most := int(choices.sum())):
            raise DensityError(f"{name!r}: {most} weights can stay, not {count}")
        # How many stay once every row has kept none, one, two, ..., or all that it can.
        open_rows = [int((choices >= each).sum()) for each in range(1, rows.shape[1] + 1)]
        totals = list(itertools.accumulate(open_rows, initial=0))
        each = bisect.bisect_right(totals, count) - 1
        more = count - totals[each]
        order = torch.argsort(rows, dim=1, descending=True, stable=True)
        pattern = torch.zeros(rows.shape, dtype=torch.bool, device="cpu")
        pattern.scatter_(1, order[:, :each], True)
        pattern &= rows > -torch.inf
        if more:
            following = order[:, each]
            places = torch.arange(len(rows), device="cpu")
            best = torch.argsort(rows[places, following], descending=True, stable=True)[:more]
            pattern[best, following[best]] = True
        patterns[name] = pattern.reshape(score.shape)
    return Mask(patterns)


def n_of_m_mask(scores: Mapping[str, torch.Tensor], *, n: int = 2, m: int = 4) -> Mask:
    """Keep exactly the n weights of highest score in every m neighbours along the input.

    Ties are broken by position: of equal scores the lower index is kept.
    Source of 2:4: Mishra et al., Accelerating Sparse Deep Neural Networks (2021), section 3.

    Args:
        scores: name -> score of each weight, [out, ...] (any real dtype); higher means keep.
        n: weights kept in each group, in [1, m].
        m: neighbours in a group.

    Raises:
        MaskError: scores that are NaN or a vector, or a row that is no multiple of m.
        DensityError: n outside [1, m].

    >>> n_of_m_mask({"w": torch.tensor([[1.0, 3.0, 2.0, 0.0]])})["w"]
    tensor([[False,  True,  True, False]])
    """
    if not 1 <= n <= m:
        raise DensityError(f"expected 1 <= n <= m, got {n} of {m}")
    patterns = {}
    for name, score in scores.items():
        rows = _rows(name, score)
        if rows.shape[1] % m:
            raise MaskError(
                f"{name!r}: {n} of {m} needs rows of a multiple of {m} weights, these have "
                f"{rows.shape[1]}; leave the layer out, or pad its input"
            )
        groups = rows.reshape(-1, m)
        order = torch.argsort(groups, dim=1, descending=True, stable=True)
        pattern = torch.zeros_like(groups, dtype=torch.bool)
        patterns[name] = pattern.scatter_(1, order[:, :n], True).reshape(score.shape)
    return Mask(patterns)


def block_counts(
    shapes: Mapping[str, tuple[int, ...]], density: float, *, side: int = 32
) -> dict[str, int]:
    """How many blocks of each layer stay: round(density · blocks), at least one.

    Args:
        shapes: name -> shape of the weight.
        density: active weights over all weights, in (0, 1]; reached up to half a block a layer.
        side: width and height of a block: 16, 32 or 64.

    Raises:
        DensityError: a density outside (0, 1].
        MaskError: a weight that does not divide into whole blocks.

    >>> block_counts({"w": (64, 96)}, 0.25, side=32)
    {'w': 2}
    """
    if not 0 < density <= 1:  # NaN fails both comparisons
        raise DensityError(f"density must be in (0, 1], got {density}")
    return {
        name: max(1, round(density * math.prod(_grid(name, shape, side))))
        for name, shape in shapes.items()
    }


def block_mask(
    scores: Mapping[str, torch.Tensor], counts: Mapping[str, int], *, side: int = 32
) -> Mask:
    """Keep exactly `counts[name]` square blocks of highest score in each layer.

    The score of a block is the sum of its weights' scores, in float64. Of equal blocks the one
    further up, then further left, is kept.
    Source: Gray et al., GPU Kernels for Block-Sparse Weights (2017).

    Args:
        scores: name -> score of each weight, [out, ...] (any real dtype); higher means keep.
        counts: name -> how many blocks stay (`block_counts`).
        side: width and height of a block: 16, 32 or 64.

    Raises:
        MaskError: scores that are NaN, names that differ, or a weight that does not divide into
            whole blocks: there is no smaller block at an edge.
        DensityError: a count outside [0, blocks].
    """
    sums = {}
    for name, score in scores.items():
        rows = _rows(name, score)
        height, width = _grid(name, tuple(score.shape), side)
        sums[name] = rows.double().reshape(height, side, width, side).sum((1, 3))
    blocks = mask_from_scores(sums, counts)
    return Mask({name: _whole(blocks[name], side).view(scores[name].shape) for name in blocks})


def is_n_of_m(pattern: torch.Tensor, *, n: int = 2, m: int = 4) -> bool:
    """Whether no m neighbours along the rows of a pattern [out, ...] have more than n active."""
    rows = pattern.reshape(pattern.shape[0], -1)
    if rows.shape[1] % m:
        return False
    return bool((rows.reshape(-1, m).sum(1) <= n).all())


def block_side(pattern: torch.Tensor) -> int | None:
    """The largest side of which a pattern [out, ...] is made of whole blocks; None for no side."""
    rows = pattern.reshape(pattern.shape[0], -1)
    for side in SIDES:
        height, width = rows.shape[0] // side, rows.shape[1] // side
        if rows.shape == (height * side, width * side):
            corners = rows[::side, ::side]
            if torch.equal(_whole(corners, side), rows):
                return side
    return None


def check_structure(pattern: torch.Tensor, execution: str) -> int:
    """The side of a pattern's blocks for execution "blocks"; 0 for what needs none.

    Raises:
        MaskError: "blocks" is asked for and the pattern [out, in] is not made so.
    """
    if execution != "blocks":
        return 0
    side = block_side(pattern)
    if side is None:
        raise MaskError(
            f'execution="blocks" needs a mask of whole blocks of a side of {SIDES} '
            f"(masks.structure.block_mask); this one, {tuple(pattern.shape)}, is not"
        )
    return side


def _rows(name: str, score: torch.Tensor) -> torch.Tensor:
    """Scores as a matrix on the CPU."""
    if score.dim() < 2:
        raise MaskError(f"{name!r}: expected a weight [out, in, ...], got {tuple(score.shape)}")
    if torch.isnan(score).any():
        raise MaskError(f"scores of {name!r} hold NaN: no order can be made of them")
    return score.detach().reshape(score.shape[0], -1).cpu()


def _grid(name: str, shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """Rows and columns of blocks of a weight."""
    if side not in SIDES:
        raise MaskError(f"the side of a block is one of {SIDES}, got {side}")
    height, width = shape[0], math.prod(shape[1:])
    if height % side or width % side or not height * width:
        raise MaskError(
            f"{name!r} is a matrix of {height}×{width}, which does not divide into blocks of "
            f"{side}×{side}; take a smaller side of {SIDES} or leave the layer out"
        )
    return height // side, width // side


def _whole(blocks: torch.Tensor, side: int) -> torch.Tensor:
    """A bool a block -> a bool a weight."""
    return blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)
