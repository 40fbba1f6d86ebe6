"""Where the blocks of a block-sparse weight stand."""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class BlockIndex(NamedTuple):
    """The CSR pattern of a weight of whole blocks, and its blocks in order of their column.

    `row_ptr` and `cols` are the layer's, by weight. By block column: `col_ptr` [in / side + 1],
    where each column's blocks begin, `block_rows` [blocks], and `starts` [blocks], the place of
    a block's first weight among the values; its row r begins r times the row's length further.
    All int32.
    """

    side: int
    row_ptr: Tensor
    cols: Tensor
    col_ptr: Tensor
    block_rows: Tensor
    starts: Tensor

    @classmethod
    def build(cls, row_ptr: Tensor, cols: Tensor, in_features: int, side: int) -> BlockIndex:
        """The index of a pattern that is made of whole blocks of `side`."""
        device = cols.device
        lengths = row_ptr.diff()[::side] // side
        first = torch.repeat_interleave(row_ptr[:-1:side], lengths)  # of the block's row of blocks
        before = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        starts = first + (torch.arange(len(first), device=device) - before) * side
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        columns = torch.div(cols[starts], side, rounding_mode="floor")
        order = torch.argsort(columns, stable=True)
        col_ptr = torch.zeros(in_features // side + 1, dtype=torch.int32, device=device)
        col_ptr[1:] = torch.bincount(columns, minlength=len(col_ptr) - 1).cumsum(0)
        return cls(side, row_ptr, cols, col_ptr, rows[order].int(), starts[order].int())

    def joined(self) -> Tensor:
        """What `build` adds to the pattern, as one vector."""
        return torch.cat([self.col_ptr, self.block_rows, self.starts])

    @classmethod
    def split(
        cls, row_ptr: Tensor, cols: Tensor, joined: Tensor, in_features: int, side: int
    ) -> BlockIndex:
        """The index from its pattern and `joined`."""
        blocks = cols.numel() // side**2
        parts = joined.split([in_features // side + 1, blocks, blocks])
        return cls(side, row_ptr, cols, *parts)
