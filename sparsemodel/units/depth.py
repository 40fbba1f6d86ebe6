"""Scores of whole blocks and of hidden dimensions. High always means keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsemodel.calibration.blocks import Block
from sparsemodel.calibration.collect import ANGLES, SEQUENCES_OUT
from sparsemodel.calibration.statistics import Calibration
from sparsemodel.units.unit import BLOCKS, HIDDEN, Key


def minitron_blocks(
    model: nn.Module, blocks: Sequence[Block], calibration: Calibration
) -> dict[Key, Tensor]:
    """1 − the mean cosine between what goes into a block and what comes out: in [0, 2].

    Source: block importance of Men et al., ShortGPT (2024), as Muralidharan et al., Compact
    Language Models (NeurIPS 2024), take it for depth. Departs from them in that
    tokens are averaged over the whole data, which scales all blocks alike.

    Raises:
        CalibrationError: statistics that are missing.
    """
    del model
    return {
        (BLOCKS, block.name): 1.0 - calibration.sums(ANGLES, block.name).mean("cosine").reshape(1)
        for block in blocks
    }


def cfsp_blocks(
    model: nn.Module, blocks: Sequence[Block], calibration: Calibration
) -> dict[Key, Tensor]:
    """The mean angle, as a part of π, between what goes into a block and what comes out: [0, 1].

    Source: Wang et al., CFSP (COLING 2025), its coarse score; `allocation.cfsp_shares` makes
    widths of it.

    Raises:
        CalibrationError: statistics that are missing.
    """
    del model
    return {
        (BLOCKS, block.name): calibration.sums(ANGLES, block.name).mean("angle").reshape(1)
        for block in blocks
    }


def minitron_hidden(
    model: nn.Module, blocks: Sequence[Block], calibration: Calibration
) -> dict[Key, Tensor]:
    """Of each dimension of the residual stream, what `scores.minitron` says of the norms' outputs.

    √Σ over sequences of (mean over tokens of |x|)², summed over the norms of all blocks: one
    ranking for the whole network.
    Source: Muralidharan et al., Compact Language Models (NeurIPS 2024), and its code.

    Returns:
        ("hidden", "") -> [hidden].

    Raises:
        CalibrationError: statistics that are missing.
    """
    del model
    norms = [name for block in blocks for name in block.norms]
    squares = [calibration.sums(SEQUENCES_OUT, name).totals["squares"] for name in norms]
    return {(HIDDEN, ""): torch.stack([each.sqrt() for each in squares]).sum(0)}
