"""Kept units as a mask over weights: the network that computes what the smaller one would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sparsemodel.calibration.blocks import Block
from sparsemodel.masks.mask import Mask
from sparsemodel.units.unit import (
    BLOCKS,
    Kept,
    bias_of,
    check_kept,
    kept_groups,
    kept_units,
    weight_of,
)


def unit_mask(
    model: nn.Module, blocks: Sequence[Block], kept: Kept, *, biases: bool = True
) -> Mask:
    """The mask under which removed units are zero; `mask.apply(model)` sets them so.

    Removed are the rows of query, key, value, up and gate with their biases, and the columns of
    the two output layers, whose biases stay. A key and a value go when no head of their group is
    left. A removed block is zero in all its layers, biases included, so that its residual stream
    passes as it came; where a norm follows the addition (some OPT) it does not.

    Args:
        kept: of layers of which it says nothing the mask says nothing.
        biases: False for weights alone, as `sparsify` takes them; of removed heads and channels
            the network computes the same, since nothing reads what they give.

    Raises:
        MaskError: `kept` does not fit the blocks, or says nothing.
    """
    check_kept(model, blocks, kept)
    patterns = {}
    for block in blocks:
        for layer, rows, columns in _cuts(model, block, kept):
            pattern = torch.ones(weight_of(model, layer).shape, dtype=torch.bool, device="cpu")
            if rows is not None:
                pattern &= rows[:, None]
                if biases and bias_of(model, layer) is not None:
                    patterns[f"{layer}.bias"] = rows
            if columns is not None:
                pattern &= columns
            patterns[f"{layer}.weight"] = pattern
    return Mask(patterns)


def _cuts(
    model: nn.Module, block: Block, kept: Kept
) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Layers of a block with the rows and the columns that stay; None: all of them."""
    heads, channels = kept_units(model, block, kept)
    if (whole := kept.get((BLOCKS, block.name))) is not None:
        whole = whole.expand(weight_of(model, block.down).shape[0])
    if heads is not None:
        dims, shared = (
            each.repeat_interleave(block.head_dim) for each in (heads, kept_groups(block, heads))
        )
        yield block.query, dims, None
        yield block.key, shared, None
        yield block.value, shared, None
        yield block.attention_out, whole, dims
    if channels is not None:
        for layer in (block.gate, block.up):
            if layer:
                yield layer, channels, None
        yield block.down, whole, channels
