"""The pattern of a sparse layer: CSR rows of its weight flattened to [out, row_length]."""

from __future__ import annotations

import math

import torch

from sparsemodel.errors import MaskError

MAX_ENTRIES = 2**31 - 1  # positions are int32


def csr_from_mask(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The CSR form of a boolean weight mask.

    Args:
        mask: bool, shape [out, ...].

    Returns:
        `row_ptr`, int32 [out + 1], where each row's entries begin, and `cols`, int32 [nnz], the
        flat index of each active weight inside its row, ascending. Entries are in the order of
        `weight[mask]`.

    Raises:
        MaskError: a mask that is not boolean, has no rows, or is too large for int32.

    >>> csr_from_mask(torch.tensor([[True, False, True], [False, True, False]]))
    (tensor([0, 2, 3], dtype=torch.int32), tensor([0, 2, 1], dtype=torch.int32))
    """
    if mask.dtype != torch.bool or mask.dim() < 2 or mask.numel() == 0:
        raise MaskError(
            "expected a bool mask of a weight's shape [out, ...], got "
            f"{mask.dtype} of shape {tuple(mask.shape)}"
        )
    rows = mask.reshape(mask.shape[0], -1)
    if rows.numel() > MAX_ENTRIES:
        raise MaskError(f"a layer of {rows.numel():,} weights is too large for int32 positions")
    row_ptr = torch.zeros(len(rows) + 1, dtype=torch.int32, device=mask.device)
    row_ptr[1:] = rows.sum(1).cumsum(0)
    flat = torch.nonzero(rows.reshape(-1)).reshape(-1)
    return row_ptr, (flat % rows.shape[1]).to(torch.int32)


def csr_from_positions(
    flat: torch.Tensor, *, num_rows: int, row_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The CSR form of ascending flat indices (int64 [nnz]) into the dense weight."""
    rows = torch.div(flat, row_length, rounding_mode="floor")
    row_ptr = torch.zeros(num_rows + 1, dtype=torch.int32, device=flat.device)
    row_ptr[1:] = torch.bincount(rows, minlength=num_rows).cumsum(0)
    return row_ptr, (flat % row_length).to(torch.int32)


def flat_positions(row_ptr: torch.Tensor, cols: torch.Tensor, row_length: int) -> torch.Tensor:
    """Flat index of each active weight in the dense weight: int64 [nnz], ascending."""
    counts = row_ptr.diff()
    starts = torch.arange(len(counts), device=cols.device) * row_length
    return torch.repeat_interleave(starts, counts, output_size=len(cols)) + cols


def mask_from_csr(
    row_ptr: torch.Tensor, cols: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """The boolean mask, of shape `shape`, that a CSR pattern stands for."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool, device=cols.device)
    mask[flat_positions(row_ptr, cols, mask.numel() // shape[0])] = True
    return mask.view(shape)


def carry_values(values: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """values[source], zero where `source` is -1: what went with old entries, for the new ones."""
    if len(values) == 0:
        return values.new_zeros(len(source))
    return values[source.clamp(min=0)].masked_fill_(source < 0, 0)


def check_csr(name: str, row_ptr: torch.Tensor, cols: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a pattern that is no CSR of a weight of shape `shape`.

    Raises:
        MaskError: wrong dtype or length, rows that do not follow each other, or columns that
            are out of range or not ascending in a row.
    """
    num_rows, row_length = shape[0], math.prod(shape[1:])
    if row_ptr.dtype != torch.int32 or cols.dtype != torch.int32 or cols.dim() != 1:
        raise MaskError(f"pattern of {name!r}: expected int32 vectors row_ptr and cols")
    if row_ptr.shape != (num_rows + 1,):
        raise MaskError(
            f"pattern of {name!r}: expected row_ptr of {num_rows + 1} entries for a weight of "
            f"shape {shape}, got shape {tuple(row_ptr.shape)}"
        )
    ends = int(row_ptr[0]), int(row_ptr[-1])
    if ends != (0, len(cols)) or bool((row_ptr.diff() < 0).any()):
        raise MaskError(
            f"pattern of {name!r}: row_ptr must rise from 0 to the {len(cols)} entries of cols, "
            f"got {ends[0]} to {ends[1]}"
        )
    in_range = len(cols) == 0 or (int(cols.min()) >= 0 and int(cols.max()) < row_length)
    if not in_range or bool((flat_positions(row_ptr, cols, row_length).diff() <= 0).any()):
        raise MaskError(
            f"pattern of {name!r}: cols must be in [0, {row_length}) and ascending in each row"
        )
